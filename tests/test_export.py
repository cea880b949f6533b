"""`seqmesh export`: what any mesh saved, as a model that plain transformers loads."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint_runs import BASE, SAVED, Trained, config_of, finished, trainer_of, undisturbed
from ranks import Ranks
from transformers import ByT5Tokenizer, LlamaForCausalLM

from seqmesh.parallel.gather import whole_weights
from seqmesh.train.config import Config
from seqmesh.train.export import export

MESH = config_of(pp=2, tp=2, dp_shard=2, zero=3, micro_batch=2)


def saved_weights(config: Config, run: Path) -> dict[str, torch.Tensor]:
    """Train and save; on rank 0, the weights that were saved, gathered by other code."""
    trainer = trainer_of(config)
    for _ in range(SAVED):
        trainer.step()
    trainer.save(run)
    trainer.saver.finish()
    return whole_weights(trainer.model)


def test_what_eight_ranks_saved_has_the_logits_of_the_trained_weights(ranks: Ranks, tmp_path: Path) -> None:
    weights = ranks.run(8, saved_weights, MESH, tmp_path)[0]
    out = export(tmp_path)
    assert out == tmp_path / "export" / f"step-{SAVED}"
    found = LlamaForCausalLM.from_pretrained(out)
    ids = torch.arange(3, 80)[None]
    expected = LlamaForCausalLM(found.config)
    expected.load_state_dict(weights)
    expected.set_attn_implementation(found.config._attn_implementation)
    assert torch.equal(found(ids).logits, expected.eval()(ids).logits)
    assert ByT5Tokenizer.from_pretrained(out)("fox").input_ids[-1] == 1


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    tied = replace(BASE, model=replace(BASE.model, tie_embeddings=True))
    trained: Trained = undisturbed(tied, tmp_path)
    export(tmp_path, tmp_path / "out")
    found = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert found.lm_head.weight is found.model.embed_tokens.weight
    assert found.lm_head.weight.shape == trained.weights["model.embed_tokens.weight"].shape


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "Missing argument 'FOLDER' (see seqmesh export --help)"),
        (["nowhere"], "'nowhere' is no folder; give the folder of a run"),
        (["."], "'.' has no complete checkpoint; give the folder of a run"),
        (["run", "taken"], "'taken' is not empty; choose a new folder"),
    ],
)
def test_wrong_input_is_one_line(
    tmp_path: Path,
    arguments: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from seqmesh.cli import main

    trainer = trainer_of(BASE)
    trainer.save(tmp_path / "run")
    trainer.saver.finish()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["seqmesh", "export", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    printed = capfd.readouterr()
    assert (stopped.value.code, printed.out) == (2, "")
    assert len(printed.err.splitlines()) == 1
    assert f"seqmesh: error: {said}" in printed.err


def test_the_command_prints_the_folder_that_it_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from seqmesh.cli import main

    trainer = trainer_of(BASE)
    trainer.save(tmp_path)
    trainer.saver.finish()
    monkeypatch.setattr(sys, "argv", ["seqmesh", "export", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0
    assert capfd.readouterr().out == f"{tmp_path}/export/step-0\n"
    assert finished(trainer).losses  # saving and exporting left it as it was
