"""Train one model three ways for 200 steps, and draw the losses in one picture, convergence.png.

python docs/pictures/convergence.py [FOLDER]        some minutes on 4 CPU ranks

The same text in the same order, from the same weights: data parallelism, as any trainer has it; a sequence
over ulysses 2 x ring 2; and over tp 2 x ring 2. What differs is the order in which numbers are added.
"""

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

STEPS = 200
MESHES = {
    "dp 4": ["--dp_shard=4", "--ulysses=1", "--ring=1", "--zero=3"],
    "ulysses 2 x ring 2": ["--ulysses=2", "--ring=2"],
    "tp 2 x ring 2": ["--tp=2", "--ulysses=1", "--ring=2"],
}
SIZES = ["--hidden=128", "--layers=2", "--intermediate=352", "--seq_len=2048", "--sequences=4"]
MORE = [f"--steps={STEPS}", "--warmup=20", "--compare_steps=0"]


def losses_of(mesh: list[str], folder: Path) -> list[float]:
    """Of a run of its own."""
    program = "from seqmesh.cli import main; main()"
    subprocess.run(
        [sys.executable, "-c", program, "train", *mesh, *SIZES, *MORE, f"--folder={folder}"], check=True
    )
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


def draw(losses: dict[str, list[float]], path: Path) -> None:
    """All curves above, and how far each is from the first below."""
    figure = Figure(figsize=(7, 5.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    curves, differences = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    (first, reference), *others = losses.items()
    steps = range(1, STEPS + 1)
    curves.plot(steps, reference, color="0.75", linewidth=6, label=first)
    for (name, found), color, width in zip(others, ("tab:blue", "tab:orange"), (2.5, 1.0), strict=True):
        curves.plot(steps, found, color=color, linewidth=width, label=name)
        far = [max(abs(a - b), 1e-8) for a, b in zip(found, reference, strict=True)]
        differences.plot(steps, far, color=color, linewidth=1, label=f"{name} against {first}")
    curves.set(ylabel="loss (nats per byte)", title=f"One model, three ways to split it, {STEPS} steps")
    differences.set(xlabel="step", ylabel="|Δ loss|", yscale="log")
    for axes in (curves, differences):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(path)


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    with TemporaryDirectory() as runs:
        found = {name: losses_of(mesh, Path(runs) / str(n)) for n, (name, mesh) in enumerate(MESHES.items())}
    draw(found, target / "convergence.png")
    (first, reference), *others = found.items()
    for name, losses in others:
        largest = max(abs(a - b) for a, b in zip(losses, reference, strict=True))
        last = f"the last {losses[-1]:.6f}, {reference[-1]:.6f}"
        print(f"{name} against {first}: |Δ loss| <= {largest:.1e}, {last}")
