"""Models with windows, chunks, few K/V heads and experts, from folders: on 8 ranks what they are on one.

One rank is compared with plain transformers, each document by itself; 8 ranks of some mixes of the covering
design (test_train_mixes.py) with one rank, and every byte of attention with what the schedules say. Packed
documents, accumulation, lengths that divide nothing.
"""

import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from meshes import mesh_of
from model_folders import WINDOW, save_config, save_model
from ranks import Ranks
from test_train_mixes import BASE, RANKS, TEXT, trained
from torch import Tensor
from torch.nn import functional as F
from train_command import seqmesh_command
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from seqmesh.parallel import ParallelDims
from seqmesh.parallel.gather import whole_weights
from seqmesh.train import folder as model_folder
from seqmesh.train import setup, step_folders
from seqmesh.train.checkpoint import Checkpoint
from seqmesh.train.config import Config, MeshConfig, ModelConfig
from seqmesh.train.data import lengths_of, sequences
from seqmesh.train.export import export
from seqmesh.train.model import build_hollow, sizes_of
from seqmesh.train.resume import check_same_model
from seqmesh.train.setup import dims_of
from seqmesh.train.trainer import Trainer

BALANCE = 0.3
Outcome = tuple[list[float], list[float], dict[str, Tensor]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of each kind, some with weights."""
    home = tmp_path_factory.mktemp("models")
    for kind in ("qwen3", "gemma2", "mixtral", "gpt_oss"):
        save_model(kind, home / kind)
    for kind in ("mistral", "llama4_text", "qwen3_moe", "qwen3_next", "olmo_hybrid", "bamba", "lfm2"):
        save_config(kind, home / kind)
    return home


def config_of(folder: str, **settings: Any) -> Config:
    mesh = {key: value for key, value in settings.items() if hasattr(MeshConfig(), key)}
    train = {key: value for key, value in settings.items() if key not in mesh}
    return replace(
        BASE,
        mesh=MeshConfig(**({"ring": 1, "ulysses": 1} | mesh)),
        model=ModelConfig(folder=folder),
        train=replace(BASE.train, **train),
    )


@cache
def on_one_rank(folder: str, micro_batch: int, balance: float) -> Outcome:
    """With balance, a loss depends on which sequences a micro-batch has: as many, in as many steps."""
    return trained(config_of(folder, micro_batch=micro_batch, balance=balance))


class Mix(NamedTuple):
    """A model and how it is trained."""

    kind: str
    settings: dict[str, Any]


MIXES = [
    Mix("qwen3", {"dp_shard": 2, "ring": 2, "tp": 2, "zero": 3, "micro_batch": 2, "shard_norms": True}),
    Mix("qwen3", {"pp": 2, "ring": 2, "ulysses": 2, "micro_batch": 2, "zero": 1, "pipeline": "interleaved"}),
    Mix(
        "mistral", {"dp_shard": 2, "ring": 2, "ulysses": 2, "pool": True, "zero": 2, "checkpointing": "full"}
    ),
    Mix("mistral", {"pp": 2, "dp_replicate": 2, "tp": 2, "micro_batch": 1, "pipeline": "zero-bubble"}),
    Mix("gemma2", {"dp_replicate": 2, "ring": 2, "ulysses": 2, "zero": 3, "checkpointing": "selective"}),
    Mix("gemma2", {"dp_shard": 2, "ring": 4, "micro_batch": 2, "zero": 1, "layout": "zigzag"}),
    Mix("gemma2", {"pp": 2, "ring": 2, "tp": 2, "micro_batch": 1, "zero": 2}),
    Mix("gpt_oss", {"ring": 4, "ulysses": 2, "micro_batch": 4, "zero": 3, "experts": 4, "layout": "striped"}),
    Mix("llama4_text", {"dp_shard": 2, "ring": 2, "ulysses": 2, "zero": 3, "checkpointing": "full"}),
    Mix("mixtral", {"dp_shard": 2, "ring": 2, "ulysses": 2, "zero": 3, "experts": 4, "balance": BALANCE}),
    Mix("mixtral", {"dp_replicate": 2, "ring": 4, "zero": 2, "experts": 2, "micro_batch": 2}),
    Mix("mixtral", {"dp_shard": 2, "ring": 4, "zero": 1, "balance": BALANCE, "micro_batch": 2}),
    Mix(
        "qwen3_next",
        {
            **{"dp_shard": 2, "ring": 2, "ulysses": 2, "zero": 3, "experts": 2, "layout": "zigzag"},
            "balance": BALANCE,
        },
    ),
    Mix("qwen3_next", {"ring": 2, "ulysses": 2, "tp": 2, "zero": 3, "experts": 2, "micro_batch": 4}),
    Mix("olmo_hybrid", {"pp": 2, "ring": 2, "tp": 2, "micro_batch": 4, "checkpointing": "selective"}),
    Mix("bamba", {"ring": 4, "ulysses": 2, "zero": 2, "checkpointing": "full", "micro_batch": 4}),
    Mix("lfm2", {"dp_replicate": 2, "ring": 4, "zero": 3, "checkpointing": "selective"}),
    Mix("mixtral", {"dp_shard": 2, "ring": 2, "tp": 2, "zero": 3, "experts": 4, "balance": BALANCE}),
    Mix(
        "qwen3_moe",
        {"ring": 2, "ulysses": 2, "tp": 2, "zero": 2, "experts": 2, "micro_batch": 2, "shard_norms": True},
    ),
    Mix("qwen3_moe", {"pp": 2, "dp_shard": 2, "ulysses": 2, "zero": 2, "experts": 2, "micro_batch": 1}),
]


@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: f"{mix.kind} {mix.settings}")
def test_a_model_of_a_folder_trains_on_a_mix_as_on_one_rank(ranks: Ranks, folders: Path, mix: Mix) -> None:
    config = config_of(str(folders / mix.kind), **mix.settings)
    setup.check(config)
    balance = config.train.balance
    losses, norms, weights = on_one_rank(config.model.folder, config.micro_batch if balance else 0, balance)
    found = ranks.run(RANKS, trained, config)  # which asserts that bytes are those of the schedules
    for found_losses, found_norms, _ in found:
        assert found_losses == pytest.approx(losses, rel=1e-6)
        assert found_norms == pytest.approx(norms, rel=2e-5)
        assert found_norms == found[0][1]
    assert found[0][2].keys() == weights.keys()
    for name, weight in found[0][2].items():
        # As in test_train_mixes.py: AdamW divides a gradient by its own size.
        assert (weight - weights[name]).norm() <= 1e-4 * weights[name].norm(), name


def loss_of_plain_transformers(model: PreTrainedModel, lengths: list[int], ids: Tensor) -> Tensor:
    """Mean cross entropy of documents, each of which goes through the model by itself."""
    total, labels = torch.zeros(()), 0
    for document in ids.split(lengths):
        logits = model(document[None], use_cache=False).logits[0, :-1].float()
        total = total + F.cross_entropy(logits, document[1:], reduction="sum")
        labels += len(document) - 1
    return total / labels


@pytest.mark.parametrize("kind", ["qwen3", "gemma2", "mistral", "llama4_text", "gpt_oss", "qwen3_moe"])
def test_one_rank_trains_what_plain_transformers_computes_of_each_document(folders: Path, kind: str) -> None:
    config = config_of(str(folders / kind), zero=0)
    trainer = Trainer(config, TEXT, ParallelDims().build(), peak_flops_per_s=1.0)
    start = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    plain = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(folders / kind), attn_implementation="eager", dtype=torch.float32
    )
    plain.load_state_dict(start)
    stream = sequences(TEXT, seq_len=config.data.seq_len, seed=config.train.seed)
    pieces = [piece for _ in range(config.data.sequences) for piece in next(stream)]
    ids = torch.cat([TEXT.ids(piece) for piece in pieces])
    wanted = loss_of_plain_transformers(plain.train(), lengths_of(pieces), ids)
    wanted.backward()
    norm = torch.stack([p.grad.norm() for p in plain.parameters() if p.grad is not None]).norm().item()
    step = trainer.step()
    assert step.loss == pytest.approx(wanted.item(), rel=1e-6)
    assert step.grad_norm == pytest.approx(norm, rel=1e-5)
    longest = max(lengths_of(pieces))
    assert longest > WINDOW  # a window, a chunk, and what lies beyond them


def started_from(config: Config) -> dict[str, Tensor]:
    return whole_weights(setup.build(config, mesh_of(dims_of(config.mesh)), build_hollow(config)))


@pytest.mark.parametrize("kind", ["gemma2", "mixtral", "gpt_oss"])
def test_training_starts_from_the_folders_weights(ranks: Ranks, folders: Path, kind: str) -> None:
    """By names that are the model's own, and by those of experts by themselves (mixtral)."""
    config = config_of(str(folders / kind), ring=2, dp_shard=2, zero=3)
    weights = ranks.run(4, started_from, config)[0]
    plain = AutoModelForCausalLM.from_pretrained(folders / kind, dtype=torch.float32)
    assert weights.keys() == dict(plain.named_parameters()).keys()
    for name, weight in weights.items():
        assert torch.equal(weight, plain.get_parameter(name)), name


def test_a_folder_without_weights_starts_from_the_seeds(folders: Path) -> None:
    config = config_of(str(folders / "mistral"))
    other = replace(config, train=replace(config.train, seed=5))
    first, again, another = (started_from(one)["lm_head.weight"] for one in (config, config, other))
    assert torch.equal(first, again)
    assert not torch.equal(first, another)


def test_experts_that_a_token_is_not_routed_to_are_not_counted(folders: Path) -> None:
    sizes = sizes_of(config_of(str(folders / "mixtral")))
    experts = 4 * 4 * 3 * 32 * 48  # layers, experts, matrices
    attention = 4 * (2 * 32 * 32 + 2 * 8 * 32)
    routers, head, norms = 4 * 4 * 32, 260 * 32, 9 * 32
    assert sizes.matmul_parameters == attention + routers + head + experts // 2
    assert sizes.parameters == attention + routers + 2 * head + experts + norms
    assert sizes.experts == 4


def test_flops_of_attention_are_those_of_each_kind_of_layer(folders: Path) -> None:
    sizes = sizes_of(config_of(str(folders / "gemma2")))
    lengths = [50, 7]
    full = 50 * 51 // 2 + 28
    sliding = sum(min(row + 1, WINDOW) for row in range(50)) + 28
    assert sizes.attention_work(lengths) == 2 * (full + sliding) * 8 * (8 + 8)
    assert sizes.area(lengths) == round((full + sliding) / 2)
    assert sizes.noncausal_work(3, 100) == 4 * 3 * 100**2 * 8 * 16
    assert sizes.step_flops(10, 7) == 6.0 * sizes.matmul_parameters * 10 + 42.0


REFUSED: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("mixtral", {"tp": 2}, {}, "experts.gate_up_proj has two matrices in one"),
    ("mixtral", {"experts": 3, "ring": 3, "zero": 3}, {}, "mesh.experts=3 does not divide the 4 experts"),
    ("qwen3", {"experts": 2, "dp_shard": 2, "zero": 3}, {}, "which has no experts"),
    ("qwen3", {"balance": 0.1}, {}, "which has no experts"),
    ("qwen3", {"ulysses": 16}, {}, "num_attention_heads=8 of model.folder"),
    ("qwen3", {"tp": 3}, {}, "mesh.tp=3 does not divide num_attention_heads=8 of model.folder"),
    ("qwen3", {"pp": 8, "micro_batch": 1}, {}, "num_hidden_layers=4 of model.folder"),
    (
        "qwen3",
        {"pp": 2, "micro_batch": 1},
        {"tie_word_embeddings": True},
        "tie_word_embeddings=True of",
    ),
    ("granite", {"pp": 2, "micro_batch": 1}, {}, "changes hidden states outside its layers"),
    ("gpt_oss", {"tp": 2}, {}, "tp=2 with GptOssForCausalLM, for whose layers transformers has no plan"),
    ("qwen3", {}, {"vocab_size": 200}, "vocab_size=200 of model.folder"),
    ("qwen3", {}, {"attention_dropout": 0.1}, "attention of layer 0"),
    ("mixtral", {}, {"router_jitter_noise": 0.1}, "router_jitter_noise"),
    ("mixtral", {}, {"output_router_logits": True}, "set output_router_logits=False"),
    ("gemma2", {}, {"sliding_window": None}, "has layers of type sliding_attention, and no size of it"),
]


@pytest.mark.parametrize(("kind", "settings", "changed", "said"), REFUSED)
def test_what_a_folder_cannot_train_is_refused_before_a_rank_starts(
    tmp_path: Path, kind: str, settings: dict[str, Any], changed: dict[str, Any], said: str
) -> None:
    folder = save_config(kind, tmp_path / "model", **changed)
    with pytest.raises(ValueError, match=re.escape(said)) as refused:
        setup.check(config_of(folder, **settings))
    assert "\n" not in str(refused.value)


def test_folders_without_a_model_and_weights_that_lack_some_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no folder"):
        setup.check(config_of(str(tmp_path / "nowhere")))
    with pytest.raises(ValueError, match=r"has no config\.json"):
        setup.check(config_of(str(tmp_path)))
    (tmp_path / "config.json").write_text('{"model_type": "nonesuch"}')
    with pytest.raises(ValueError, match="is no causal language model of transformers"):
        setup.check(config_of(str(tmp_path)))
    save_model("qwen3", tmp_path / "less")
    min((tmp_path / "less").glob("*.safetensors")).unlink()
    with pytest.raises(ValueError, match="cannot be read"):
        setup.check(config_of(str(tmp_path / "less")))
    save_config("qwen3", tmp_path / "other")
    (tmp_path / "other" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"has pytorch_model.bin, and weights are read from"):
        setup.check(config_of(str(tmp_path / "other")))


def test_sizes_beside_a_folder_and_experts_without_sharding_are_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.hidden=64 beside model\.folder='x'"):
        ModelConfig(folder="x", hidden=64)
    with pytest.raises(ValueError, match=r"mesh\.experts=2 with train\.zero=0"):
        config_of("x", experts=2, dp_shard=2)
    with pytest.raises(ValueError, match=r"train\.balance=0\.5 with mesh\.pp=2"):
        config_of("x", balance=0.5, pp=2, micro_batch=1)
    with pytest.raises(ValueError, match=r"mesh\.experts=3 over dp_shard x ring x ulysses x tp = 2 ranks"):
        config_of("x", experts=3, dp_shard=2, zero=3)
    with pytest.raises(ValueError, match=r"with mesh\.tp=4; use a degree that divides them, and a multiple"):
        config_of("x", experts=2, tp=4, zero=3)
    with pytest.raises(ValueError, match=r"train\.balance=0\.5 with train\.shard_norms"):
        config_of("x", balance=0.5, tp=2, shard_norms=True)


def test_a_window_is_that_of_an_architecture_which_has_one() -> None:
    def kinds(architecture: str, window: int) -> tuple[int, int]:
        model = replace(BASE.model, architecture=architecture, window=window)
        found = sizes_of(replace(BASE, model=model)).kinds
        return found.full, found.sliding

    assert kinds("mistral", 9) == kinds("qwen2", 9) == (0, 4)
    assert kinds("mistral", 0) == kinds("qwen2", 0) == (4, 0)
    with pytest.raises(ValueError, match="whose layers have no sliding window"):
        kinds("llama", 9)
    for window in (0, 9):
        with pytest.raises(ValueError, match="has sliding windows, or chunks, in some of its layers"):
            kinds("gemma2", window)


def saved_and_resumed(config: Config, other: Config, run: Path) -> tuple[list[float], list[float]]:
    """The third step, of one trainer without a break and of another that resumes on another mesh."""
    trainer = Trainer(config, TEXT, mesh_of(dims_of(config.mesh)), peak_flops_per_s=1.0)
    for _ in range(2):
        trainer.step()
    trainer.save(run)
    trainer.saver.finish()
    after = trainer.step()
    another = Trainer(other, TEXT, mesh_of(dims_of(other.mesh)), peak_flops_per_s=1.0)
    another.resume(Checkpoint(step_folders.newest(run)))
    again = another.step()
    return [after.loss, after.grad_norm], [again.loss, again.grad_norm]


@pytest.mark.parametrize("tp", [1, 2])
def test_spread_experts_are_resumed_on_another_mesh_and_exported(
    ranks: Ranks, folders: Path, tmp_path: Path, tp: int
) -> None:
    folder = str(folders / "mixtral")
    config = config_of(folder, dp_shard=2, ring=2 // tp, tp=tp, zero=3, experts=4)
    other = config_of(folder, ring=2, ulysses=2, zero=2, experts=2, micro_batch=4)
    model_folder.copy(folder, tmp_path)
    after, again = ranks.run(4, saved_and_resumed, config, other, tmp_path)[0]
    assert again == pytest.approx(after, rel=2e-5)
    plain = AutoModelForCausalLM.from_pretrained(export(tmp_path), dtype=torch.float32)
    weights: dict[str, Tensor] = {
        f"model.{name}": torch.empty_like(p) for name, p in plain.named_parameters()
    }
    Checkpoint(step_folders.newest(tmp_path)).read_into(weights)
    for name, weight in plain.named_parameters():
        assert torch.equal(weight, weights[f"model.{name}"]), name
    assert plain.config.num_local_experts == 4


def test_a_run_is_resumed_with_the_model_that_it_kept(folders: Path, tmp_path: Path) -> None:
    qwen, run = str(folders / "qwen3"), tmp_path / "run"
    run.mkdir()
    model_folder.copy(qwen, run)
    check_same_model(config_of(qwen), run)
    changed = save_config("qwen3", tmp_path / "changed", rms_norm_eps=1e-3)
    for other in (config_of(changed), BASE):
        with pytest.raises(ValueError, match=r"was trained with the config\.json in"):
            check_same_model(other, run)
    with pytest.raises(ValueError, match=r"was trained with the keys of \[model\] alone"):
        check_same_model(config_of(qwen), tmp_path)
    assert model_folder.described(qwen) != model_folder.described(changed)


def losses_of(config: Config, steps: int) -> list[float]:
    trainer = Trainer(config, TEXT, mesh_of(dims_of(config.mesh)), peak_flops_per_s=1.0)
    found = [trainer.step() for _ in range(steps)]
    assert all(step.bytes_agree for step in found)
    return [step.loss for step in found]


def test_a_hybrid_trains_a_hundred_steps_on_four_ranks_as_on_one(ranks: Ranks, tmp_path: Path) -> None:
    """Rounding grows with the steps: what it comes to in a hundred is small beside what they learn."""
    types = ["linear_attention", "full_attention"]
    folder = save_config("olmo_hybrid", tmp_path, num_hidden_layers=2, layer_types=types)
    config = config_of(folder, ring=2, ulysses=2, layout="zigzag")
    config = replace(
        config,
        data=replace(config.data, seq_len=64, sequences=1),
        train=replace(config.train, steps=100, warmup=5, lr=3e-3),
    )
    alone = losses_of(replace(config, mesh=MeshConfig(ring=1, ulysses=1)), 100)
    assert alone[-1] < alone[0] - 1.0
    for losses in ranks.run(4, losses_of, config, 100):
        assert losses == pytest.approx(alone, rel=2e-3)
        assert losses[:10] == pytest.approx(alone[:10], rel=1e-5)


def test_a_dry_run_of_a_hybrid_says_what_its_states_take(tmp_path: Path) -> None:
    folder = save_config("olmo_hybrid", tmp_path / "model")
    recipe = tmp_path / "hybrid.toml"
    recipe.write_text(f'[model]\nfolder = "{folder}"\n[data]\nseq_len = 256\n[train]\nsteps = 1\n')
    done = seqmesh_command("train", str(recipe), "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"sequence +states of layers that carry one +\d", done.stdout)
