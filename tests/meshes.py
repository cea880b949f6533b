"""The meshes of a rank of the pool: one for each of the degrees that its tests ask for."""

from functools import cache

from seqmesh.parallel import ParallelDims, ParallelMesh


@cache
def mesh_of(dims: ParallelDims) -> ParallelMesh:
    """The mesh of these degrees. Its groups live as long as the rank does (see Ranks.end)."""
    return dims.build()
