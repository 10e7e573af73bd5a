"""The YAML file: found, read, checked."""
