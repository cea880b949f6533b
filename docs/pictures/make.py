"""Draw the pictures of the README and of the docs anew, next to this file.

python docs/pictures/make.py [FOLDER]
"""

import sys
from pathlib import Path

from seqmesh import layouts, masks
from seqmesh.picture import draw_chains, draw_mesh, draw_schedule
from seqmesh.planner.cost.step import CostModel
from seqmesh.planner.inputs.hardware import Cluster, load_gpu
from seqmesh.planner.inputs.job import Job
from seqmesh.planner.inputs.models import load_model
from seqmesh.planner.output.plot import plot
from seqmesh.planner.search import search

DOCUMENTS = (700, 90, 260, 60, 420, 130, 40, 348)
PAIRS_PER_ROW = 10.0
"""Documents are short here, so that they can be seen; with the default of 1000 a row would cost more than
computing alone.
"""


def make(folder: Path) -> None:
    """Write mesh.png, zigzag.png, documents.png, chains.png and plan.png."""
    draw_mesh(4, 2, folder / "mesh.png")
    draw_schedule(masks.causal(64), layouts.zigzag(64, 4), folder / "zigzag.png")
    packed = masks.documents(DOCUMENTS)
    draw_schedule(packed, layouts.balanced(packed, 4, pairs_per_row=PAIRS_PER_ROW), folder / "documents.png")
    draw_chains(masks.documents((44, 20)), layouts.zigzag(64, 4), folder / "chains.png")
    cluster = Cluster(gpu=load_gpu("a800-sxm"), nodes=2, gpus_per_node=8)
    job = Job(model=load_model("llama3-8b"), cluster=cluster, seq_len=208 * 1024)
    title = "llama3-8b, 208K tokens, global batch 1, 2 x 8 a800-sxm"
    plot(search(CostModel(job), pins={}).best, job.capacity, folder / "plan.png", title)


if __name__ == "__main__":
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
