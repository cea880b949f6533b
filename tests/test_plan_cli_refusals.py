"""Wrong input of `seqmesh plan`, of every kind: one line and exit code 2, with the remedy."""

from pathlib import Path

import pytest
from plan_command import JOB, KERNEL, Run

pytestmark = pytest.mark.fast


def test_a_profile_of_another_gpu_is_refused(plan: Run, tmp_path: Path) -> None:
    profile = tmp_path / "measured.toml"
    profile.write_text('[gpu.h100-sxm]\nlike = "h100-sxm"\nmeasured = true\n')
    code, _, error = plan(*JOB, "--profile", str(profile))
    assert code == 2
    assert "measures h100-sxm, not a800-sxm; use --gpu h100-sxm" in error


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ("--model", "lama3-8b", "--gpu", "a800-sxm"),
            "unknown model 'lama3-8b'; did you mean 'llama3-8b'? known: ",
        ),
        (("--model", "llama3-8b", "--gpu", "a80"), "unknown GPU 'a80'; did you mean 'a800-sxm'? known: "),
        (("--model", "llama3-8b"), "no GPU given; add --gpu"),
        (("--gpu", "l20"), "no model given; add --model"),
        ((*JOB, "--pin", "ulyses=2"), "unknown pin 'ulyses'; did you mean 'ulysses'? known: "),
        ((*JOB, "--pin", "tp"), "'tp' is not key=value"),
        ((*JOB, "--pin", "tp=two"), "'two' is not a whole number"),
        ((*JOB, "--pin", "tp=0"), "a degree is at least 1"),
        ((*JOB, "--pin", "zero=4"), "ZeRO has stages 0 to 3"),
        ((*JOB, "--pin", "tp=2,tp=4"), "contradict each other"),
        ((*JOB, "--pin", "checkpointing=ful"), "did you mean 'full'?"),
        ((*JOB, "--pin", "tp=8,ulysses=8"), "= 64 ranks on 16 GPUs"),
        ((*JOB, "--pin", "dp=2"), "does not divide global_batch=1"),
        ((*JOB, "--seq-len", "many"), "'many' is not a number of tokens"),
        ((*JOB, "--memory-limit", "2GB"), "nothing fits: "),
        ((*JOB, "--assume", "netwrk=1"), "did you mean 'network'?"),
        ((*JOB, "--assume", "network=1.5"), "it is a share; use at most 1"),
        ((*JOB, "--assume", "network=nan"), "use a positive finite number"),
        ((*JOB, "--layout", "zickzack"), "did you mean 'zigzag'?"),
        ((*JOB, "--precision", "fp8"), "unknown precision 'fp8'"),
        ((*JOB, "--precision", "fp8-linear"), "no tflops_fp8"),
        ((*JOB, "--attention", "fa3"), "use --attention fa2"),
        ((*JOB, "--attention", "fa4"), "unknown kernel of attention 'fa4'"),
        ((*JOB, "--pin", "pipeline=interleaved,virtual=2,pp=1"), "use pp >= 2"),
        ((*JOB, "--documents", "normal:3"), "is none of: lognormal"),
        ((*JOB, "--documents", "lognormal:x,1"), "two numbers"),
        ((*JOB, "--axes", "tp,ulysses,ring,dp"), "must name each of"),
        ((*JOB, "--global-batch", "0"), "use a whole number of at least 1"),
        ((*JOB, "--heads", "8"), "--heads is an option of --kernel"),
        ((*KERNEL, "--model", "llama3-8b"), "--model has no meaning with --kernel"),
        ((*KERNEL, "--pin", "ulysses=3"), "ulysses x ring must be 8"),
        ((*KERNEL, "--pin", "tp=2"), "has no meaning with --kernel"),
        (("--kernel", "--gpu", "l20"), "--kernel needs --heads"),
        ((*KERNEL, "--emit", "x.toml"), "--emit has no meaning with --kernel"),
        ((*KERNEL, "--max-seq"), "--max-seq has no meaning with --kernel"),
        ((*JOB, "--compare", "--pin", "tp=2"), "--pin has no meaning with --compare"),
        ((*JOB, "--trace-memory", "--layout", "zigzag"), "--layout has no meaning with --trace-memory"),
        (("--published", "--json"), "--json has no meaning with --published"),
        ((*JOB, "--stack", "trainer", "--gradients", "bf16"), "sums gradients in fp32"),
        ((*JOB, "--precision", "fp32", "--gradients", "bf16"), "gradients have the weights' precision"),
        ((*JOB, "--modle", "x"), "did you mean --model?"),
        (("--model", "llama3-8b", "--gpu", "[/bold]"), "unknown GPU '[/bold]'"),
        ((*JOB, "--max-seq", "--pin", "tp=3"), "no legal mesh with tp=3"),
        ((*JOB, "--assume", "attention_half_rows=1e308"), "from 1e-09 to 1e+15"),
        ((*JOB, "--memory-limit", "100GiB"), "use less, or correct the GPU"),
        ((*JOB, "--global-batch", "1" + "0" * 21), "is a slip"),
        ((*JOB, "--documents", "fixed:1"), "more than 20000 documents"),
        ((*JOB, "--stack", "trainer", "--pin", "offload=optimizer,zero=1"), "use zero=2 or 3"),
        ((*JOB, "--top", "1000"), "at most 100 are shown"),
        ((*JOB, "--emit", "/no/such/folder/x.toml"), "cannot write '/no/such/folder/x.toml'"),
        ((*JOB, "--hardware", "/no/such.toml"), "/no/such.toml"),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, tuple) else "",
)
def test_wrong_input_is_one_line_with_the_remedy_and_exit_code_2(
    plan: Run, arguments: tuple[str, ...], said: str
) -> None:
    code, out, error = plan(*arguments)
    assert (code, out) == (2, "")
    assert error.startswith("seqmesh: error: ")
    assert error.count("\n") == 1
    assert said in error


def test_nothing_fits_names_the_shortfall_and_the_cheapest_remedy(plan: Run) -> None:
    _, _, error = plan("--model", "llama3-405b", "--gpu", "a800-sxm", "--seq-len", "1M")
    assert "too much; --nodes" in error
