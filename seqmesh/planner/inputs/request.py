"""What the command line says, checked: a `Job` and pins from text.

Every mistake is a one-line ValueError with its remedy.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from seqmesh.planner.inputs.assumptions import Assumptions
from seqmesh.planner.inputs.documents import parse_documents
from seqmesh.planner.inputs.hardware import Cluster, Gpu, known_gpus_of, load_cluster, load_gpu
from seqmesh.planner.inputs.job import Job
from seqmesh.planner.inputs.kernels import assumptions_of
from seqmesh.planner.inputs.point import AXES, CHOICES, KEYS
from seqmesh.planner.inputs.shape import ModelShape
from seqmesh.planner.inputs.stack import SeqmeshStack, Stack, stack_named
from seqmesh.planner.inputs.tables import unknown
from seqmesh.planner.inputs.units import parse_bytes, parse_tokens

DEALINGS = ("evened", "in-turn")
"""Values of `--dealing`: by the area of documents, as `seqmesh train` does, or by tokens alone."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where to run."""

    gpu: str | None = None
    """A preset, or a name from `files`."""
    cluster: str | None = None
    """A [cluster.NAME] of `files`, in place of a GPU and numbers."""
    nodes: int | None = None
    gpus_per_node: int | None = None
    hardware: tuple[Path, ...] = ()
    """TOML files with GPUs, clusters and models."""
    profiles: tuple[Path, ...] = ()
    """The same, measured: they go before the others, and must be of the GPU that is planned for."""

    @property
    def files(self) -> tuple[Path, ...]:
        """All of them, later ones going before earlier ones."""
        return (*self.hardware, *self.profiles)


@dataclass(frozen=True, kw_only=True)
class Request:
    """The options that describe a job, as they were given."""

    machine: Machine
    seq_len: str = "8K"
    global_batch: int = 1
    documents: str | None = None
    dealing: str = "evened"
    """Of sequences with documents to data-parallel groups: one of DEALINGS."""
    layout: str = "auto"
    stack: str = "seqmesh"
    attention: str | None = None
    """Kernel of attention; None: the stack's own."""
    precision: str | None = None
    """None: the stack's own."""
    gradients: str = "fp32"
    memory_limit: str | None = None
    axes: str = ",".join(AXES)
    assume: tuple[str, ...] = ()


def build_job(request: Request, model: ModelShape) -> Job:
    """The job that a request describes, for a model.

    Raises:
        ValueError: in one line, whatever is wrong with it.
    """
    cluster = build_cluster(request.machine)
    _check_profiles(request.machine.profiles, cluster.gpu.name)
    seq_len = parse_tokens(request.seq_len)
    stack = stack_named(request.stack, request.attention)
    if request.dealing not in DEALINGS:
        raise unknown("dealing", request.dealing, DEALINGS)
    if request.documents is None and request.dealing != DEALINGS[0]:
        raise ValueError(f"--dealing {request.dealing} without --documents: sequences are alike; remove it")
    return Job(
        model=model,
        cluster=cluster,
        seq_len=seq_len,
        global_batch=request.global_batch,
        documents=_documents(request, seq_len),
        evened=request.dealing == "evened",
        layout=request.layout,
        stack=stack,
        numerics=stack.numerics(request.precision, request.gradients),
        assumptions=assumptions_for(cluster.gpu, request.assume, stack),
        memory_limit=None if request.memory_limit is None else parse_bytes(request.memory_limit),
        axes=parse_axes(request.axes),
    )


def _documents(request: Request, seq_len: int) -> tuple[int, ...]:
    if request.documents is None:
        return ()
    return parse_documents(request.documents, seq_len, sequences=request.global_batch)


def build_cluster(machine: Machine) -> Cluster:
    """The cluster; numbers given beside a named cluster override its own.

    One node, of 8 GPUs (of GB200 NVL72: 72), unless said otherwise.

    Raises:
        ValueError: no GPU, an unknown one, or one that the named cluster does not have.
    """
    if machine.cluster is not None:
        return _named_cluster(machine.cluster, machine)
    if machine.gpu is None:
        raise ValueError("no GPU given; add --gpu NAME (see --help), or --cluster NAME with --hardware FILE")
    gpu = load_gpu(machine.gpu, machine.files)
    return Cluster(
        gpu=gpu,
        nodes=1 if machine.nodes is None else machine.nodes,
        gpus_per_node=gpu.gpus_per_node if machine.gpus_per_node is None else machine.gpus_per_node,
    )


def _named_cluster(name: str, machine: Machine) -> Cluster:
    named = load_cluster(name, machine.files)
    gpu = named.gpu
    if machine.gpu is not None and machine.gpu.lower() != gpu.name.lower():
        raise ValueError(
            f"--cluster {name} has GPUs of kind {gpu.name}, not {machine.gpu}; remove --gpu, or --cluster"
        )
    return Cluster(
        gpu=gpu,
        nodes=named.nodes if machine.nodes is None else machine.nodes,
        gpus_per_node=named.gpus_per_node if machine.gpus_per_node is None else machine.gpus_per_node,
    )


def _check_profiles(profiles: Iterable[Path], gpu: str) -> None:
    """Raise ValueError for a profile of another GPU than the one planned for: it would change nothing."""
    for path in profiles:
        measured = known_gpus_of(path)
        if gpu.lower() not in (name.lower() for name in measured):
            named = ", ".join(measured) or "no GPU"
            remedy = f"use --gpu {measured[0] if measured else 'NAME'}"
            raise ValueError(f"--profile {str(path)!r} measures {named}, not {gpu}; {remedy}")


def assumptions_for(gpu: Gpu, given: Sequence[str], stack: Stack | None = None) -> Assumptions:
    """The assumptions of a stack on a GPU, overridden by `--assume name=value`.

    Raises:
        ValueError: an unknown name, text that is no number, or a number out of range.
    """
    assumed = assumptions_of(gpu, stack or SeqmeshStack())
    wanted: dict[str, float] = {}
    for name, text in _pairs(given, "--assume", "network=0.7"):
        try:
            wanted[name] = float(text)
        except ValueError:
            raise ValueError(
                f"--assume {name}={text}: {text!r} is not a number; write for example {name}=0.7"
            ) from None
    return assumed.override(wanted, "--assume")


def parse_pins(given: Sequence[str]) -> dict[str, int | str]:
    """`tp=8,zero=1,checkpointing=none` as a dictionary.

    Raises:
        ValueError: an unknown key, a value of another kind, or a key pinned to two values.
    """
    pins: dict[str, int | str] = {}
    for key, text in _pairs(given, "--pin", "tp=8,ring=2"):
        if key not in KEYS:
            raise unknown("pin", key, KEYS)
        value = _pin(key, text)
        if pins.get(key, value) != value:
            raise ValueError(
                f"--pin {key}={pins[key]} and {key}={value} contradict each other; give {key} once"
            )
        pins[key] = value
    return pins


def _pin(key: str, text: str) -> int | str:
    if key in CHOICES:
        if text not in CHOICES[key]:
            raise unknown(f"value of {key}", text, CHOICES[key])
        return text
    if key == "pool":
        if text not in ("true", "false"):
            raise unknown("value of pool", text, ("true", "false"))
        return text == "true"
    if not (text.isascii() and text.isdigit()) or len(text) > 9:
        raise ValueError(f"--pin {key}={text}: {text!r} is not a whole number; write for example {key}=2")
    number = int(text)
    if key == "zero" and number > 3:
        raise ValueError(f"--pin zero={text}: ZeRO has stages 0 to 3; use one of them")
    if key != "zero" and number < 1:
        raise ValueError(f"--pin {key}={text}: a degree is at least 1; use {key}=1 for none")
    return number


def _pairs(given: Iterable[str], option: str, example: str) -> Iterable[tuple[str, str]]:
    """Key and value of each `key=value`, which may be given together with commas or one by one."""
    for text in given:
        for item in text.split(","):
            key, equals, value = item.partition("=")
            if not equals or not key.strip() or not value.strip():
                raise ValueError(
                    f"{option} {text!r}: {item!r} is not key=value; write for example {option} {example}"
                )
            yield key.strip().replace("-", "_"), value.strip()


def parse_axes(text: str) -> tuple[str, ...]:
    """`tp,ulysses,ring,dp,pp` from the fastest links to the slowest, in any order."""
    axes = tuple(part.strip() for part in text.split(","))
    for axis in axes:
        if axis not in AXES:
            raise unknown("axis", axis, AXES)
    return axes
