"""A sum over the bits of a tensor: whatever one bit flips, the sum is another.

    bytes as 64-bit words in rows of 256     sum = sum of words x weights, modulo 2^64

The weight of a word in row i and column j is (2 j + 1) + 2 K (i + 1): the sums of rows and of columns are
enough to work it out, and take no longer than reading. It is odd, so a bit that flips changes the sum by an
odd number times a power of 2 below 2^64, which is never 0. Weights differ from word to word: two that are
swapped, or one rounded up and another down, show as well. Any other change goes unseen once in about 2^64.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from seqmesh.parallel.shards import local_part

_COLUMNS = 256
_ROW_FACTOR = 2 * 0x1E3779B97F4A7C15
"""An even number without a pattern: 2 K above."""
_WORD_BYTES = 8


@torch.no_grad()
def bit_sum(x: Tensor) -> Tensor:
    """The sum of a tensor's bits as above: int64, (), on its device."""
    words = _words(x)
    rows = words.numel() // _COLUMNS
    whole = words[: rows * _COLUMNS].view(rows, _COLUMNS)
    rest = words[rows * _COLUMNS :]
    of_columns = whole.sum(0)
    of_columns[: rest.numel()] += rest
    of_rows = torch.cat([whole.sum(1), rest.sum().view(1)])
    columns = torch.arange(_COLUMNS, device=x.device) * 2 + 1
    numbers = torch.arange(1, rows + 2, device=x.device)
    return (of_columns * columns).sum() + (of_rows * numbers).sum() * _signed(_ROW_FACTOR)


def bit_sums(tensors: Iterable[Tensor | None]) -> list[int]:
    """The sums of several tensors, of what this rank has of each; 0 for none."""
    sums = [torch.zeros((), dtype=torch.int64) if x is None else bit_sum(local_part(x)) for x in tensors]
    # One copy to the host for all of them.
    return numbers_of(sums)


def numbers_of(sums: Sequence[Tensor]) -> list[int]:
    """Sums as numbers."""
    if not sums:
        return []
    device = max((one.device for one in sums), key=lambda device: device.type != "cpu")
    found: list[int] = torch.stack([one.to(device) for one in sums]).tolist()
    return found


def joined(sums: Iterable[int]) -> int:
    """One sum of many, in which each shows as a bit does: a signed 64-bit number."""
    return _signed(sum((2 * place + 1) * one for place, one in enumerate(sums)))


def weight_bits(parameters: Iterable[nn.Parameter]) -> list[int]:
    """The sums of the weights that this rank holds, parameter by parameter."""
    return bit_sums(parameter.detach() for parameter in parameters)


def _signed(number: int) -> int:
    """Modulo 2^64, as int64 has it."""
    return (number + 2**63) % 2**64 - 2**63


def _words(x: Tensor) -> Tensor:
    """The bytes of a tensor as int64, (n,), filled up with zeros."""
    flat = x.detach().contiguous().view(-1)
    if flat.storage_offset() * flat.element_size() % _WORD_BYTES:
        flat = flat.clone()  # only what begins at a word can be read as words
    content = flat.view(torch.uint8)
    over = -content.numel() % _WORD_BYTES
    if over:
        content = torch.cat([content, content.new_zeros(over)])
    return content.view(torch.int64)
