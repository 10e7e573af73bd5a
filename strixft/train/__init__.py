"""The loop around the training step: proof, checkpoints, resume."""
