"""Keep a run inside its memory budget. On unified memory an over-commit freezes the host."""
