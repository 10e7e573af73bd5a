"""Check the machine: findings with what to type."""
