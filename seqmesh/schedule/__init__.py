"""Schedules: what travels between ranks and what each computes, as data (docs/schedules.md).

ring.py       stages of one ring rank: rows to send and receive, blocks to compute
hops.py       which hops each stage is made of
peers.py      what a rank exchanges with every other: pieces.py by search, stripes.py by arithmetic
coalesce.py   fewer blocks with the same pairs
heads.py      heads of each ulysses rank
traffic.py    bytes that follow from both
"""

from seqmesh.schedule.coalesce import coalesce
from seqmesh.schedule.hops import LATENCY_ROWS, Stages, exchanges
from seqmesh.schedule.ring import RingSchedule, Stage, Transfer, ring_schedule

__all__ = [
    "LATENCY_ROWS",
    "RingSchedule",
    "Stage",
    "Stages",
    "Transfer",
    "coalesce",
    "exchanges",
    "ring_schedule",
]
