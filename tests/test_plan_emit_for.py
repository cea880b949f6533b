"""Plans as command lines of torchtitan and Megatron-LM: the ranks add up, and what is not run is named."""

import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from seqmesh.planner.inputs.documents import parse_documents
from seqmesh.planner.inputs.hardware import Cluster, load_gpu
from seqmesh.planner.inputs.job import Job
from seqmesh.planner.inputs.models import load_model
from seqmesh.planner.inputs.numerics import PRECISIONS
from seqmesh.planner.inputs.point import Point
from seqmesh.planner.inputs.stack import stack_named
from seqmesh.planner.output.emit import emit
from seqmesh.planner.output.emit_for import PROGRAMS, emit_for

pytestmark = pytest.mark.fast


def job(model: str = "llama3-8b", batch: int = 8) -> Job:
    cluster = Cluster(gpu=load_gpu("h100-sxm"), nodes=2, gpus_per_node=8)
    return Job(model=load_model(model), cluster=cluster, seq_len=65536, global_batch=batch)


def flags_of(text: str) -> dict[str, str]:
    """The flags of a script's command, with their values."""
    command = text[text.index("\n", text.rindex("\n#") + 1) :]
    words = shlex.split(command.replace("\\\n", " "))
    found: dict[str, str] = {}
    for word in words[next(n for n, word in enumerate(words) if word.startswith("--")) :]:
        if word.startswith("--"):
            name = word
            found[name] = ""
        else:
            found[name] = f"{found[name]} {word}".strip()
    return found


POINTS = [
    Point(ulysses=8, ring=2, zero=3),
    Point(tp=4, ring=2, dp=2, zero=1),
    Point(dp=16, zero=0),
    Point(tp=2, pp=2, dp=2, ulysses=2, zero=2, checkpointing="full", micro_batch=2),
]


@pytest.mark.parametrize("point", POINTS, ids=str)
def test_the_degrees_of_a_command_are_the_ranks_of_the_machine(point: Point) -> None:
    asked = job(batch=16)
    titan = flags_of(emit_for("torchtitan", asked, point)[0])
    degrees = [int(value) for name, value in titan.items() if name.endswith("_degree")]
    product = 1
    for degree in degrees:
        product *= degree
    assert product == asked.cluster.gpus
    assert titan["--activation_checkpoint.mode"] == point.checkpointing
    megatron = flags_of(emit_for("megatron", asked, point)[0])
    ranks = int(megatron["--tensor-model-parallel-size"]) * int(megatron["--context-parallel-size"])
    assert ranks * int(megatron["--pipeline-model-parallel-size"]) * point.dp == asked.cluster.gpus
    assert ("--sequence-parallel" in megatron) == (point.tp > 1)
    assert int(megatron["--micro-batch-size"]) == point.micro_batch
    assert int(megatron["--global-batch-size"]) == 16 == int(titan["--training.global_batch_size"])


def test_unified_sequence_parallelism_is_megatrons_hierarchy_and_torchtitans_one_ring() -> None:
    point = Point(ulysses=8, ring=2, zero=3)
    megatron = flags_of(emit_for("megatron", job(), point)[0])
    assert megatron["--cp-comm-type"] == "a2a+p2p"
    assert megatron["--hierarchical-context-parallel-sizes"] == "8 2"
    assert flags_of(emit_for("megatron", job(), point.but(ulysses=16, ring=1))[0])["--cp-comm-type"] == "a2a"
    assert flags_of(emit_for("megatron", job(), point.but(ulysses=1, ring=16))[0])["--cp-comm-type"] == "p2p"
    text, missing = emit_for("torchtitan", job(), point)
    assert flags_of(text)["--parallelism.context_parallel_degree"] == "16"
    assert any(line.startswith("ulysses=8") for line in missing)
    _, missing = emit_for("megatron", job(), point.but(ulysses=16, ring=1))
    assert any(line.startswith("ulysses=16 with 8 K/V heads") for line in missing)


@pytest.mark.parametrize(
    ("zero", "sharding"), [(0, None), (1, None), (2, "optim_grads"), (3, "optim_grads_params")]
)
def test_zero_stages_in_their_words(zero: int, sharding: str | None) -> None:
    point = Point(dp=16, zero=zero)
    megatron = flags_of(emit_for("megatron", job(batch=16), point)[0])
    assert ("--use-distributed-optimizer" in megatron) == (zero > 0)
    assert megatron.get("--data-parallel-sharding-strategy") == sharding
    titan, missing = emit_for("torchtitan", job(batch=16), point)
    shards = flags_of(titan)["--parallelism.data_parallel_shard_degree"]
    assert shards == ("1" if zero == 0 else "16")
    assert flags_of(titan).get("--parallelism.fsdp_reshard_after_forward") == {0: None, 3: "always"}.get(
        zero, "never"
    )
    assert any(line.startswith("zero=1") for line in missing) == (zero == 1)


@pytest.mark.parametrize("program", PROGRAMS)
def test_what_neither_runs_is_named_and_the_script_is_one(program: str, tmp_path: Path) -> None:
    documents = parse_documents("fixed:8K", 65536, sequences=8)
    asked = replace(job("qwen3-8b"), documents=documents)
    point = Point(ring=16, zero=3, micro_batch=8, pool=True, tiling="mlp")
    text, missing = emit_for(program, replace(asked, axes=("ring", "tp", "ulysses", "dp", "pp")), point)
    subjects = {line.partition(":")[0] for line in missing}
    assert {"one pool", "64 documents", "tiling=mlp", "time and memory", "data"} <= subjects
    for line in missing:
        assert f"# - {line}\n" in text
    (tmp_path / "plan.sh").write_text(text)
    done = subprocess.run(["sh", "-n", str(tmp_path / "plan.sh")], check=False, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_an_unknown_program_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown program 'deepspeed'.*torchtitan, megatron"):
        emit_for("deepspeed", job(), POINTS[0])


def test_a_models_name_cannot_add_a_command() -> None:
    named = replace(load_model("llama3-8b"), name="x\nrm -rf / #$(ls)")
    for program in PROGRAMS:
        text, _ = emit_for(program, replace(job(), model=named), POINTS[0])
        assert all(line.startswith(("#", "torchrun", "NGPU", "    --")) for line in text.splitlines())
        assert "$(" not in "".join(line for line in text.splitlines() if not line.startswith("#"))


@pytest.mark.parametrize("program", PROGRAMS)
def test_an_order_of_stages_and_a_precision_that_the_command_does_not_ask_for_are_named(program: str) -> None:
    point = Point(tp=2, pp=2, dp=4, micro_batch=1, pipeline="zero-bubble")
    text, missing = emit_for(program, replace(job(), numerics=PRECISIONS["fp8-linear"]), point)
    for said in ("pipeline=zero-bubble: this command runs 1f1b", "products in fp8"):
        assert any(line.startswith(said) for line in missing)
        assert said in text
    _, of_recipe = emit(replace(job(), numerics=PRECISIONS["fp8-linear"]), Point(ring=16, zero=3))
    assert any(line.startswith("products in fp8") for line in of_recipe)
    assert not any("1f1b" in line or "fp8" in line for line in emit_for(program, job(), POINTS[3])[1])


def test_interleaved_stages_in_their_words() -> None:
    """32 layers on 2 ranks of 4 stages: 4 layers each; 3 stages would not be alike."""
    point = Point(tp=2, pp=2, dp=4, pipeline="interleaved", virtual=4)
    for program, flags in (
        ("megatron", {"--num-layers-per-virtual-pipeline-stage": "4"}),
        (
            "torchtitan",
            {
                "--parallelism.pipeline_parallel_schedule": "Interleaved1F1B",
                "--parallelism.pipeline_parallel_layers_per_stage": "4",
                "--parallelism.pipeline_parallel_first_stage_less_layers": "0",
                "--parallelism.pipeline_parallel_last_stage_less_layers": "0",
            },
        ),
    ):
        text, missing = emit_for(program, job(), point)
        assert flags.items() <= flags_of(text).items()
        assert not any("pipeline" in line for line in missing)
        text, missing = emit_for(program, job(), point.but(virtual=3))
        assert not {*flags} - {"--parallelism.pipeline_parallel_schedule"} & {*flags_of(text)}
        assert flags_of(text).get("--parallelism.pipeline_parallel_schedule", "1F1B") == "1F1B"
        assert any(line.startswith("pipeline=interleaved: this command runs 1f1b") for line in missing)


def test_embedding_and_head_may_be_counted_as_layers_of_stages() -> None:
    """Llama 3's own: 126 layers and both ends in 128 stages, one each."""
    point = Point(tp=8, pp=16, dp=16, pipeline="interleaved", virtual=8)
    asked = replace(job("llama3-405b"), cluster=replace(job().cluster, nodes=256), global_batch=256)
    flags = flags_of(emit_for("megatron", asked, point)[0])
    assert flags["--num-layers-per-virtual-pipeline-stage"] == "1"
    ends = {"--account-for-embedding-in-pipeline-split", "--account-for-loss-in-pipeline-split"}
    assert ends <= {*flags}
    assert not ends & {*flags_of(emit_for("megatron", asked, point.but(pp=9, virtual=7, dp=1))[0])}
    titan = flags_of(emit_for("torchtitan", asked, point)[0])
    assert titan["--parallelism.pipeline_parallel_layers_per_stage"] == "1"
    assert titan["--parallelism.pipeline_parallel_first_stage_less_layers"] == "1"


def test_what_nvidias_recipes_run_besides_is_asked_for() -> None:
    asked = replace(job("qwen3-30b-a3b"), stack=stack_named("megatron-bridge"))
    flags = flags_of(emit_for("megatron", asked, Point(dp=16, zero=1, experts=8))[0])
    assert flags["--moe-token-dispatcher-type"] == "flex"
    assert "--moe-enable-deepep" in flags
    assert "--tp-comm-overlap" not in flags
    assert "--tp-comm-overlap" in flags_of(emit_for("megatron", asked, Point(tp=2, dp=8))[0])
    assert not any(
        line.startswith("time and memory") for line in emit_for("megatron", asked, Point(dp=16))[1]
    )
    plain = replace(asked, stack=stack_named("megatron"))
    assert not {"--moe-enable-deepep", "--tp-comm-overlap"} & {
        *flags_of(emit_for("megatron", plain, Point(dp=16, zero=1, experts=8))[0]),
        *flags_of(emit_for("megatron", plain, Point(tp=2, dp=8))[0]),
    }
