"""GPUs and clusters: presets say what data sheets say, users' files are read or refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from wrong_input import refused, toml

from seqmesh.planner.inputs.flags import PlanOptions
from seqmesh.planner.inputs.hardware import Cluster, known_clusters, known_gpus, load_cluster, load_gpu
from seqmesh.planner.inputs.request import build_cluster

pytestmark = pytest.mark.fast


GPU = """
[gpu.Ours]
tflops = 100
memory_gb = 48
memory_tb_per_s = 1
pcie_gb_per_s = 32
network_gb_per_s = 12.5
"""


def test_the_paper_s_node_is_known() -> None:
    gpu = load_gpu("A800-SXM")
    assert (gpu.flops_per_s, gpu.memory_bytes, gpu.memory_bytes_per_s) == (312e12, 85899345920, 2.04e12)
    assert (gpu.scale_up_bytes_per_s, gpu.pcie_bytes_per_s, gpu.network_bytes_per_s) == (200e9, 32e9, 25e9)
    assert gpu.network_bytes_per_s * 8 * 8 == 1.6e12  # 8 GPUs, 8 bits
    assert gpu.node_bytes_per_s == 200e9


def test_every_preset_says_its_source_and_is_unmeasured() -> None:
    assert {"a100-sxm", "a800-sxm", "h100-sxm", "h100-96gb-500w", "b200", "l20"} <= set(known_gpus())
    gpus = [load_gpu(name) for name in known_gpus()]
    assert all(gpu.source and not gpu.measured for gpu in gpus)
    # What the paper's tables were seen for is of the paper's GPUs alone.
    assert [gpu.name for gpu in gpus if "one_nic_per_partial_node" in gpu.overrides] == ["a800-sxm"]
    assert [gpu.name for gpu in gpus if gpu.scale_up_bytes_per_s is None] == [
        *("a100-pcie", "l20", "h100-pcie", "h100-nvl", "l40s", "rtx4090", "rtx5090")
    ]
    assert build_cluster(PlanOptions(gpu="gb200-nvl72", nodes=2)).gpus == 144
    assert load_gpu("l20").node_bytes_per_s == 32e9
    assert load_gpu("h200-sxm").memory_bytes == 141 * 10**9


def test_a_users_gpu_is_read(tmp_path: Path) -> None:
    gpu = load_gpu(
        "ours",
        [toml(tmp_path, GPU + 'source = "us"\nmeasured = true\n[gpu.Ours.assumptions]\nlatency_s = 1e-5\n')],
    )
    assert (gpu.name, gpu.flops_per_s, gpu.memory_bytes, gpu.scale_up_bytes_per_s) == (
        "Ours",
        100e12,
        48 * 10**9,
        None,
    )
    assert (gpu.network_bytes_per_s, gpu.source, gpu.measured, dict(gpu.overrides)) == (
        12.5e9,
        "us",
        True,
        {"latency_s": 1e-5},
    )
    assert len({gpu, gpu}) == 1


def test_a_gpu_is_like_another_but_for_what_it_says(tmp_path: Path) -> None:
    of_a = (
        '[gpu.a]\nlike = "A800-SXM"\nmemory_gb = 40\nscale_up_gb_per_s = 0\nmeasured = true\n'
        "[gpu.a.assumptions]\nx = 1\ny = 2\n"
    )
    file = toml(tmp_path, of_a + '[gpu.b]\nlike = "a"\ntflops = 1\n[gpu.b.assumptions]\ny = 3\n')
    a, b, a800 = load_gpu("a", [file]), load_gpu("b", [file]), load_gpu("a800-sxm")
    said: dict[str, Any] = {
        "memory_bytes": 40 * 10**9,
        "scale_up_bytes_per_s": None,
        "measured": True,
        "overrides": {"x": 1, "y": 2, "one_nic_per_partial_node": 1},
        "reported_bytes": None,  # of another memory than this one's
    }
    assert a == replace(a800, name="a", source="like a800-sxm", **said)
    # b was not measured itself.
    assert b == replace(
        a, name="b", flops_per_s=1e12, measured=False, overrides={**a.overrides, "y": 3}, source="like a"
    )


def test_a_measured_profile_goes_before_the_preset_that_it_is_like(tmp_path: Path) -> None:
    first = toml(tmp_path, '[gpu.l20]\nlike = "l20"\ntflops = 100\nmeasured = true\n')
    second = toml(tmp_path, '[gpu.l20]\nlike = "l20"\npcie_gb_per_s = 20\n', "second.toml")
    gpu = load_gpu("l20", [first, second])
    assert (gpu.flops_per_s, gpu.pcie_bytes_per_s, gpu.memory_bytes) == (100e12, 20e9, 48 * 10**9)
    assert load_gpu("l20", [second]).flops_per_s == 119.5e12
    assert known_gpus([first, second]) == known_gpus()


def test_gpus_that_are_like_each_other_are_refused(tmp_path: Path) -> None:
    file = toml(tmp_path, '[gpu.a]\nlike = "b"\n[gpu.b]\nlike = "a"\n[gpu.c]\nlike = "c"\n')
    refused("'a' like 'b' like 'a' has no end; give one of them its numbers", load_gpu, "a", [file])
    refused("[gpu.c]: unknown GPU 'c'; ", load_gpu, "c", [file])


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (
            GPU.replace("tflops", "tflop"),
            "lab.toml' [gpu.Ours]: unknown key 'tflop'; did you mean 'tflops'? known: like, tflops, ",
        ),
        (GPU.replace("tflops = 100", ""), "lab.toml' [gpu.Ours]: tflops is missing; add it"),
        (
            GPU.replace("memory_gb = 48", ""),
            "memory_gib (2^30 bytes) and memory_gb (10^9) are both missing; add one of them",
        ),
        (GPU + "memory_gib = 48", "both memory_gib and memory_gb; give one"),
        (GPU.replace("100", '"100"'), "tflops = '100' is not a finite number"),
        (GPU.replace("100", "true"), "tflops = True is not a finite number"),
        (GPU.replace("100", "0"), "tflops = 0 is not above zero; give a positive number"),
        (GPU.replace("100", "nan"), "tflops = nan is not a finite number"),
        (
            GPU.replace("100", "1" + "0" * 400),
            "is not a finite number up to 1e+15; give one, without quotes or unit",
        ),
        (GPU.replace("48", "1e-15"), "is not from 1e-09 to 1e+12"),
        (GPU + "scale_up_gb_per_s = -2", "scale_up_gb_per_s = -2 is not above zero"),
        (GPU + "measured = 1", "measured = 1 is not true or false"),
        (GPU + "assumptions = 1", "assumptions = 1 is not a table"),
        (GPU + "[gpu.Ours.assumptions]\nx = 'a'", "[gpu.Ours] assumptions: x = 'a' is not a finite number"),
        (GPU + 'like = "a80-sxm"', "[gpu.Ours]: unknown GPU 'a80-sxm'; did you mean 'a800-sxm'?"),
        (
            GPU + GPU.replace("Ours", "OURS"),
            "[gpu.OURS] is there twice but for upper and lower case; rename one",
        ),
        (
            GPU.replace("[gpu.Ours]", "[gpu]"),
            "lab.toml' [gpu]: tflops has no table of its own; name the table, as in [gpu.NAME]",
        ),
        (
            GPU.replace("[gpu.Ours]", "[gpus.Ours]"),
            "unknown section 'gpus'; did you mean 'gpu'? known: gpu, cluster, model",
        ),
        ("[gpu", "lab.toml' is not TOML: "),
        (GPU.replace("Ours", '"a\\nb"'), "unknown GPU 'ours'; known: a100-sxm, "),
    ],
)
def test_a_mistake_in_a_users_gpu_is_one_line(tmp_path: Path, text: str, rule: str) -> None:
    refused(rule, load_gpu, "ours", [toml(tmp_path, text)])


def test_an_unknown_gpu_or_file_is_refused(tmp_path: Path) -> None:
    refused("unknown GPU 'h100'; did you mean 'h100-sxm'? known: a100-sxm, ", load_gpu, "h100")
    form = "give a TOML file with tables [gpu.NAME], [cluster.NAME], [model.NAME]"
    refused(f"none.toml' does not exist; {form}", load_gpu, "l20", [tmp_path / "none.toml"])
    refused("cannot read ", load_gpu, "l20", [tmp_path])


def test_a_users_cluster_is_read(tmp_path: Path) -> None:
    lab = '[cluster.Lab]\ngpu = "a800-sxm"\nnodes = 2\ngpus_per_node = 8\n'
    file = toml(
        tmp_path, lab + lab.replace("Lab", "slow").replace("a800-sxm", "l20") + "network_gb_per_s = 1.25"
    )
    cluster = load_cluster("lab", [file])
    assert (cluster, cluster.gpus) == (Cluster(gpu=load_gpu("a800-sxm"), nodes=2, gpus_per_node=8), 16)
    assert load_cluster("slow", [file]).gpu == replace(load_gpu("l20"), network_bytes_per_s=1.25e9)
    ours = toml(tmp_path, lab.replace("a800-sxm", "ours"), "cluster.toml")
    assert load_cluster("lab", [ours, toml(tmp_path, GPU, "gpu.toml")]).gpu.name == "Ours"
    assert (known_clusters([file]), known_clusters()) == (["Lab", "slow"], [])


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("", "unknown cluster 'lab'; known: none; describe it as [cluster.NAME] in a TOML file"),
        ("[cluster.lav]", "unknown cluster 'lab'; did you mean 'lav'? known: lav"),
        (
            "[cluster.lab]\ngpus = 8",
            "[cluster.lab]: unknown key 'gpus'; did you mean 'gpu'? known: gpu, nodes, ",
        ),
        ("[cluster.lab]\nnodes = 8", "[cluster.lab]: gpu is missing; add it"),
        ("[cluster.lab]\ngpu = 'h21'", "[cluster.lab]: unknown GPU 'h21'; did you mean 'h20'?"),
        (
            "[cluster.lab]\ngpu = 'h20'\nnodes = 1\ngpus_per_node = 8.0",
            "gpus_per_node = 8.0 is not a whole number from 1",
        ),
        (
            "[cluster.lab]\ngpu = 'h20'\nnodes = 1\ngpus_per_node = 8\nnetwork_gb_per_s = 0",
            "network_gb_per_s = 0 is not above zero",
        ),
    ],
)
def test_a_mistake_in_a_users_cluster_is_one_line(tmp_path: Path, text: str, rule: str) -> None:
    refused(rule, load_cluster, "lab", [toml(tmp_path, text)])


def test_hardware_that_cannot_be_is_refused() -> None:
    gpu = load_gpu("h20")
    for rate in (0.0, -1.0, float("inf"), float("nan")):
        refused("_per_s=", lambda rate: replace(gpu, scale_up_bytes_per_s=rate), rate)
    for nodes in (0, -1, True, 2.0):
        refused(
            f"nodes={nodes!r} is not", lambda nodes: Cluster(gpu=gpu, nodes=nodes, gpus_per_node=8), nodes
        )
