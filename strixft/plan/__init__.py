"""The memory-fit plan: the training step itself, run on tensors without storage."""
