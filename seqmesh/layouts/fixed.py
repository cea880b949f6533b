"""The layouts that look at nothing but the length: contiguous, zigzag, striped.

    12 tokens, ring 3    contiguous  0 0 0 0 1 1 1 1 2 2 2 2      the owner of each token
                         zigzag      0 0 1 1 2 2 2 2 1 1 0 0
                         striped     0 1 2 0 1 2 0 1 2 0 1 2

Source: zigzag as in the USP paper's section on load balance; striped from Striped Attention (Brandon et al.
2023).
"""

from itertools import accumulate, pairwise

from seqmesh.layouts.layout import Layout, Span, check_degrees, from_runs, split_evenly


def contiguous(s: int, ring: int) -> Layout:
    """Near-equal consecutive pieces: least traffic for windows; badly balanced for causal masks.

    Raises:
        ValueError: s < 0 or ring < 1.
    """
    check_degrees(s, ring)
    pieces = pairwise(split_evenly(s, ring))
    return from_runs(s, ([piece] for piece in pieces), "contiguous", "asked for")


def zigzag(s: int, ring: int) -> Layout:
    """Of 2R near-equal chunks, ring rank r holds chunks r and 2R-1-r.

    Causal work is equal exactly when 2R divides s.

    Raises:
        ValueError: s < 0 or ring < 1.
    """
    check_degrees(s, ring)
    counts = [after - before for before, after in pairwise(split_evenly(s, ring))]
    # Heads are laid from the front and tails from the back, so a rank's two chunks may differ by a token.
    head = list(accumulate(((count + 1) // 2 for count in counts), initial=0))
    tail = list(accumulate((count // 2 for count in counts), initial=0))
    runs = []
    for r in range(ring):
        early_chunk = (head[r], head[r + 1])
        late_chunk = (s - tail[r + 1], s - tail[r])
        runs.append((early_chunk, late_chunk))
    return from_runs(s, runs, "zigzag", "asked for")


def striped(s: int, ring: int) -> Layout:
    """Ring rank r holds tokens r, r + R, r + 2R, ...

    Balanced for causal masks, but every rank needs every row.

    Raises:
        ValueError: s < 0 or ring < 1.
    """
    check_degrees(s, ring)
    ranks = tuple((Span(r, len(range(r, s, ring)), ring),) for r in range(ring))
    return Layout(s, ranks, "striped", "asked for")
