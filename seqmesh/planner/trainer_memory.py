"""stub"""

from seqmesh.planner.models import ModelShape


def check_trainable(shape: ModelShape) -> None:
    """x"""
