"""An own training loop in plain PyTorch, on any mesh.

    python examples/plain_pytorch.py                                             one rank
    torchrun --nproc-per-node 4 examples/plain_pytorch.py --ulysses 2 --ring 2   the same numbers
    torchrun --nproc-per-node 8 examples/plain_pytorch.py --dp 2 --ring 2 --tp 2 two rows of documents a step

Three calls: `parallelize` the model, `shard_batch` every batch, and the loss. The data set is made of random
tokens; put yours in `documents_of`.
"""

import argparse
import os
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from seqmesh.parallel import ParallelDims, TokenBatch, loss, parallelize, shard_batch

VOCABULARY = 64
LENGTHS = [70, 9, 33, 17]
"""Tokens of the documents that are packed into one row: any lengths."""


def documents_of(step: int, dp_rank: int) -> tuple[Tensor, Tensor]:
    """Token ids and positions of a row of packed documents, (1, s) each."""
    generator = torch.Generator().manual_seed(1000 * step + dp_rank)
    ids = torch.randint(0, VOCABULARY, (1, sum(LENGTHS)), generator=generator)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    return ids, positions


def main() -> None:
    """Train a tiny Llama for a few steps."""
    arguments = argparse.ArgumentParser()
    for degree in ("dp", "ring", "ulysses", "tp"):
        arguments.add_argument(f"--{degree}", type=int, default=1)
    given = arguments.parse_args()
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    mesh = ParallelDims(dp_shard=given.dp, ring=given.ring, ulysses=given.ulysses, tp=given.tp).build()

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = parallelize(LlamaForCausalLM(config), mesh)
    optimizer = model.optimizer(partial(torch.optim.AdamW, lr=1e-3))

    for step in range(3):
        ids, positions = documents_of(step, mesh.rank("dp_shard"))
        batch = shard_batch(TokenBatch(input_ids=ids, position_ids=positions), mesh)
        share = loss(model, batch)  # of this rank: the loss is the sum over ranks
        share.backward()
        model.finish_gradients()
        norm = model.clip(1.0)
        optimizer.step()
        optimizer.zero_grad()
        total = model.total_loss(share)
        if not dist.is_initialized() or dist.get_rank() == 0:
            print(f"step {step}  loss {total:.6f}  gradient norm {norm:.6f}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
