"""Pictures of a mesh and of a schedule, drawn from the real objects: what is executed is what is shown.

draw_schedule   the mask, each pair in the colour of the ring rank that computes it, and every rank's stages
draw_mesh       which ranks swap heads and which exchange K/V rows, and what each holds before and after
draw_chains     documents cut over ranks: pieces, the states that pass between them, halos
draw_both       the mesh above the schedule, in one picture
describe        the schedule as a table of text, for any size
"""

from seqmesh.picture.both import draw_both
from seqmesh.picture.chains import draw_chains
from seqmesh.picture.mesh import draw_mesh
from seqmesh.picture.schedule import draw_schedule
from seqmesh.picture.text import describe

__all__ = ["describe", "draw_both", "draw_chains", "draw_mesh", "draw_schedule"]
