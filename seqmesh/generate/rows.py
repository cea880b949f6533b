"""One layer's K and V of this rank's tokens, in storage order."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from seqmesh.engine.reshard import tokens_in_order
from seqmesh.generate.held import since
from seqmesh.generate.plan import CacheState, ForwardPlan

_SPARE = 8
"""A buffer has room for an eighth more rows than it needs, or holds an eighth more than can be seen."""


class HeldRows(CacheLayerMixin):  # type: ignore[misc]  # transformers has no types here
    """One layer's K and V of this rank's tokens: (b, g, rows, dim) with room for more behind."""

    is_sliding = False
    supports_early_init = False

    def __init__(self, state: CacheState) -> None:
        super().__init__()
        self._state = state
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.count = 0
        """Rows that are held."""
        self.first = 0
        """The first token, of all ranks', that is not dropped."""
        self.updated_in: ForwardPlan | None = None
        """The last forward that brought rows."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the first rows are kept as they come."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Keep this rank's of some new rows: all that it holds then, (b, g, rows, dim) twice.

        Raises:
            ValueError: the model has not been plugged in.
        """
        plan = self._state.plan
        if plan is None:
            raise ValueError(
                "a ShardedCache was given to a model that is not plugged in; call"
                " seqmesh.integrations.transformers.plug_in(model) first"
            )
        own = plan.kept_here
        self.keys = self._with(self.keys, key_states[:, :, own])
        self.values = self._with(self.values, value_states[:, :, own])
        self.count += key_states[:, :, own].shape[2]
        self.is_initialized = True
        self.updated_in = plan
        if not self.count:  # some models reshape what they get, which nothing at all does not bear; unseen
            return key_states[:, :, :1], value_states[:, :, :1]
        return self.keys[:, :, : self.count], self.values[:, :, : self.count]

    def _with(self, buffer: Tensor | None, new: Tensor) -> Tensor:
        """A buffer with some more rows in it: itself, if there is room."""
        if buffer is None:
            # A slice of q, k and v in one would keep all of them.
            is_slice = new.untyped_storage().nbytes() > new.nbytes
            return new.clone() if is_slice else new
        needed = self.count + new.shape[2]
        # Nothing is written into what was made in inference mode, outside of it.
        is_closed = buffer.is_inference() and not torch.is_inference_mode_enabled()
        if needed > buffer.shape[2] or is_closed:
            b, g, _, dim = buffer.shape
            larger = buffer.new_empty((b, g, needed + needed // _SPARE + 1, dim))
            larger[:, :, : self.count] = buffer[:, :, : self.count]
            buffer = larger
        buffer[:, :, self.count : needed] = new
        return buffer

    def check(self, layer: int) -> None:
        """Raise unless this forward has brought rows of this layer.

        Raises:
            ValueError: on every rank alike, it has not.
        """
        if self.updated_in is not self._state.plan:
            raise ValueError(
                f"layer {layer} did not put its K and V into the cache: it shares another's, or is of another"
                " kind, which a ShardedCache does not hold; use another model"
            )

    def drop(self, first: int, total: int) -> None:
        """Forget tokens before `first`, if they are an eighth of the others up to `total`."""
        if (first - self.first) * _SPARE < max(1, total - first):
            return
        plan = self._state.plan
        assert plan is not None
        assert self.keys is not None
        assert self.values is not None
        tokens = tokens_in_order(since(plan.own_after, self.first))
        stay = (tokens >= first).nonzero()[:, 0].to(self.keys.device)
        self.first = first
        self.keys = self.keys[:, :, : self.count].index_select(2, stay)
        self.values = self.values[:, :, : self.count].index_select(2, stay)
        self.count = stay.numel()

    def get_seq_length(self) -> int:
        """Tokens of the whole context, which positions count on from."""
        return self._state.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As many keys as queries, so that no mask is made: the forward has its own."""
        return query_length, 0

    def get_max_length(self) -> int:
        """-1: there is none."""
        return -1

    def reset(self) -> None:
        """Hold nothing."""
        self.keys = self.values = None
        self.count = self.first = 0
        self.is_initialized = False
        self.updated_in = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let sequences follow those beams."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep those sequences."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = (x[indices.to(x.device)] for x in (self.keys, self.values))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = (x.repeat_interleave(repeats, 0) for x in (self.keys, self.values))
