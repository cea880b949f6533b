"""A forward's tokens on this rank: cut tensors to them, attend over all of them, gather the image.

Samples of a batch may have different padding: then each mask has a schedule of its own, over the same layout,
and attention is called for the samples of each mask.

Legend: b batch, n this rank's tokens, s all tokens, h heads, d head dim, c channels.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqmesh import masks
from seqmesh.engine.attention import attention
from seqmesh.engine.mesh import SequenceMesh
from seqmesh.engine.sharding import Schedule
from seqmesh.integrations.diffusion.plan import Stream, StreamCut
from seqmesh.integrations.diffusion.tokens import Rows, Tokens
from seqmesh.integrations.samples import EVERY, Samples, by_mask, together
from seqmesh.layouts import JointLayout, text_and_image


class SampleGroup(NamedTuple):
    """Samples of the batch that have one mask, and its schedule."""

    samples: Samples
    schedule: Schedule


class TokenShards:
    """Who holds which token in a forward, and the schedules of its attention."""

    def __init__(self, tokens: Tokens, mesh: SequenceMesh, *, text_first: bool) -> None:
        self.tokens = tokens
        self.joint = text_and_image(tokens.text, tokens.image, mesh.ring, mesh.ulysses, text_first=text_first)
        self.piece = self.joint.pieces[mesh.rank]
        self.groups = _groups(tokens, self.joint, mesh)
        self.image = Schedule.build(masks.full(tokens.image), mesh, self.joint.image_layout)
        """Of the image tokens alone."""

    def cut(self, x: Any, cut: StreamCut, name: str) -> Any:
        """This rank's tokens of a tensor, or of each of several; None stays None.

        Raises:
            ValueError: a tensor with another number of tokens than the call has.
        """
        if x is None:
            return None
        if isinstance(x, tuple | list):
            return type(x)(self.cut(one, cut, name) for one in x)
        if cut.per_token and (x.ndim < 2 or x.shape[cut.dim] == 1):
            return x
        flat = x.flatten(cut.dim) if cut.flattened else x
        whole = self.length(cut.stream)
        if flat.shape[cut.dim] != whole:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}, with {flat.shape[cut.dim]} entries for the {whole}"
                f" {cut.stream} tokens of this call; pass one for each token"
            )
        own = torch.cat(
            [flat.narrow(cut.dim, part.start, len(part)) for part in self._parts(cut.stream)], cut.dim
        )
        return own.reshape(*own.shape, *[1] * (x.ndim - own.ndim))

    def length(self, stream: Stream) -> int:
        """Tokens of a stream on all ranks."""
        text, image = self.tokens.text, self.tokens.image
        return {"text": text, "image": image, "joint": text + image}[stream]

    def _parts(self, stream: Stream) -> Sequence[range]:
        """Where this rank's tokens lie in the whole stream."""
        text, image = self.piece.text, self.piece.image
        if stream == "text":
            return [text]
        if stream == "image":
            return [image]
        if self.joint.text_first:
            return [text, _moved(image, self.tokens.text)]
        return [image, _moved(text, self.tokens.image)]

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, stream: Stream, scale: float | None, kernel: str
    ) -> Tensor:
        """Attention of (b, n, h, d) over all ranks' tokens of a stream.

        Raises:
            ValueError: masks for another number of samples than the batch has.
        """
        if stream == "image":
            return attention(q, k, v, self.image, scale=scale, kernel=kernel)
        if len(self.groups) == 1:
            return attention(q, k, v, self.groups[0].schedule, scale=scale, kernel=kernel)
        samples = [group.samples for group in self.groups]
        masked = sum(one.count(0) for one in samples)
        if masked != q.shape[0]:
            raise ValueError(
                f"masks of {masked} samples for a batch of {q.shape[0]}; pass one mask for each sample"
            )
        parts = [
            attention(*one.of(q, k, v), schedule, scale=scale, kernel=kernel) for one, schedule in self.groups
        ]
        return together(samples, parts)

    def gather(self, x: Tensor) -> Tensor:
        """Image tokens (b, n, c) of all ranks, (b, s, c), on every rank.

        In the backward each rank takes its own tokens' part of the gradient: all ranks compute the same loss
        from the whole image.
        """
        return self.image.unshard(x, 1)


def _groups(tokens: Tokens, joint: JointLayout, mesh: SequenceMesh) -> list[SampleGroup]:
    """Samples by their mask, in the order in which masks first occur."""
    rows = _seen(tokens, joint)
    if rows is None:
        return [SampleGroup(EVERY, Schedule.build(masks.full(joint.layout.s), mesh, joint.layout))]
    return [
        SampleGroup(samples, Schedule.build(masks.from_key_mask(row), mesh, joint.layout))
        for row, samples in by_mask(rows).items()
    ]


def _seen(tokens: Tokens, joint: JointLayout) -> Rows | None:
    """Which tokens of the joint sequence each sample's tokens see; None for all."""
    given = tokens.seen_text or tokens.seen_image
    if given is None:
        return None
    every = range(len(given))
    text = tokens.seen_text or tuple((True,) * tokens.text for _ in every)
    image = tokens.seen_image or tuple((True,) * tokens.image for _ in every)
    first, second = (text, image) if joint.text_first else (image, text)
    return tuple(left + right for left, right in zip(first, second, strict=True))


def _moved(piece: range, offset: int) -> range:
    return range(piece.start + offset, piece.stop + offset)
