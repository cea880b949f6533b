"""`seqmesh generate`: what is asked, and what a person sees. Text goes to stdout, all else to stderr.

Exit codes: 0 done; 1 a rank failed; 2 wrong input (cli.py prints it in one line).
"""

import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from seqmesh.generate.program import Done, GenerationRequest

_TIMEOUT_S = 600.0
"""Of a collective: ranks wait for the slowest one's load of the weights."""


def request(model: Path, prompt: Path, **given: Any) -> "GenerationRequest":
    """What the command line asks for, checked before torch is loaded.

    Raises:
        ValueError: an option that is none, or files that are not there.
    """
    _check(**given)
    text = _read(prompt)
    if not model.is_dir():
        raise ValueError(f"--model {model} is no folder; pass one that save_pretrained wrote")
    from seqmesh.generate.program import GenerationRequest

    return GenerationRequest(model=model, prompt=text, **given)


def _check(**given: Any) -> None:
    for name in ("ulysses", "ring", "new_tokens", "chunk"):
        if given[name] is not None and given[name] < 1:
            raise ValueError(f"--{name.replace('_', '-')} {given[name]}: use a number of at least 1")
    if not 0 < given["top_p"] <= 1 or given["temperature"] < 0:
        raise ValueError(
            f"--top-p {given['top_p']:g} --temperature {given['temperature']:g}: use 0 < top-p <= 1 and a"
            " temperature of at least 0"
        )
    if given["top_p"] < 1 and not given["temperature"]:
        raise ValueError(f"--top-p {given['top_p']:g} without samples; give a --temperature above 0 too")
    for name, known in (("device", ("cpu", "cuda")), ("dtype", ("auto", "fp32", "bf16", "fp16"))):
        if given[name] not in known:
            raise ValueError(f"--{name} {given[name]}: use {', '.join(known)}")


def _read(prompt: Path) -> str:
    if str(prompt) == "-":
        return sys.stdin.read()
    try:
        return prompt.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompt {prompt} is no text file in UTF-8 ({error}); pass one") from None


def generate(asked: "GenerationRequest") -> int:
    """Generate on the ranks that are asked for: the exit code.

    Raises:
        ValueError: wrong input.
    """
    from seqmesh.generate.program import work
    from seqmesh.processes import connect, place_from
    from seqmesh.train import device as devices
    from seqmesh.train.launch import RankFailedError, run_local

    devices.check(asked.device)
    world = asked.ulysses * asked.ring
    shown = _Shown(asked)
    if (place := place_from(os.environ)) is not None:
        if place.world != world:
            raise ValueError(
                f"--ulysses {asked.ulysses} x --ring {asked.ring} = {world} ranks, but torchrun started"
                f" {place.world}; choose degrees whose product that is"
            )
        connect(place, _TIMEOUT_S)
        work(asked, place, shown.hear)
        return 0
    with TemporaryDirectory(prefix="seqmesh-") as logs:
        try:
            run_local(lambda place, send: work(asked, place, send), world, _TIMEOUT_S, shown.hear, Path(logs))
        except RankFailedError as error:
            print(f"seqmesh: error: {error}", file=sys.stderr)
            return 1
        finally:
            shown.close()
    return 0


def _ranks(count: int) -> str:
    return "1 rank" if count == 1 else f"{count} ranks"


class _Shown:
    """What a person sees of rank 0's events."""

    def __init__(self, asked: "GenerationRequest") -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self._asked = asked
        self._console = Console(stderr=True, highlight=False)
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=self._console, transient=True)
        self._task: Any = None

    def close(self) -> None:
        """End the progress bar, if there is one."""
        if self._task is not None:
            self._progress.stop()

    def hear(self, event: Any) -> None:
        """Show an event of rank 0."""
        from seqmesh.generate.program import Begun, Done, LayerRead, Text

        if isinstance(event, Begun):
            self._begin(event.prompt_tokens, event.layers, event.longest)
        elif isinstance(event, LayerRead) and self._task is not None:
            self._progress.advance(self._task)
        elif isinstance(event, Text):
            self.close()
            print(event.text, end="", flush=True)
        elif isinstance(event, Done):
            self._end(event)

    def _begin(self, tokens: int, layers: int, longest: int | None) -> None:
        asked = self._asked
        mesh = f"ulysses {asked.ulysses} x ring {asked.ring}"
        self._console.print(f"prompt of {tokens:,} tokens on {_ranks(asked.ulysses * asked.ring)} ({mesh})")
        if longest is not None and tokens + asked.new_tokens > longest:
            self._console.print(
                f"the model was made for {longest:,} positions (max_position_embeddings); beyond them its"
                " answers may mean nothing"
            )
        self._task = self._progress.add_task("reading", total=layers)
        self._progress.start()

    def _end(self, done: "Done") -> None:
        from seqmesh.train.units import in_memory

        speed = f"{done.prompt_tokens / done.prompt_seconds:,.0f} tokens/s"
        line = f"read {done.prompt_tokens:,} tokens in {done.prompt_seconds:.1f} s ({speed})"
        if done.new_tokens > 1:
            after = (done.new_tokens - 1) / done.seconds_after
            line += f"; then {done.new_tokens:,} new ones, {after:,.1f} tokens/s"
        self._console.print(line)
        for what, sizes in (("K/V cache", done.cache_bytes), ("peak memory", done.peak_bytes)):
            spread = f"{in_memory(min(sizes))} to {in_memory(max(sizes))}"
            self._console.print(f"{what} of a rank: {spread}; of all {in_memory(sum(sizes))}")
