"""Text to batches: sources and their errors, byte tokens, packing, labels that stay inside documents."""

import os
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from seqmesh.parallel import IGNORED_LABEL, PackedTokens
from seqmesh.train import data
from seqmesh.train.data import Corpus


def corpus(*documents: bytes) -> Corpus:
    return Corpus(source="test", documents=documents)


def texts(text: Corpus) -> list[bytes]:
    return [document[:] for document in text.documents]


def first_batches(
    text: Corpus, count: int, *, seq_len: int, sequences: int = 1, seed: int = 0
) -> list[PackedTokens]:
    stream = data.sequences(text, seq_len=seq_len, seed=seed)
    batches = [[piece for one in islice(stream, sequences) for piece in one] for _ in range(count)]
    return [data.assemble(text, pieces) for pieces in batches]


@pytest.mark.parametrize(
    "text", ["", "plain", "tabs\tand\nlines\r\n", "naïve ✓ 日本語 🙂", "".join(map(chr, range(1, 256)))]
)
def test_tokens_equal_the_byt5_tokenizer(text):
    tokenizer = pytest.importorskip("transformers").ByT5Tokenizer()
    assert [*data.encode(text.encode()).tolist(), data.EOS_ID] == tokenizer(text).input_ids


def test_decoding_gives_the_text_back():
    text = "def f(x):\n    return 'é'  # ✓\n"
    tokens = torch.cat((data.encode(text.encode()), torch.tensor([data.EOS_ID])))
    assert data.decode(tokens) == text


def test_the_standard_library_is_read_in_the_same_order_and_without_tests():
    first = data.read("stdlib")
    second = data.read("stdlib")
    assert texts(first) == texts(second)
    assert first.fingerprint == second.fingerprint
    assert first.tokens > 5_000_000
    assert sum(b"_test_pickle" in text for text in texts(first)) == 0


def test_a_folder_is_read_in_sorted_order_without_hidden_files(tmp_path: Path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "z.txt").write_text("third? no: folders come after files")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / ".hidden").write_bytes(b"\0")
    documents = texts(data.read(str(tmp_path)))
    assert [document.split(b" ")[0] for document in documents] == [b"first", b"second", b"third?"]


def test_a_file_is_one_document(tmp_path: Path):
    (tmp_path / "book.txt").write_text("once upon a time")
    assert data.read(str(tmp_path / "book.txt")).lengths.tolist() == [17]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("missing", None, "does not exist"),
        ("empty.txt", b"", "has no text"),
        ("image.png", b"\x89PNG\0\0", "is binary"),
        ("latin.txt", "caf\xe9 ".encode("latin-1"), "not UTF-8"),
    ],
)
def test_a_path_without_text_is_refused_in_one_line(
    tmp_path: Path, name: str, content: bytes | None, said: str
):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said) as error:
        data.read(str(tmp_path / name))
    assert "\n" not in str(error.value)
    assert name in str(error.value)


@pytest.mark.parametrize(
    ("path", "said"),
    [("~nosuchuser/x", "in full"), ("x" * 5000, "File name too long"), ("file/x", "not exist")],
)
def test_a_path_that_cannot_be_looked_up_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, said: str
):
    (tmp_path / "file").write_text("text")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=said):
        data.read(path)


def test_an_unreadable_subfolder_is_refused_and_not_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """os.walk leaves such folders out. Permissions are simulated: root, as whom CI may run, has them all."""
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def closed(path: str) -> object:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(ValueError, match=r"cannot read '.*closed': Permission denied; fix its permissions"):
        data.read(str(tmp_path))


def test_a_dangling_link_in_a_folder_is_left_out(tmp_path: Path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.txt").symlink_to("nowhere")
    assert texts(data.read(str(tmp_path))) == [b"text"]


def test_a_folder_without_files_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="without files"):
        data.read(str(tmp_path))


def test_a_binary_file_in_a_folder_is_refused_by_name(tmp_path: Path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.bin").write_bytes(b"\0\1")
    with pytest.raises(ValueError, match=r"b\.bin.*binary"):
        data.read(str(tmp_path))


def test_too_little_text_for_one_sequence_is_refused_before_the_first_batch():
    said = r"7 tokens, too few for one sequence of 16; use more text or data\.seq_len <= 7"
    with pytest.raises(ValueError, match=said):
        data.sequences(corpus(b"abc", b"de"), seq_len=16, seed=0)


@pytest.mark.parametrize("seq_len", [3, 5, 16, 64])
@pytest.mark.parametrize("seed", [0, 1])
def test_packing_fills_every_sequence_and_uses_every_token_once(seq_len: int, seed: int):
    lengths = (7, 2, 40, 3, 16, 5, 64, 2)
    epoch = data.Epoch(np.array(lengths), seq_len, seed, epoch=0)
    sequences = [epoch.sequence(place) for place in range(len(epoch))]
    used: list[tuple[int, int]] = []
    for sequence in sequences:
        tokens = [(piece.document, t) for piece in sequence for t in range(piece.start, piece.stop)]
        assert len(tokens) == seq_len
        used += tokens
    assert len(used) == len(set(used)) == sum(lengths) // seq_len * seq_len


def test_a_cut_document_goes_on_in_the_next_sequence_as_a_document_of_its_own():
    both = first_batches(corpus(b"abcdefghi"), 2, seq_len=5)
    batch, following = sorted(both, key=lambda batch: batch.input_ids[0, 0].item())
    assert data.decode(batch.input_ids[0]) == "abcde"
    assert data.decode(following.input_ids[0]) == "fghi"
    assert following.input_ids[0, -1] == data.EOS_ID
    assert following.position_ids.tolist() == [[0, 1, 2, 3, 4]]


def test_labels_are_the_next_token_of_the_same_document_and_positions_restart():
    (batch,) = first_batches(corpus(b"ab", b"cdef", b"g"), 1, seq_len=10)
    start = 0
    for band in batch.mask.bands:
        stop = band.q_stop
        following = batch.input_ids[0, start + 1 : stop]
        assert batch.shift_labels[0, start : stop - 1].tolist() == following.tolist()
        assert batch.shift_labels[0, stop - 1] == IGNORED_LABEL
        assert batch.position_ids[0, start:stop].tolist() == list(range(stop - start))
        start = stop
    assert start == batch.mask.q_len == 10
    assert batch.label_count == 10 - 3


def test_the_area_that_ranks_are_evened_by_is_that_of_the_mask():
    text = corpus(b"ab", b"cdefghi", b"j" * 30)
    for pieces in islice(data.sequences(text, seq_len=20, seed=0), 4):
        assert data.area_of(pieces) == data.assemble(text, pieces).mask.area


def test_several_sequences_are_one_row_whose_documents_end_at_every_sequence():
    (batch,) = first_batches(corpus(b"x" * 99), 1, seq_len=20, sequences=3)
    assert [(b.q_start, b.q_stop) for b in batch.mask.bands] == [(0, 20), (20, 40), (40, 60)]
    assert batch.input_ids.shape == (1, 60)


def test_the_parts_of_a_long_document_do_not_follow_each_other():
    found = first_batches(corpus(bytes(range(1, 201))), 20, seq_len=10)
    starts = [int(batch.input_ids[0, 0]) for batch in found]
    assert starts != sorted(starts)
    assert sorted(starts) == [data.BYTE_OFFSET + 1 + 10 * n for n in range(20)]


def test_batches_depend_on_the_seed_only_and_go_on_after_an_epoch():
    text = corpus(*(bytes([97 + n]) * 9 for n in range(8)))  # 80 tokens, 8 sequences of 10 in an epoch
    run = first_batches(text, 20, seq_len=10, seed=3)
    again = first_batches(text, 20, seq_len=10, seed=3)
    other = first_batches(text, 20, seq_len=10, seed=4)
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(run, again, strict=True))
    assert not all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(run, other, strict=True))
    starts = [batch.input_ids[0, 0].item() for batch in run]
    assert sorted(starts[:8]) == sorted(starts[8:16])
    assert starts[:8] != starts[8:16]
