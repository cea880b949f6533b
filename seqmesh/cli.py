"""The command line: `seqmesh train`, `export`, `generate`, `plan`, `bench`, `verify`, `draw`, `capabilities`.

Modules are imported where they are used: what loads torch costs seconds, which help, a version or a typing
mistake should not.

Exit codes: 0 done; 1 a rank failed or a check of the report did not pass; 2 wrong input; 130 Ctrl-C;
143 SIGTERM. Whatever goes wrong with the input is one line on stderr, `seqmesh: error: ...`, with the remedy.
"""

import os
import sys
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import seqmesh

if TYPE_CHECKING:
    import typer

FAILED = 1
USAGE = 2
INTERRUPTED = 130


def main() -> None:
    """Console entry point."""
    try:
        code = _app()(_spelled_out(sys.argv[1:]), standalone_mode=False)
    except ModuleNotFoundError as error:
        code = _fail(f"{error.name} is not installed; pip install 'seqmesh[train]'", USAGE)
    except ValueError as error:
        code = _fail(_one_line(error), USAGE)
    except Exception as error:
        if not _is_usage_error(error):
            raise
        # An argument that is missing has no message until it is formatted.
        format_message = getattr(error, "format_message", error.__str__)
        message = _one_line(getattr(error, "message", "") or format_message()).rstrip(".")
        near = getattr(error, "possibilities", None)
        suggestion = f"; did you mean {near[0]}?" if near else ""
        code = _fail(f"{message}{suggestion} (see {_help_of(sys.argv)})", USAGE)
    _end(code)


def _end(code: int | None) -> None:
    """Exit. One of torchrun's ranks does so at once, without Python's own end.

    A thread of gloo that lets go of its last tensor then would abort the process after all was done, and
    torchrun would take it for a failure (pytorch/pytorch pull request 179291).
    """
    if os.environ.keys() >= {"RANK", "WORLD_SIZE"}:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)
    sys.exit(code)


def _spelled_out(arguments: list[str]) -> list[str]:
    """`plan --plot` without a file means plan.png: the option parser knows no optional values."""
    if arguments[:1] != ["plan"]:
        return arguments
    spelled: list[str] = []
    for argument, following in zip_longest(arguments, arguments[1:]):
        spelled.append(argument)
        without_file = following is None or following.startswith("-")
        if argument == "--plot" and without_file:
            spelled.append("plan.png")
    return spelled


def _fail(message: str, code: int) -> int:
    print(f"seqmesh: error: {message}", file=sys.stderr)
    return code


def _help_of(arguments: Sequence[str]) -> str:
    named = arguments[1:2]
    return (
        f"seqmesh {named[0]} --help"
        if named and named[0] in ("plan", "verify", "draw", "export", "generate")
        else "seqmesh --help"
    )


def _one_line(message: object) -> str:
    return " ".join(str(message).split("\n")[0].split())


def _is_usage_error(error: Exception) -> bool:
    import typer

    return isinstance(error, typer.TyperException)


def _app() -> "typer.Typer":
    import typer

    from seqmesh.bench.command import add_to as add_bench
    from seqmesh.picture.command import add_to as add_draw
    from seqmesh.planner.command import add_to as add_plan
    from seqmesh.verify.command import add_to as add_verify

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    _add_root(app)
    _add_train(app)
    _add_export(app)
    _add_generate(app)
    add_bench(app)
    add_plan(app)
    add_verify(app)
    add_draw(app)
    _add_capabilities(app)
    return app


def _add_root(app: "typer.Typer") -> None:
    """`seqmesh` without a command."""
    import typer

    @app.callback(invoke_without_command=True)
    def seqmesh_command(
        context: typer.Context,
        version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    ) -> None:
        """Exact sequence parallelism for PyTorch."""
        if version:
            print(f"seqmesh {seqmesh.__version__}")
        elif context.invoked_subcommand is None:
            print(context.get_help())


def _add_train(app: "typer.Typer") -> None:
    """Any option is taken here: recipe.py knows the keys, and names the nearest one for a wrong one."""
    import typer

    from seqmesh.train.recipe import keys, to_toml

    arguments = typer.Argument(
        metavar="[RECIPE.toml] [--KEY VALUE]...", help="A recipe file, and keys to override."
    )
    defaults = ", ".join(f"--{key} {to_toml(value)}" for key, value in keys().items())
    about = (
        f"Keys and defaults: {defaults}."
        " A key's section can be left out; --data PATH is short for --data.path PATH,"
        " --check N for --run.check_every N."
    )

    dry = typer.Option("--dry-run", help="Say what a rank would hold and send; no rank starts.")

    @app.command("train", context_settings={"ignore_unknown_options": True}, epilog=about)
    def train_command(
        given: Annotated[list[str] | None, arguments] = None, dry_run: Annotated[bool, dry] = False
    ) -> int:
        """Train a model on local ranks, or as one of torchrun's.
        Without a recipe, the one of recipes/stdlib.toml.
        """
        return train(given or [], dry_run=dry_run)


def _add_export(app: "typer.Typer") -> None:
    import typer

    folder = typer.Argument(metavar="FOLDER", help="The folder of a run.")
    target = typer.Argument(metavar="[OUT]", help="A new folder (default: FOLDER/export/step-N).")

    @app.command("export")
    def export_command(run: Annotated[Path, folder], out: Annotated[Path | None, target] = None) -> int:
        """Write a run's newest checkpoint as a model that from_pretrained loads. No rank is started."""
        from transformers.utils import logging

        from seqmesh.train.export import export

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        print(export(run, out))
        return 0


def _add_generate(app: "typer.Typer") -> None:
    import typer

    def option(name: str, text: str) -> Any:
        return typer.Option(name, help=text)

    @app.command("generate")
    def generate_command(
        model: Annotated[Path, option("--model", "A folder that save_pretrained wrote.")],
        prompt: Annotated[Path, option("--prompt", "A text file; - for standard input.")],
        ulysses: Annotated[int, option("--ulysses", "Ulysses degree of the mesh.")] = 1,
        ring: Annotated[int, option("--ring", "Ring degree of the mesh.")] = 1,
        new_tokens: Annotated[int, option("--new-tokens", "At most so many.")] = 128,
        chunk: Annotated[int | None, option("--chunk", "Tokens of the prompt at a time (all).")] = None,
        temperature: Annotated[float, option("--temperature", "0: always the likeliest token.")] = 0.0,
        top_p: Annotated[float, option("--top-p", "Sample of the likeliest tokens of so much.")] = 1.0,
        seed: Annotated[int, option("--seed", "Of samples, the same on all ranks.")] = 0,
        device: Annotated[str, option("--device", "cpu, or cuda: a GPU a rank.")] = "cpu",
        dtype: Annotated[str, option("--dtype", "auto (the model's own), fp32, bf16, fp16.")] = "auto",
    ) -> int:
        """Continue a prompt whose K/V cache no rank could hold: it and the work are spread over a mesh.
        Starts ulysses x ring local ranks, or joins torchrun's. Weights are whole on every rank.
        """
        from seqmesh.generate.command import generate, request

        mesh = {"ulysses": ulysses, "ring": ring, "device": device, "dtype": dtype}
        sampling = {"temperature": temperature, "top_p": top_p, "seed": seed}
        return generate(request(model, prompt, new_tokens=new_tokens, chunk=chunk, **mesh, **sampling))


def _add_capabilities(app: "typer.Typer") -> None:
    import typer

    json = typer.Option("--json", help="Print JSON: every kernel, device, dtype and feature.")
    markdown = typer.Option("--markdown", help="Print the table as it stands in docs/kernels.md.")

    @app.command("capabilities")
    def capabilities_command(
        as_json: Annotated[bool, json] = False, as_markdown: Annotated[bool, markdown] = False
    ) -> int:
        """Say which kernel computes what, on which device and in which dtype, and why not the rest."""
        from seqmesh import kernel_table

        print(kernel_table.as_json() if as_json else kernel_table.text(as_markdown=as_markdown))
        return 0


def train(arguments: Sequence[str], *, dry_run: bool = False) -> int:
    """`seqmesh train`: the exit code. Input is checked here and in session.py, before a rank starts."""
    from seqmesh.train.recipe import load, split_arguments

    recipe, overrides = split_arguments(arguments)
    config = load(recipe, overrides)

    # Only now: these load torch and transformers.
    from seqmesh.foresee import FORESIGHT
    from seqmesh.train import session
    from seqmesh.train.launch import RankFailedError
    from seqmesh.train.stop import StoppedError

    if dry_run:
        print(session.dry_run(config, FORESIGHT))
        return 0
    try:
        report = session.run(config, session.place_from(os.environ, config), FORESIGHT)
    except RankFailedError as error:
        return _fail(str(error), FAILED)
    except StoppedError as stopped:
        if str(stopped):
            print(f"seqmesh: {stopped}", file=sys.stderr)
        return stopped.exit_code
    except OSError as error:
        return _fail(f"{_one_line(error)}; make room or choose another --folder", FAILED)
    except KeyboardInterrupt as interrupt:
        print(f"seqmesh: stopped by Ctrl-C {interrupt}".rstrip(), file=sys.stderr)
        return INTERRUPTED
    return 0 if report is None or report.ok else FAILED
