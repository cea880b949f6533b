"""Under autocast attention casts its inputs at entry, as PyTorch's own does: eager and compiled."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from hf_models import LENGTHS, inputs, model_of
from oracle import Case, build, local_inputs
from ranks import Ranks

from seqmesh import Schedule, SequenceMesh, attention, masks
from seqmesh.integrations.transformers import plug_in

pytestmark = pytest.mark.filterwarnings("default")  # PyTorch's compiler warns about itself


def dtypes(case: Case, compiled: bool) -> dict[str, torch.dtype]:
    """On one rank: dtypes of the output and of the gradients of fp32 inputs under bf16 autocast, checked."""
    schedule = build(case)
    (q, k, v), weights, _ = local_inputs(case, schedule)
    attend = attention
    if compiled:
        warnings.simplefilter("ignore")  # PyTorch's compiler warns about its own deprecations
        torch._dynamo.reset()
        attend = torch.compile(attention, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(q, k, v, schedule)
    (out * weights.to(out.dtype)).sum().backward()
    same = [x.detach().bfloat16().requires_grad_() for x in (q, k, v)]
    by_hand = attention(*same, schedule)
    (by_hand * weights.bfloat16()).sum().backward()
    assert torch.equal(out, by_hand)
    for x, y in zip((q, k, v), same, strict=True):
        assert torch.equal(x.grad, y.grad.float())
    return {"out": out.dtype, "dq": q.grad.dtype, "dk": k.grad.dtype, "dv": v.grad.dtype}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("mesh", [(1, 1), (2, 1), (1, 2)], ids=lambda m: f"u{m[0]}r{m[1]}")
def test_fp32_inputs_are_cast_to_autocasts_dtype_and_gradients_come_back_in_theirs(
    ranks: Ranks, mesh: tuple[int, int], compiled: bool
) -> None:
    case = Case(
        mask=masks.documents([20, 13]), ulysses=mesh[0], ring=mesh[1], kv_heads=2, dtype=torch.float32
    )
    for found in ranks.run(mesh[0] * mesh[1], dtypes, case, compiled):
        assert found == dict.fromkeys(("dq", "dk", "dv"), torch.float32) | {"out": torch.bfloat16}


def test_mixed_inputs_are_cast_alike_and_doubles_are_left_alone_as_pytorch_does() -> None:
    schedule = Schedule.build(masks.causal(9), SequenceMesh.build())
    q, k = torch.randn(2, 1, 9, 2, 8)
    v = torch.randn(1, 9, 2, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(q, k, v, schedule).dtype == torch.bfloat16
        double = attention(q.double(), k.double(), v.double(), schedule)
        sdpa = F.scaled_dot_product_attention(*(x.double().transpose(1, 2) for x in (q, k, v)))
    assert double.dtype == sdpa.dtype == torch.float64
    with pytest.raises(ValueError, match="one dtype is needed"):
        attention(q, k, v, schedule)


def test_a_plugged_in_model_runs_under_autocast() -> None:
    """Its rotary embedding gives fp32 queries and keys beside bf16 values."""
    ids, _, positions = inputs()
    model = plug_in(model_of("llama").float())
    schedule = Schedule.build(masks.documents(LENGTHS), SequenceMesh.build())
    want = model(ids, position_ids=positions, schedule=schedule).logits
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(ids, position_ids=positions, schedule=schedule).logits
    assert logits.dtype == torch.bfloat16
    assert (logits - want).abs().max() <= 2e-2 * want.abs().max()
    logits.float().square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
