"""`seqmesh bench`: which measurements, and their options. Nothing is loaded before one is asked for."""

from pathlib import Path
from typing import Annotated

import typer

_Quick = Annotated[
    bool, typer.Option("--quick", help="Small sizes: seconds instead of minutes; times are not judged.")
]
_Json = Annotated[Path | None, typer.Option("--json", help="Also write every figure to this file.")]

_Profile = Annotated[
    Path | None,
    typer.Option("--profile", help="Write a measured profile for seqmesh plan, and nothing else."),
]
_Device = Annotated[
    str | None, typer.Option("--device", help="Of --profile: cuda or cpu (default: a GPU if there is one).")
]
_Ranks = Annotated[
    int | None, typer.Option("--ranks", help="CPU ranks that --profile measures at once (default: 4).")
]
_Links = Annotated[
    str, typer.Option("--gpu", help="The planner's GPU whose links --profile takes (default: found).")
]


def add_to(app: typer.Typer) -> None:
    """Add the command `bench` and its own."""
    bench = typer.Typer(invoke_without_command=True, rich_markup_mode=None)
    app.add_typer(bench, name="bench")

    @bench.callback()
    def bench_command(
        context: typer.Context,
        quick: _Quick = False,
        json: _Json = None,
        profile: _Profile = None,
        device: _Device = None,
        ranks: _Ranks = None,
        gpu: _Links = "",
    ) -> int:
        """Measure speed against one process, memory, bytes, schedules and load balance,
        with their targets.
        """
        if context.invoked_subcommand is not None:
            if quick or json or profile or device or ranks is not None or gpu:
                raise ValueError("options stand after the measurement: seqmesh bench generate --quick")
            return 0
        if profile is not None:
            from seqmesh.bench.profile import write_profile

            write_profile(profile, device, ranks, gpu)
            return 0
        if device or ranks is not None or gpu:
            raise ValueError(
                "--device, --ranks and --gpu are of --profile FILE; pass that too, or leave them out"
            )
        from seqmesh.bench.report import run_bench

        return run_bench(quick, json)

    _add_measurements(bench)


def _add_measurements(bench: typer.Typer) -> None:
    """Those with a command each."""
    for add in (
        _add_balance,
        _add_gpu_rank,
        _add_gpu_step,
        _add_train_step,
        _add_generation,
        _add_hybrid,
        _add_overlap,
    ):
        add(bench)


def _add_balance(bench: typer.Typer) -> None:

    @bench.command("balance")
    def balance_command(json: _Json = None) -> int:
        """Count how long data-parallel ranks wait for the busiest one, with sequences in turn,
        evened, and in one pool.
        """
        from seqmesh.bench.report import measure_balance, run_figures

        return run_figures(measure_balance(), quick=False, json_path=json)


def _add_gpu_rank(bench: typer.Typer) -> None:
    device = typer.Option("--device", help="cuda (bf16) or cpu (fp32).")
    tokens = typer.Option("--tokens", help="Tokens of the rank (default: 8192 on cuda, 512 on cpu).")
    rings = typer.Option("--rings", help="Ring degrees, such as 2,8,64 (default: 2 to 64).")

    @bench.command("gpu-rank")
    def gpu_rank_command(
        device: Annotated[str, device] = "cuda",
        tokens: Annotated[int | None, tokens] = None,
        rings: Annotated[str | None, rings] = None,
        json: _Json = None,
    ) -> int:
        """Time the exact work of one rank of a ring on one device, with exchanges as local copies,
        against one call of as many pairs.
        """
        from seqmesh.bench.gpu_rank import run_gpu_rank, work_of

        return run_gpu_rank(work_of(device, tokens, rings), json)


def _add_gpu_step(bench: typer.Typer) -> None:
    recipes = typer.Argument(metavar="[RECIPE.toml]", help="Default: LLaMA3-8B, 208K tokens on 16 ranks.")
    device = typer.Option("--device", help="cuda, or cpu (a tiny model without a recipe).")
    gpus = typer.Option("--gpu", help="The planner's name of this GPU, such as h100-sxm (default: found).")
    count = typer.Option("--steps", help="Steps that count.")

    @bench.command("gpu-step")
    def gpu_step_command(
        recipe: Annotated[str | None, recipes] = None,
        device: Annotated[str, device] = "cuda",
        gpu: Annotated[str, gpus] = "",
        steps: Annotated[int, count] = 5,
        json: _Json = None,
    ) -> int:
        """Time a training step of one rank of a large job on one device,
        with exchanges as local copies.
        """
        from seqmesh.bench.gpu_step import run_gpu_step

        return run_gpu_step(recipe, device, gpu, steps, json)


def _add_train_step(bench: typer.Typer) -> None:

    @bench.command("train-step")
    def train_step_command(quick: _Quick = False, json: _Json = None) -> int:
        """Time a training step against a plain PyTorch loop, and count a rank's memory on 1 to 8 ranks."""
        from seqmesh.bench.train_step import run_train_step

        return run_train_step(quick, json)


def _add_overlap(bench: typer.Typer) -> None:
    tokens = typer.Option("--tokens", help="Tokens of the sequence.")
    repeats = typer.Option("--repeats", help="Calls of each side that count.")
    file = typer.Option("--json", help="Also write every time stamp to this file.")
    picture = typer.Option("--plot", help="Also draw it (png, pdf, svg).")

    @bench.command("overlap")
    def overlap_command(
        tokens: Annotated[int, tokens] = 4096,
        repeats: Annotated[int, repeats] = 9,
        json: Annotated[Path | None, file] = None,
        plot: Annotated[Path | None, picture] = None,
    ) -> int:
        """Time how long two ranks wait for the exchange of heads, overlapped with attention
        and one after the other.
        """
        from seqmesh.bench.overlap import OverlapWork
        from seqmesh.bench.overlap_report import run_overlap

        return run_overlap(OverlapWork(tokens=tokens, repeats=repeats), json, plot)


def _add_generation(bench: typer.Typer) -> None:

    @bench.command("generate")
    def generate_command(quick: _Quick = False, json: _Json = None) -> int:
        """Time a prompt and new tokens on 4 ranks against one process with transformers' own cache,
        and count what a rank holds and sends.
        """
        from seqmesh.bench.generation import run_generation

        return run_generation(quick, json)


def _add_hybrid(bench: typer.Typer) -> None:

    @bench.command("hybrid")
    def hybrid_command(quick: _Quick = False, json: _Json = None) -> int:
        """Time layers that carry a state on 2 ranks against one process, and count what a rank sends
        and holds.
        """
        from seqmesh.bench.hybrid import run_hybrid

        return run_hybrid(quick, json)
