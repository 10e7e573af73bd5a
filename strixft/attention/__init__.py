"""Backends of attention, the masks they need, and the one to take."""
