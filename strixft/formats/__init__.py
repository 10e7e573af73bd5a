"""Formats of the rows of data sets, and their way to a chat."""
