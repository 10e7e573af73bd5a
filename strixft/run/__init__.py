"""A run is a folder: results by stage, status, lock, resume."""
