"""Tries on this machine what a step is to be computed with, before it is used.

Each way is run forward and backward in a child process with a time limit, against a reference in
float64: what is wrong, crashes, hangs or is slower than another way is not used, and the reason is
kept. Nothing is tried twice on one device with one driver and one set of versions.

numbers     errors and what is allowed of them
attention   a rung over packed rows
nf4         4-bit weights there and back
products    matrix products by each BLAS library
child       the process that does it
device      what a result depends on
measure     the children, and the results kept on disk
ladder      a verdict for each rung, and those that may be used
right       everything that a run needs: an error where it is wrong

Nothing is imported here, so that the child has no more to import than it needs.
"""
