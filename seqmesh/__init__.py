"""seqmesh: exact sequence parallelism for PyTorch.

Ulysses and ring attention on one mesh, for any mask, head count and length.

    mesh = seqmesh.SequenceMesh.build(ulysses=2, ring=2)
    schedule = seqmesh.Schedule.build(masks.causal(s), mesh)
    out = seqmesh.attention(schedule.shard(q, 1), schedule.shard(k, 1), schedule.shard(v, 1), schedule)

`masks`, `layouts` and `schedule` are pure Python and import without torch; the names below load torch on
first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from seqmesh import layouts, masks

if TYPE_CHECKING:
    from seqmesh.engine.attention import attention
    from seqmesh.engine.mesh import SequenceMesh
    from seqmesh.engine.sharding import Schedule
    from seqmesh.kernel_table import capabilities

__all__ = ["Schedule", "SequenceMesh", "attention", "capabilities", "layouts", "masks"]
__version__ = "0.1.0"

_HOMES = {
    "attention": "seqmesh.engine.attention",
    "SequenceMesh": "seqmesh.engine.mesh",
    "Schedule": "seqmesh.engine.sharding",
    "capabilities": "seqmesh.kernel_table",
}


def __getattr__(name: str) -> Any:
    """Load the engine when it is asked for: planner and pure part must neither wait for torch nor need it."""
    if name not in _HOMES:
        raise AttributeError(f"module 'seqmesh' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
