"""The masks that have a name: each a function of a few lengths (pictures in the package's docstring)."""

from collections.abc import Iterable

from seqmesh.masks.band import Band
from seqmesh.masks.mask import Mask, whole


def full(s: int) -> Mask:
    """Every one of s tokens sees every other (an encoder, a diffusion transformer)."""
    return Mask(s, s, (Band(0, s, 0, s),))


def causal(s: int) -> Mask:
    """Token i of s sees tokens 0..i."""
    return Mask(s, s, (Band(0, s, 0, s, lo=0),))


def sliding_window(s: int, window: int, sink_tokens: int = 0) -> Mask:
    """Token i of s sees the last `window` tokens, itself included, and the first `sink_tokens` tokens.

    The latter are StreamingLLM's attention sinks.

    Raises:
        ValueError: window < 1 or sink_tokens < 0.
    """
    s, window, sink_tokens = whole(s), whole(window), whole(sink_tokens)
    if window < 1 or sink_tokens < 0:
        raise ValueError(
            f"window={window}, sink_tokens={sink_tokens}: a token sees at least itself;"
            " use window >= 1 and sink_tokens >= 0"
        )
    local = Band(0, s, 0, s, lo=0, hi=window - 1)
    return Mask(s, s, (local, Band(0, s, 0, min(sink_tokens, s), lo=window)))


def documents(lengths: Iterable[int], causal: bool = True) -> Mask:
    """Packed documents of the given lengths, one after the other, that never attend to each other.

    Args:
        lengths: tokens of each document, in order; zero is allowed.
        causal: within a document, token i sees tokens up to i (default) or the whole document.

    Raises:
        ValueError: a negative length.
    """
    bands = []
    start = 0
    for length in map(whole, lengths):
        if length < 0:
            raise ValueError(
                f"document length {length} is negative; pass lengths >= 0 (not cumulative offsets)"
            )
        bands.append(Band(start, start + length, start, start + length, 0 if causal else None))
        start += length
    return Mask(start, start, tuple(bands))


def chunked(s: int, chunk: int) -> Mask:
    """Chunked local causal attention: token i sees tokens up to i of its own chunk of `chunk` tokens.

    Raises:
        ValueError: chunk < 1.
    """
    s, chunk = whole(s), whole(chunk)
    if s < 0:
        raise ValueError(f"s={s}: a sequence has at least 0 tokens; pass s >= 0")
    if chunk < 1:
        raise ValueError(f"chunk={chunk}: a chunk holds at least one token; use chunk >= 1")
    return documents(min(chunk, s - start) for start in range(0, s, chunk))


def prefix_lm(s: int, prefix: int) -> Mask:
    """The first `prefix` of s tokens see each other fully; the rest are causal and see the whole prefix.

    Raises:
        ValueError: prefix outside 0..s.
    """
    s, prefix = whole(s), whole(prefix)
    if not 0 <= prefix <= s:
        raise ValueError(f"prefix={prefix} of a sequence of {s} tokens; use 0 <= prefix <= s")
    return Mask(s, s, (Band(0, s, 0, prefix), Band(prefix, s, prefix, s, lo=0)))


def cross(q_len: int, k_len: int) -> Mask:
    """Cross-attention: every one of q_len queries sees every one of k_len keys."""
    return Mask(q_len, k_len, (Band(0, q_len, 0, k_len),))
