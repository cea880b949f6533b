"""Tokens that were made once: kept, found again, made anew where something changed; and the tokenizers."""

import json
import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from tiny_tokenizer import END, save_tokenizer

from seqmesh.train import data
from seqmesh.train.data import Corpus, Piece, tokenizer_of
from seqmesh.train.data import sources as sources_module
from seqmesh.train.data.tokens import TokenIds, narrowest


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": f"the fox {n} " * n}) + "\n" for n in range(1, 30)))
    return file


def read(text: Path, **settings: Any) -> Corpus:
    return data.read(str(text), cache=str(text.parent / "kept"), **settings)


def folders(text: Path) -> list[str]:
    """What is kept, locks apart."""
    return sorted(path.name for path in (text.parent / "kept").iterdir() if path.suffix != ".lock")


def refuse_to_read(*_: object) -> Iterator[str]:
    raise AssertionError("the text was read again")
    yield ""


def test_a_second_run_reads_no_text(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = read(text)
    monkeypatch.setattr(sources_module.JsonLines, "texts", refuse_to_read)
    second = read(text)
    assert second.fingerprint == first.fingerprint
    assert [one[:] for one in second.documents] == [one[:] for one in first.documents]
    assert len(folders(text)) == 1


def test_another_column_tokenizer_or_file_makes_others(text: Path, tmp_path: Path) -> None:
    before = read(text)
    tokenized = read(text, tokenizer=str(save_tokenizer(tmp_path / "one")))
    other = read(text, tokenizer=str(save_tokenizer(tmp_path / "two", text="fox fox fox " * 9)))
    with text.open("a") as file:
        file.write('{"text": "more"}\n')
    after = read(text)
    assert len({one.fingerprint for one in (before, tokenized, other, after)}) == 4
    assert len(folders(text)) == 4
    assert len(after.documents) == len(before.documents) + 1


def test_equal_tokens_of_unequal_tokenizers_are_told_apart(text: Path, tmp_path: Path) -> None:
    """Their ids mean the same here, but not in a text that is to come."""
    one = read(text, tokenizer=str(save_tokenizer(tmp_path / "one")))
    other = save_tokenizer(tmp_path / "two")
    rules = json.loads((other / "tokenizer.json").read_text())
    rules["model"]["merges"].pop()
    (other / "tokenizer.json").write_text(json.dumps(rules))
    assert read(text, tokenizer=str(other)).fingerprint != one.fingerprint


def test_what_a_killed_process_left_is_made_anew(text: Path) -> None:
    read(text)
    (name,) = folders(text)
    kept = text.parent / "kept"
    (kept / name).rename(kept / f"{name}.tmp")
    (kept / f"{name}.tmp" / "stops.bin").write_bytes(b"half")
    assert len(read(text).documents) == 29
    assert folders(text) == [name]


@pytest.mark.parametrize("file", ["tokens.bin", "stops.bin", "index.json"])
def test_a_folder_that_was_damaged_is_refused(text: Path, file: str) -> None:
    read(text)
    (name,) = folders(text)
    damaged = text.parent / "kept" / name / file
    damaged.write_bytes(damaged.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"does not hold what was written there; remove it to make it anew$"):
        read(text)


def test_a_folder_that_cannot_be_written_is_refused(text: Path) -> None:
    (text.parent / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot keep tokens in '.*': File exists; name another folder"):
        data.read(str(text), cache=str(text.parent / "file"))
    with pytest.raises(ValueError, match=r"write data\.cache in full"):
        data.read(str(text), cache="~nosuchuser/x")


def test_without_a_name_they_are_kept_in_the_users_cache(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    data.read(str(text))
    assert (tmp_path / "xdg" / "seqmesh" / "tokens").is_dir()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    data.read(str(text))
    assert (tmp_path / "home" / ".cache" / "seqmesh" / "tokens").is_dir()


def _read_and_count(text: str, cache: str, made: Any) -> None:
    own = sources_module.JsonLines.texts

    def counted(self: Any) -> Iterator[str]:
        with made.get_lock():
            made.value += 1
        yield from own(self)

    sources_module.JsonLines.texts = counted  # type: ignore[method-assign]
    assert len(data.read(text, cache=cache).documents) == 29


def test_of_processes_that_start_at_once_one_makes_them(text: Path) -> None:
    context = multiprocessing.get_context("fork")
    made = context.Value("i", 0)
    arguments = (str(text), str(text.parent / "kept"), made)
    processes = [context.Process(target=_read_and_count, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(folders(text)) == 1
    assert made.value == 1


def test_batches_for_the_tokenizer_change_nothing(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = read(text)
    monkeypatch.setattr(sources_module, "_BATCH_CHARACTERS", 50)
    again = data.read(str(text), cache=str(text.parent / "again"))
    assert [one[:] for one in again.documents] == [one[:] for one in whole.documents]


@pytest.mark.parametrize(("size", "width"), [(256, 1), (257, 2), (65536, 2), (65537, 4), (128256, 4)])
def test_tokens_are_as_wide_as_they_need_to_be(size: int, width: int) -> None:
    assert narrowest(size) == width
    ids = TokenIds(size=size, end=0, width=width)
    stored = ids.store([0, size - 1, 1])
    assert len(stored) == 3 * width
    assert ids.ids(stored).tolist() == [0, size - 1, 1]


def test_wide_tokens_are_cut_at_tokens(tmp_path: Path, text: Path) -> None:
    corpus = read(text, tokenizer=str(save_tokenizer(tmp_path / "tokenizer")))
    assert corpus.vocabulary.width == 2
    length = int(corpus.lengths[7])
    whole = corpus.ids(Piece(7, 0, length)).tolist()
    assert corpus.ids(Piece(7, 3, length - 2)).tolist() == whole[3:-2]
    assert whole[-1] == corpus.vocabulary.end
    assert np.array(whole[:-1]).max() < corpus.vocabulary.size


def test_text_that_spells_out_a_special_token_stays_text(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(str(save_tokenizer(tmp_path / "tokenizer")))
    (stored,) = tokenizer.encode([f"a{END}b"])
    found = tokenizer.vocabulary.ids(stored).tolist()
    assert tokenizer.vocabulary.end not in found
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert loaded.decode(found) == f"a{END}b"


WRONG_TOKENIZERS = [
    ("gpt2", "data.tokenizer='gpt2' is no folder; nothing is downloaded"),
    ("empty", "data.tokenizer='empty' holds no tokenizer that transformers can load"),
    ("endless", "data.tokenizer='endless' has no token that ends a document; name one as eos_token"),
    ("slow", "data.tokenizer='slow' is a ByT5Tokenizer, which runs in Python"),
    ("~nosuchuser/x", "is no folder"),
]


@pytest.mark.parametrize(("folder", "said"), WRONG_TOKENIZERS, ids=[name for name, _ in WRONG_TOKENIZERS])
def test_a_tokenizer_that_cannot_be_used_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, said: str
) -> None:
    (tmp_path / "empty").mkdir()
    save_tokenizer(tmp_path / "endless", end=None)
    transformers.ByT5Tokenizer().save_pretrained(tmp_path / "slow")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=said) as error:
        tokenizer_of(folder)
    assert "\n" not in str(error.value)
