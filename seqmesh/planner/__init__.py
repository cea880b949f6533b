"""`seqmesh plan`: a model, a cluster and a batch -> time and memory of every way to spread the work.

No torch; --trace-memory imports trace/, which has it, when it is asked for.

Reading order:
    inputs/      what is asked: a Job (model, cluster, sequence, stack), a Point (one way to run it), pins
    command.py   the command's modes; inputs/flags.py has its options
    search.py    candidates.py gives every point, cost/step.py estimates it, the best few remain
    cost/        time and bytes from the schedules that run, and memory at the peak (of `seqmesh train`:
                 train/memory/)
    reasons.py   why the best is best; remedies.py: what would fit; sensitivity.py: what the answer rests on
    output/      text, JSON, picture, timeline, recipe
    paper/       the paper's Table 2 for a model, and its measured tables beside the predictions

Other questions: longest.py, the longest sequence; one_attention.py, one attention alone.
"""
