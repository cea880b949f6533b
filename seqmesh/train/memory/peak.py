"""Predict one rank's peak memory in a step of our trainer, from shapes alone. trace/ measures the same.

    rank = TrainedRank(shape=load_model("llama3-8b"), point=Point(ulysses=8, ring=2, zero=0), seq_len=212_992)
    trainer_memory(rank)["total"]        # bytes

The step (train/trainer.py) can peak at a few moments only:

    loss forward and backward, last norm                     all activations; a chunk of logits, a few times
    MLP, its norm, attention, its norm, of the last layer    all activations, few gradients
    the same of the first layer                              one layer's activations, nearly all gradients
    embedding, AdamW                                         no activations, all gradients

Between the last layers and the first each layer frees its activations and adds its gradients, always as many:
the sum peaks at an end. backward.py has the moments, step.py what is the same in all, kept.py what layers
keep and make again, weights.py weights and gradients, engine_buffers.py what attention holds. Every term
counts tensors that autograd saves or the code holds, read off transformers' Llama, FSDP2, the derivatives of
PyTorch 2.13 and our engine; none is fitted.

On a GPU what is offloaded is in the host's memory: `Moment.total` leaves it out. A trace runs on CPU, where
it is in the same memory, so a trace is compared with `Moment.everywhere`. AdamW takes one weight after the
other there; on a GPU it takes all at once, which needs a copy of the rank's weights more in its moment.

Assumed: causal sequences, zigzag over the ring. Legend: n tokens of a rank, c rows between its layers,
h hidden, f intermediate, V vocabulary, each of this rank of tp.
"""

from seqmesh.planner.inputs.shape import ModelShape
from seqmesh.train.memory.backward import BackwardMoments
from seqmesh.train.memory.moment import Moment
from seqmesh.train.memory.rank import TrainedRank
from seqmesh.train.memory.step import TrainerStep
from seqmesh.train.memory.weights import turns


def trainer_memory(rank: TrainedRank) -> dict[str, int]:
    """Bytes on a rank at the peak of a step: the fields of `Moment`, and their "total".

    Raises:
        ValueError: a shape that the trainer cannot train.
    """
    peak = max(trainer_moments(rank), key=lambda moment: moment.total)
    return {**peak.categories, "total": peak.total}


def traced_like(rank: TrainedRank) -> dict[str, int]:
    """The same as a trace on CPU counts it: with what is on the host, as "host".

    Raises:
        ValueError: a shape that the trainer cannot train.
    """
    peak = max(trainer_moments(rank), key=lambda moment: moment.everywhere)
    return {**peak.categories, "host": peak.host, "total": peak.everywhere}


def trainer_moments(rank: TrainedRank) -> list[Moment]:
    """The moments that can be the peak, in their order; of several micro-batches, of those that differ.

    Raises:
        ValueError: a shape that the trainer cannot train.
    """
    check_trainable(rank.shape)
    step = TrainerStep(rank)
    found = [moment for turn in turns(rank) for moment in BackwardMoments(step, turn).moments()]
    return [*found, *step.after_backwards()]


def check_trainable(shape: ModelShape) -> None:
    """Raise ValueError if the formula has no such model: it is of a Llama whose heads fill its width."""
    if not shape.is_plain:
        raise _not_a_llama(shape, "experts, latent attention or several kinds of layers")
    if shape.heads * shape.head_dim != shape.hidden:
        raise ValueError(
            f"model {shape.name!r} has {shape.heads} heads of {shape.head_dim} for hidden={shape.hidden},"
            " but the formula is of heads that fill the width;"
            f" trace a model with head_dim={shape.hidden // shape.heads}"
        )
    if not shape.gated:
        raise _not_a_llama(shape, "no gate")
    if shape.sliding_window is not None:
        raise _not_a_llama(shape, f"a sliding window of {shape.sliding_window}")


def _not_a_llama(shape: ModelShape, what: str) -> ValueError:
    return ValueError(
        f"model {shape.name!r} has {what}, which the formula does not have: it is of a Llama;"
        " trace a gated model without a window"
    )
