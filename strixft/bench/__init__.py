"""Measure the device and the step on it."""
