"""What the planner is told: numbers with units and names, read, written and refused."""

import subprocess
import sys
from typing import Any

import pytest
from wrong_input import refused

from seqmesh.planner.inputs.assumptions import Assumptions
from seqmesh.planner.inputs.hardware import GENERATIONS
from seqmesh.planner.inputs.kernels import NAMES
from seqmesh.planner.inputs.tables import read_data, unknown
from seqmesh.planner.inputs.units import (
    format_bytes,
    format_rate,
    format_seconds,
    format_tokens,
    parse_bytes,
    parse_tokens,
)

pytestmark = pytest.mark.fast


def test_tokens_are_read() -> None:
    given: list[str | int] = ["208K", "1.5M", "30000", 8192, "64k", " 1 M ", "0.5K"]
    assert [*map(parse_tokens, given)] == [212992, 1572864, 30000, 8192, 65536, 1048576, 512]


NO_TOKENS = [
    "",
    "K",
    "0",
    "-1",
    "-8K",
    0,
    -3,
    "1.5",
    "0.3K",
    "8G",
    "8KK",
    "1e5",
    "inf",
    "٣",
    "1_000",
    True,
    2.5,
    None,
]


@pytest.mark.parametrize("given", NO_TOKENS)
def test_what_is_no_number_of_tokens_is_refused_with_the_forms(given: Any) -> None:
    refused('"208K"', parse_tokens, given)
    refused(repr(given), parse_tokens, given)


def test_bytes_are_read() -> None:
    given: list[str | int] = ["80GiB", "64GB", "1.5GB", 7, "7", "512 B", "2tib", "1.1KiB"]
    assert [*map(parse_bytes, given)] == [85899345920, 64 * 10**9, 1500000000, 7, 7, 512, 2**41, 1126]


@pytest.mark.parametrize("given", ["80G", "GB", "0GB", "-1GB", 0, False, "80 giga", "nan", 1.5, "0.1B"])
def test_what_is_no_number_of_bytes_is_refused_with_the_forms(given: Any) -> None:
    refused('"80GiB"', parse_bytes, given)


def test_tokens_are_written_short_and_as_they_are_read() -> None:
    tokens = (212992, 1048576, 1572864, 30000, 1, 1024, 10**12 + 1)
    assert [*map(format_tokens, tokens)] == ["208K", "1M", "1536K", "30000", "1", "1K", "1000000000001"]
    assert tuple(map(parse_tokens, map(format_tokens, tokens))) == tokens


def test_bytes_and_rates_are_written_with_three_digits() -> None:
    amounts = (0, 999, 999.7, 81_604_378_624, 999_600_000, 99_960_000, -1.5e9, 5e18, float("inf"))
    assert [*map(format_bytes, amounts)] == [
        "0 B",
        "999 B",
        "1.00 KB",
        "81.6 GB",
        "1.00 GB",
        "100 MB",
        "-1.50 GB",
        "5000 PB",
        "inf B",
    ]
    assert (format_rate(2e11), format_rate(1.4726e14, "FLOP")) == ("200 GB/s", "147 TFLOP/s")


def test_seconds_are_written_in_the_unit_that_fits() -> None:
    short = (0, 5.6e-5, 0.0009996, 0.34, 12.34, -2.0, float("inf"))
    assert [*map(format_seconds, short)] == [
        "0 s",
        "56.0 µs",
        "1.00 ms",
        "340 ms",
        "12.3 s",
        "-2.00 s",
        "inf s",
    ]
    long = (59.96, 125, 3599.7, 12000, 86399, 3 * 86400 + 4 * 3600)
    assert [*map(format_seconds, long)] == [
        "1 min 0 s",
        "2 min 5 s",
        "1 h 0 min",
        "3 h 20 min",
        "1 d 0 h",
        "3 d 4 h",
    ]


def test_an_unknown_name_comes_with_the_nearest_and_all_known_ones() -> None:
    near = str(unknown("model", "Lama", ["LLaMA", "x"]))
    assert near == "unknown model 'Lama'; did you mean 'LLaMA'? known: LLaMA, x"
    assert str(unknown("model", "zz\n", ["abc"])) == "unknown model 'zz\\n'; known: abc"
    assert str(unknown("key", "a", [], "'f' [gpu.b]")) == "'f' [gpu.b]: unknown key 'a'; known: none"


def test_every_constant_and_every_type_of_model_in_the_data_means_something_once() -> None:
    assert list(read_data("assumptions.toml")) == [one.name for one in Assumptions().explain()]
    types = [name for family in read_data("model_types.toml")["family"] for name in family["types"]]
    assert len(types) == len(set(types))
    rates = read_data("kernels.toml")
    assert set(rates) == set(GENERATIONS)
    assert {name for kernels in rates.values() for name in kernels} == set(NAMES)


def test_the_inputs_need_no_torch() -> None:
    code = (
        "import sys, seqmesh.planner.inputs.models, seqmesh.planner.inputs.hardware;"
        " print({'torch', 'transformers', 'pydantic'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
