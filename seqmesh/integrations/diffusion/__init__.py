"""Diffusion transformers of diffusers on sequence shards; `seqmesh.integrations.diffusers` is the door.

plan.py        what must be known of a model: the words of the table
models.py      the table: one entry a model
tokens.py      how many tokens a call has, and which of them are padding
shards.py      a forward's tokens on this rank: cut, attend, gather
attend.py      diffusers' attention, answered by seqmesh
agree.py       whether all ranks got the same call
refusals.py    what is refused, and what to do instead
plugged.py     a model with all of it put in: hooks, and their removal
"""
