"""The paper's tables, beside this planner's predictions."""
