"""What a step costs: memory, seconds, bytes."""
