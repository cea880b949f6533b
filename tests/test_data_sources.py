"""Every source of a text: the same documents from each, read when they are needed, and errors in one line."""

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_tokenizer import save_tokenizer
from train_command import environment

from seqmesh.train import data
from seqmesh.train.data import Corpus

TEXTS = ["first", "naïve ✓ 🙂", "third\nof several lines\n", "x" * 300]

datasets = pytest.importorskip("datasets")
pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache folder is another one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def documents(corpus: Corpus) -> list[bytes]:
    return [document[:] for document in corpus.documents]


def json_lines(texts: list[str], **more: Any) -> str:
    rows = ({"id": number, "text": text} | more for number, text in enumerate(texts))
    return "".join(json.dumps(row) + "\n" for row in rows)


def save_text_folder(path: Path) -> Path:
    path.mkdir()
    for number, text in enumerate(TEXTS):
        (path / f"{number}.txt").write_text(text)
    return path


def save_json_lines(path: Path) -> Path:
    file = path.with_suffix(".jsonl")
    file.write_text(json_lines(TEXTS) + "\n")  # an empty line at the end
    return file


def save_compressed(path: Path) -> Path:
    file = path.with_suffix(".jsonl.gz")
    file.write_bytes(gzip.compress(json_lines(TEXTS).encode()))
    return file


def save_two_json_lines(path: Path) -> Path:
    path.mkdir()
    (path / "b.ndjson").write_text(json_lines(TEXTS[2:]))
    (path / "a.jsonl").write_text(json_lines([*TEXTS[:2], ""]))
    return path


def save_parquet(path: Path) -> Path:
    file = path.with_suffix(".parquet")
    parquet.write_table(pyarrow.table({"id": range(4), "text": TEXTS}), file, row_group_size=3)
    return file


def save_dataset(path: Path) -> Path:
    rows = datasets.Dataset.from_dict({"text": ["left out", *TEXTS]})
    rows.select(range(1, 5)).save_to_disk(str(path))
    return path


SOURCES = [
    save_text_folder,
    save_json_lines,
    save_compressed,
    save_two_json_lines,
    save_parquet,
    save_dataset,
]


@pytest.mark.parametrize("save", SOURCES)
def test_every_source_gives_the_same_documents(save: Callable[[Path], Path], tmp_path: Path) -> None:
    corpus = data.read(str(save(tmp_path / "source")))
    assert documents(corpus) == [text.encode() for text in TEXTS]
    assert corpus.lengths.tolist() == [len(text.encode()) + 1 for text in TEXTS]
    # A run goes on with the same text from another source.
    in_memory = Corpus(source="memory", documents=tuple(text.encode() for text in TEXTS))
    assert corpus.fingerprint == in_memory.fingerprint


@pytest.mark.parametrize("save", SOURCES)
def test_a_tokenizer_makes_the_same_tokens_of_every_source(
    save: Callable[[Path], Path], tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    folder = save_tokenizer(tmp_path / "tokenizer")
    corpus = data.read(str(save(tmp_path / "source")), tokenizer=str(folder))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    end = tokenizer.eos_token_id
    whole = [data.Piece(number, 0, int(length)) for number, length in enumerate(corpus.lengths)]
    assert [corpus.ids(piece).tolist() for piece in whole] == [
        [*tokenizer(text).input_ids, end] for text in TEXTS
    ]
    assert corpus.vocabulary.end == end


def test_the_column_has_another_name_if_told_so(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text(json_lines(["no", "no"], body="yes"))
    assert documents(data.read(str(file), field="body")) == [b"yes", b"yes"]


WRONG = [
    ("bad.jsonl", '{"text": "a"}\n{"text": \n', r"line 2 of '.*bad\.jsonl' is not JSON"),
    ("list.jsonl", '{"text": "a"}\n\n["a"]\n', r"line 3 of '.*list\.jsonl' is list, no object; write one"),
    ("column.jsonl", '{"body": "a", "id": 3}\n', "line 1 of .* has no column 'text', its columns: body, id;"),
    ("null.jsonl", '{"text": null}\n', "line 1 of .* 'text' is NoneType, training needs text"),
    ("ids.jsonl", '{"text": [1, 2]}\n', "line 1 of .* 'text' is list, training needs text"),
    ("half.jsonl", '{"text": "a\\ud83d"}\n', r"line 1 of .* has '\\ud83d', half a character"),
    ("empty.jsonl", "\n", "has no text: 1 files, all empty"),
    ("blank.jsonl", '{"text": ""}\n', "has no text: 1 files, all empty"),
    ("latin.jsonl", b'{"text": "caf\xe9"}\n', "line 1 of .* is not JSON"),
    ("plain.jsonl.gz", "text", r"plain\.jsonl\.gz' is not what gzip wrote"),
    ("cut.jsonl.gz", gzip.compress(b"x" * 999)[:-9], r"cut\.jsonl\.gz' is not what gzip wrote"),
    ("plain.parquet", "text", r"plain\.parquet' is not parquet"),
]


@pytest.mark.parametrize(("name", "content", "said"), WRONG, ids=[name for name, _, _ in WRONG])
def test_a_file_that_is_not_what_its_name_says_is_refused_in_one_line(
    tmp_path: Path, name: str, content: str | bytes, said: str
) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    for _ in range(2):  # what failed leaves nothing that the next run would take
        assert_refused(said, str(tmp_path / name))


def assert_refused(said: str, path: str, **settings: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        data.read(path, **settings)
    assert "\n" not in str(error.value)


def test_missing_columns_of_tables_are_refused_with_those_that_there_are(tmp_path: Path) -> None:
    for save in (save_parquet, save_dataset):
        assert_refused(
            r"has no column 'body', its columns: (id, )?text; name one with data\.field",
            str(save(tmp_path / "source")),
            field="body",
        )


def test_a_column_of_numbers_is_refused(tmp_path: Path) -> None:
    assert_refused("row 1 of .* 'id' is int", str(save_parquet(tmp_path / "source")), field="id")


def test_a_folder_of_two_kinds_is_refused(tmp_path: Path) -> None:
    save_json_lines(tmp_path / "source")
    (tmp_path / "readme.md").write_text("about")
    mixed = r"mixes JSON lines \(source\.jsonl\) and text \(readme\.md\)"
    assert_refused(f"{mixed}; point data.path at files of one kind", str(tmp_path))


def test_several_saved_data_sets_are_refused_by_name(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"text": TEXTS})
    datasets.DatasetDict(train=rows, test=rows).save_to_disk(str(tmp_path / "both"))
    assert_refused("holds several data sets; .* one of its folders: test, train", str(tmp_path / "both"))
    assert documents(data.read(str(tmp_path / "both" / "train")))[0] == b"first"


def test_a_data_set_that_cannot_be_loaded_is_refused(tmp_path: Path) -> None:
    folder = save_dataset(tmp_path / "source")
    (folder / "state.json").write_text("{}")
    assert_refused("cannot be loaded by datasets", str(folder))


def test_packages_that_are_not_there_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, folder = save_parquet(tmp_path / "source"), save_dataset(tmp_path / "folder")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    install = r"install it with: pip install 'seqmesh\[data\]'"
    assert_refused(f"needs pyarrow, which is not here; {install}", str(file))
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert_refused("needs datasets, which is not here", str(folder))


def test_settings_that_a_source_has_no_use_for_are_refused(tmp_path: Path) -> None:
    folder = str(save_text_folder(tmp_path / "source"))
    assert_refused("data.field='body', but .* is text, without columns; leave it out", folder, field="body")
    assert_refused("data.cache='here', but .* bytes are used in place; leave it out", folder, cache="here")


def test_a_pipe_is_refused_for_the_text_is_read_more_than_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert_refused("is neither file nor folder", str(tmp_path / "pipe"))


def test_a_character_over_the_edge_of_a_chunk_is_text_and_half_of_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("seqmesh.train.data.text_files._CHUNK_BYTES", 5)
    text = "aaaa🙂bb✓é" * 3
    (tmp_path / "a.txt").write_text(text)
    assert documents(data.read(str(tmp_path))) == [text.encode()]
    (tmp_path / "a.txt").write_bytes(text.encode() + "🙂".encode()[:2])
    assert_refused(rf"a\.txt' is not UTF-8 text \(byte {len(text.encode())} is 0xf0\)", str(tmp_path))
    (tmp_path / "a.txt").write_bytes(b"123456789\0")
    assert_refused(r"a\.txt' is binary \(byte 9 is NUL\)", str(tmp_path))


def test_a_text_that_shrinks_while_it_is_used_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("0123456789")
    corpus = data.read(str(tmp_path))
    (tmp_path / "a.txt").write_text("0123")
    assert corpus.ids(data.Piece(0, 0, 4)).tolist() == data.encode(b"0123").tolist()
    with pytest.raises(ValueError, match=r"a\.txt' has become shorter since the run began"):
        corpus.ids(data.Piece(0, 2, 6))


MEMORY = """
import resource, sys
from itertools import islice
import torch
from seqmesh.train import data
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
torch.set_num_threads(1)
corpus = data.read(sys.argv[1], cache=sys.argv[2])
before = peak()
read = 0
for pieces in islice(data.sequences(corpus, seq_len=1 << 16, seed=0), corpus.tokens >> 16):
    read += data.assemble(corpus, pieces).input_ids.numel()
print(read, before, peak() - before)
"""
MEGABYTES = 160


@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_memory_does_not_grow_with_the_text(tmp_path: Path, kind: str) -> None:
    """A process that reads 160 MB, once or twice, needs no more than some chunks of it."""
    line = "x" * (1 << 20)
    file = tmp_path / f"long.{kind}"
    with file.open("w") as out:
        for _ in range(MEGABYTES):
            out.write(json.dumps({"text": line}) + "\n" if kind == "jsonl" else line)
    arguments = [str(file), str(tmp_path / "kept") if kind == "jsonl" else ""]

    def measured(path: str) -> list[int]:
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, path, arguments[1]],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        return [int(number) for number in done.stdout.split()]

    read, before, grown = measured(str(file))
    assert read >= 0.99 * MEGABYTES * 2**20
    small = tmp_path / f"short.{kind}"
    small.write_text(json.dumps({"text": line}) + "\n" if kind == "jsonl" else line)
    _, least, _ = measured(str(small))
    # Of text two chunks of 16 MiB, as bytes and as str; of rows a batch for the tokenizer.
    assert before - least < 100 * 2**20
    assert grown < 32 * 2**20


def test_lengths_of_the_standard_library_are_those_of_its_files() -> None:
    corpus = data.read("stdlib")
    assert corpus.lengths.dtype == np.int64
    assert corpus.lengths[:5].tolist() == [len(corpus.documents[n][:]) + 1 for n in range(5)]
