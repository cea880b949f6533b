"""Hugging Face's `Trainer` over sequence shards: the model is plugged in, three methods are overridden.

    torchrun --nproc-per-node 4 examples/hugging_face_trainer.py --ulysses 2 --ring 2
    torchrun --nproc-per-node 4 examples/hugging_face_trainer.py --dp 2 --ring 2
    python examples/hugging_face_trainer.py                                     the same numbers on one rank

What must change, and why:

    get_train_dataloader     ranks of one sequence read the same batch; accelerate would deal them out
    _get_num_items_in_batch  labels are counted once a sequence, over data-parallel ranks
    compute_loss             the batch is sharded; DistributedDataParallel averages over all ranks, so the
                             rank's share of the loss is multiplied by their number

Trainer wraps the model in DistributedDataParallel by itself. For FSDP2, tensor and pipeline parallelism, and
for loops of your own, see plain_pytorch.py.
"""

import argparse
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DataLoader, Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from seqmesh import Schedule, SequenceMesh
from seqmesh.integrations.transformers import plug_in
from seqmesh.parallel import IGNORED_LABEL, PackedTokens, TokenBatch, pack
from seqmesh.train.loss import next_token_loss

VOCABULARY = 64
LENGTHS = [70, 9, 33, 17]


class RandomDocuments(Dataset[PackedTokens]):
    """Rows of packed documents."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> PackedTokens:
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(0, VOCABULARY, (1, sum(LENGTHS)), generator=generator)
        positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
        return pack(TokenBatch(input_ids=ids, position_ids=positions))  # labels are shifted here


class SequenceTrainer(Trainer):
    """A Trainer whose batches are spread over a sequence mesh."""

    loss_is_scaled_for_ga = True
    """The loss is over the labels of all micro-batches already: Trainer must not divide it once more."""

    def __init__(self, *, sequence: SequenceMesh, dp_rank: int, dp_size: int, **arguments: Any) -> None:
        self.sequence = sequence
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        super().__init__(**arguments)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Every dp_size-th batch: the same on all ranks of a sequence."""
        mine = range(self.dp_rank, len(self.train_dataset), self.dp_size)
        return DataLoader(
            self.train_dataset, batch_size=1, sampler=mine, collate_fn=lambda rows: {"row": rows[0]}
        )

    def _get_num_items_in_batch(
        self, batch_samples: list[dict[str, PackedTokens]], device: torch.device
    ) -> Tensor:
        count = sum(int((sample["row"].shift_labels != IGNORED_LABEL).sum()) for sample in batch_samples)
        total = torch.tensor(count, device=device)
        if dist.is_initialized():
            dist.all_reduce(total)  # every rank of a sequence counts all of its labels
        return total // self.sequence.size

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, PackedTokens],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """This rank's share of the mean over all labels, times the ranks that are averaged over."""
        row = inputs["row"]
        schedule = Schedule.build(row.mask, self.sequence)
        out = model(
            input_ids=schedule.shard(row.input_ids, 1),
            position_ids=schedule.shard(row.position_ids, 1),
            schedule=schedule,
        )
        share = next_token_loss(out.logits, schedule.shard(row.shift_labels, 1), int(num_items_in_batch))
        found = share * self.args.world_size
        return (found, out) if return_outputs else found


def settings(micro_batches: int) -> TrainingArguments:
    """What Trainer is told, beside the usual."""
    return TrainingArguments(
        output_dir="hugging_face_trainer",
        use_cpu=True,
        max_steps=3,
        gradient_accumulation_steps=micro_batches,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        remove_unused_columns=False,  # batches are objects, not dictionaries of tensors
        average_tokens_across_devices=False,  # _get_num_items_in_batch does it
        disable_tqdm=True,
    )


def tiny_llama() -> LlamaForCausalLM:
    """The same on every rank."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


def main() -> None:
    """Train a tiny Llama for a few steps."""
    parser = argparse.ArgumentParser()
    for degree in ("dp", "ring", "ulysses"):
        parser.add_argument(f"--{degree}", type=int, default=1)
    given = parser.parse_args()
    arguments = settings(micro_batches=2 // given.dp)
    if "RANK" in os.environ:  # TrainingArguments has set up the process group
        degrees = (given.dp, given.ring, given.ulysses)
        mesh = init_device_mesh("cpu", degrees, mesh_dim_names=("dp", "ring", "ulysses"))
        sequence, dp_rank = SequenceMesh.from_device_mesh(mesh), mesh.get_local_rank("dp")
    else:
        sequence, dp_rank = SequenceMesh.build(), 0
    trainer = SequenceTrainer(
        model=plug_in(tiny_llama()),
        args=arguments,
        train_dataset=RandomDocuments(),
        sequence=sequence,
        dp_rank=dp_rank,
        dp_size=given.dp,
    )
    trainer.train()
    if trainer.is_world_process_zero():
        for entry in trainer.state.log_history:
            if "loss" in entry:
                print(f"step {entry['step']}  gradient norm {float(entry['grad_norm']):.6f}")


if __name__ == "__main__":
    main()
