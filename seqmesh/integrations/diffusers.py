"""Run an image or video transformer of diffusers on sequence shards: the pipeline's call stays what it is.

    mesh = SequenceMesh.build(ulysses=2, ring=2)
    plug_in(pipe.transformer, mesh)
    image = pipe(prompt, generator=torch.Generator().manual_seed(0)).images[0]   # on every rank alike

Text and image tokens are one joint sequence. Each rank holds near-equally many of both, in the model's own
order; no token is repeated and none is made up. Padding becomes bands of the schedule. Attention of the
blocks goes over the mesh, everything else works on this rank's tokens, and the last layer's output is
gathered, so every rank ends with the whole image. What cannot be done is refused, see
diffusion/refusals.py; which models there are, see diffusion/models.py and docs/diffusion.md.

Training: every rank computes the loss from the whole output. A parameter's gradient is then this rank's part;
the sum over the ranks of the mesh is the whole.
"""

from typing import Any, TypeVar

from torch import nn

from seqmesh.engine.mesh import SequenceMesh
from seqmesh.integrations.diffusion.agree import same_seed
from seqmesh.integrations.diffusion.plugged import PluggedTransformer
from seqmesh.integrations.diffusion.refusals import check_model, plan_of

__all__ = ["plug_in", "same_seed", "unplug"]

Transformer = TypeVar("Transformer", bound=nn.Module)

_ATTRIBUTE = "_seqmesh_plugged"
"""Where a model keeps what was put into it."""


def plug_in(
    transformer: Transformer, mesh: SequenceMesh, *, kernel: str = "auto", compare_inputs: bool = True
) -> Transformer:
    """Let a transformer of diffusers run on the tokens of this rank of a mesh: in place; returned as it came.

    From then on every rank of the mesh calls it alike, with whole inputs, and gets the whole output.
    `unplug` undoes it.

    Args:
        transformer: `pipe.transformer`, of a class in the plan table.
        mesh: ring x ulysses; a process without a process group has the 1 x 1 mesh.
        kernel: as of `seqmesh.attention`.
        compare_inputs: compare, at every forward, whether all ranks got the same, to the bit. Without it each
            rank computes its tokens from its own copy: for ranks whose encoders round differently.

    Raises:
        ValueError: a class without a plan, a model of which the plan does not know a part, a transformer that
            is plugged in already. Later, from a forward: arguments that cannot be honoured, or of which ranks
            got different ones.
    """
    if hasattr(transformer, _ATTRIBUTE):
        raise ValueError(
            f"{type(transformer).__name__} is plugged in already; unplug it first to change mesh or kernel"
        )
    plan = plan_of(transformer)
    check_model(transformer, plan)
    plugged: Any = PluggedTransformer(transformer, plan, mesh, kernel, compare_inputs=compare_inputs)
    setattr(transformer, _ATTRIBUTE, plugged)
    return transformer


def unplug(transformer: Transformer) -> Transformer:
    """Undo `plug_in`: the transformer is what it was.

    Raises:
        ValueError: a transformer that is not plugged in.
    """
    plugged = getattr(transformer, _ATTRIBUTE, None)
    if plugged is None:
        raise ValueError(f"{type(transformer).__name__} is not plugged in; there is nothing to undo")
    plugged.remove()
    delattr(transformer, _ATTRIBUTE)
    return transformer
