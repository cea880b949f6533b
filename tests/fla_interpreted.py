"""Delta rules on two ranks by flash-linear-attention's own kernels, in Triton's interpreter on CPU.

A program: it prints the largest error of each recurrence against the definition in fp64. Triton and the
package are on the path, TRITON_INTERPRET is 1.
"""

import sys
import warnings
from collections.abc import Iterator
from typing import Any

import fla.ops.common.chunk_delta_h
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import triton.language as tl
from recurrences import problem
from test_recurrent import alone
from test_recurrent_kernels import FlaAnywhere
from triton.runtime.autotuner import Autotuner

from seqmesh import Schedule, SequenceMesh, masks
from seqmesh.engine.recurrent.layers import recur

LENGTHS = [40, 3, 1, 30, 2, 21]


def first_config(self: Autotuner, *args: Any, **kwargs: Any) -> Any:
    """In place of the fastest, which needs a GPU's clock."""
    self.nargs = dict(zip(self.arg_names, args, strict=False))
    return self.fn.run(*args, **kwargs, **self.configs[0].all_kwargs())


def tensor_range(*bounds: Any) -> Iterator[Any]:
    """Loops give numbers in the interpreter and tensors on a GPU, whose methods the kernels call."""
    for i in range(*map(int, bounds)):
        yield tl.full((), i, tl.int32)


def error(kind: str) -> float:
    """The largest of this rank's output and gradients."""
    mesh = SequenceMesh.build(ulysses=1, ring=2)
    schedule = Schedule.build(masks.documents(LENGTHS), mesh, layout="zigzag")
    rule, tensors = problem(kind, sum(LENGTHS), 2, dim=16)
    out, up, whole = alone(kind, LENGTHS, 2, dim=16)
    own = {name: schedule.shard(x, 1).float().requires_grad_() for name, x in tensors.items()}
    found = recur(rule, own, schedule, FlaAnywhere())
    found.backward(schedule.shard(up, 1).float())
    errors = [found - schedule.shard(out, 1)]
    errors += [x.grad - schedule.shard(whole[name].grad, 1) for name, x in own.items()]
    return max(x.detach().abs().max().item() for x in errors)


def rank(number: int, store: str) -> None:
    """One of two."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    Autotuner.run = first_config
    vars(fla.ops.common.chunk_delta_h)["range"] = tensor_range
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=number, world_size=2)
    for kind in ("delta", "kimi"):
        print(kind, error(kind), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(rank, (sys.argv[1],), nprocs=2)
