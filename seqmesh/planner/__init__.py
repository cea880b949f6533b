"""`seqmesh plan`: a model, a cluster and a batch -> time and memory of every way to spread the work.

No torch.

Reading order:
    command.py -> request.py -> job.py          what is asked: a Job (models.py, hardware.py, assumptions.py, data/) and pins
    search.py -> cost.py -> price.py            every legal Point, priced
    ring_load.py, attention.py, compute.py, network.py     time and bytes, from the schedules that run
    memory.py, trainer_memory.py                bytes at the peak: of a plan, of `seqmesh train` as it stands (tracing.py traces it)
    reasons.py, report.py, records.py           why, as text, as JSON; plot.py, timeline.py, emit.py: as files
    kernel.py, compare.py, longest.py           other questions: one attention, the paper's Table 2, the longest sequence
    published.py                                the paper's measured tables beside the predictions
"""
