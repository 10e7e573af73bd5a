"""Measure base and tuned model on rows that were not trained on."""
