"""Schedules: what travels between ranks and what each computes, as data (docs/schedules.md).

ring.py       stages of one ring rank: rows to send and receive, blocks to compute
heads.py      heads of each ulysses rank
traffic.py    bytes that follow from both
"""

from seqmesh.schedule.ring import RingSchedule, Stage, Transfer, coalesce, ring_schedule

__all__ = ["RingSchedule", "Stage", "Transfer", "coalesce", "ring_schedule"]
