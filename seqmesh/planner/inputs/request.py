"""What the command line says, checked: a `Job` and pins from text.

Every mistake is a one-line ValueError with its remedy.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from seqmesh.planner.inputs.assumptions import Assumptions
from seqmesh.planner.inputs.documents import parse_documents
from seqmesh.planner.inputs.flags import PlanOptions
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


def build_job(options: PlanOptions, model: ModelShape) -> Job:
    """The job that the options describe, for a model.

    Raises:
        ValueError: in one line, whatever is wrong with it.
    """
    cluster = build_cluster(options)
    _check_profiles(options.profile or (), cluster.gpu.name)
    seq_len = parse_tokens(options.seq_len)
    stack = stack_named(options.stack, options.attention)
    if options.dealing not in DEALINGS:
        raise unknown("dealing", options.dealing, DEALINGS)
    if options.documents is None and options.dealing != DEALINGS[0]:
        raise ValueError(f"--dealing {options.dealing} without --documents: sequences are alike; remove it")
    return Job(
        model=model,
        cluster=cluster,
        seq_len=seq_len,
        global_batch=options.global_batch,
        documents=_documents(options, seq_len),
        evened=options.dealing == "evened",
        layout=options.layout,
        stack=stack,
        numerics=stack.numerics(options.precision, options.gradients),
        assumptions=assumptions_for(cluster.gpu, options.assume or (), stack),
        memory_limit=None if options.memory_limit is None else parse_bytes(options.memory_limit),
        axes=parse_axes(options.axes),
    )


def _documents(options: PlanOptions, seq_len: int) -> tuple[int, ...]:
    if options.documents is None:
        return ()
    return parse_documents(options.documents, seq_len, sequences=options.global_batch)


def build_cluster(options: PlanOptions) -> Cluster:
    """The cluster; numbers given beside a named cluster override its own.

    One node, of 8 GPUs (of GB200 NVL72: 72), unless said otherwise.

    Raises:
        ValueError: no GPU, an unknown one, or one that the named cluster does not have.
    """
    cluster = _named_cluster(options.cluster, options) if options.cluster is not None else _node_of(options)
    return replace(
        cluster,
        nodes=cluster.nodes if options.nodes is None else options.nodes,
        gpus_per_node=cluster.gpus_per_node if options.gpus_per_node is None else options.gpus_per_node,
    )


def _node_of(options: PlanOptions) -> Cluster:
    if options.gpu is None:
        raise ValueError("no GPU given; add --gpu NAME (see --help), or --cluster NAME with --hardware FILE")
    gpu = load_gpu(options.gpu, options.files)
    return Cluster(gpu=gpu, nodes=1, gpus_per_node=gpu.gpus_per_node)


def _named_cluster(name: str, options: PlanOptions) -> Cluster:
    named = load_cluster(name, options.files)
    kind = named.gpu.name
    if options.gpu is not None and options.gpu.lower() != kind.lower():
        raise ValueError(
            f"--cluster {name} has GPUs of kind {kind}, not {options.gpu}; remove --gpu, or --cluster"
        )
    return named


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
