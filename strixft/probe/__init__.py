"""Try on this device what a step is to be computed with, before it is used."""
