"""What a rank has of a tensor that ranks share."""

from torch import Tensor
from torch.distributed.tensor import DTensor


def local_part(x: Tensor) -> Tensor:
    """This rank's shard of a DTensor, which shares its memory; any other tensor as it is."""
    return x.to_local() if isinstance(x, DTensor) else x
