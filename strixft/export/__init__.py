"""Make what a server needs, and compare it with the trained model."""
