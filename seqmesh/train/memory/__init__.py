"""Memory of a rank in a step of `seqmesh train`, by formula: from shapes alone, without torch.

Start reading in peak.py. The planner chooses by it, and trace/of_rank.py runs the step beside it.
"""
