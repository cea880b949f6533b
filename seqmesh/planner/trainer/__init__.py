"""The trainer as the planner sees it: its memory by formula, and traced."""
