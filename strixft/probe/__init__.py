"""Attention, 4-bit weights and BLAS, tried on this device before they are used."""
