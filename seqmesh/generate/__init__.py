"""Running language models on contexts that no rank holds: a K/V cache spread over a mesh (docs/generate.md).

model = plug_in(AutoModelForCausalLM.from_pretrained(folder))
cache = ShardedCache(SequenceMesh.build(ulysses=2, ring=2), model.config)
model.generate(ids, past_key_values=cache)                            the same call on every rank
"""

from seqmesh.generate.cache import ShardedCache

__all__ = ["ShardedCache"]
