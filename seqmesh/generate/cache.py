"""A K/V cache spread over a mesh: context grows with the number of ranks. Start reading here.

    prompt, 2 tokens a rank or more      sharded: every rank computes its tokens and keeps their K and V
      on an empty cache                  seqmesh.attention on the mesh, as in training
      on a filled one                    keys move to queries or queries to keys, whichever is fewer bytes
    new tokens, fewer than that          computed on every rank; each keeps some of their K and V
                                         a part of attention on every rank, one exchange a layer, a merge

`generate` calls the model as ever, the same on every rank; `plug_in` has put hooks on it that let the cache
shard a prompt before the model runs, and gather afterwards the last hidden states for the logits. Those are
bitwise equal on all ranks, so that all ranks choose the same token, sampled ones if their seeds agree.

What a layer can see no more (windows, chunks) is dropped when it is an eighth of what stays.
"""

from typing import Any

from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from seqmesh.engine.mesh import SequenceMesh
from seqmesh.generate.forward import ShardedForward
from seqmesh.generate.inputs import check_agreement, check_inputs, groups_of, sharded_inputs
from seqmesh.generate.plan import CacheState, ForwardPlan
from seqmesh.generate.rows import HeldRows
from seqmesh.integrations.cached import SequenceCache


class ShardedCache(Cache, SequenceCache):  # type: ignore[misc]  # transformers has no types here
    """A cache for `model.generate(ids, past_key_values=cache)`, the same call on every rank of a mesh.

    The model has been plugged in. Prompts may be of different lengths (left padding and its attention mask),
    come in several turns, and in chunks (`prefill_chunk_size`). Without gradients only.
    """

    def __init__(self, mesh: SequenceMesh, config: PreTrainedConfig) -> None:
        """An empty cache. A collective over the mesh, if both of its degrees are above 1.

        Args:
            mesh: the ranks over which tokens are spread.
            config: of the model.

        Raises:
            ValueError: a model whose layers share keys and values.
        """
        text = config.get_text_config(decoder=True)
        if getattr(text, "num_kv_shared_layers", 0):
            raise ValueError(
                f"{type(text).__name__} has num_kv_shared_layers={text.num_kv_shared_layers}: layers without"
                " K and V of their own, which a ShardedCache does not hold; use another model"
            )
        self._config = config
        self.state = CacheState(mesh=mesh, ring=mesh.as_ring)
        super().__init__(layers=[HeldRows(self.state) for _ in range(text.num_hidden_layers)])

    def begin(self, call: str, given: dict[str, Any]) -> dict[str, Any]:
        """Shard a forward's tokens, or leave them as they are if they are few.

        Raises:
            ValueError: what cannot be honoured, on every rank alike if all made the same call; different
                calls.
        """
        state = self.state
        if state.plan is not None:
            raise ValueError(
                f"{call}: the forward before this one did not finish, so layers of the cache hold different"
                " tokens; make a new ShardedCache, or reset() it"
            )
        tokens = check_inputs(call, given, self._config, state.seen, self.layers[0].keys)
        plan = ForwardPlan.of(state.mesh, state.held, state.seen, tokens)
        groups, keep = groups_of(given.get("attention_mask")), given.get("logits_to_keep") or 0
        forward = ShardedForward(state, plan, self.layers, groups, logits_to_keep=min(keep, tokens))
        check_agreement(call, given, forward)
        inputs = sharded_inputs(given, forward)
        state.plan = plan
        return inputs

    def reset(self) -> None:
        """Empty the cache, for another prompt."""
        for rows in self.layers:
            rows.reset()
        self.state.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: tokens stay.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"crop({tokens_to_remove}) of a ShardedCache: tokens cannot be taken back from all ranks;"
            " generate without an assistant model or prompt lookup"
        )
