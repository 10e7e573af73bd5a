"""Rows of a file → chats → token rows with a mask of what is trained → batches.

Shapes: B rows, T tokens, K trained tokens of a batch.
"""

from strixft.data.batches import Batch, collate, shape_batch
from strixft.data.load import Problem, RawRow, read_rows
from strixft.data.mask import Encoder, TokenRow
from strixft.data.order import largest_batch, training_order
from strixft.data.rows import TokenRows, write_rows

__all__ = [
    "Batch",
    "Encoder",
    "Problem",
    "RawRow",
    "TokenRow",
    "TokenRows",
    "collate",
    "largest_batch",
    "read_rows",
    "shape_batch",
    "training_order",
    "write_rows",
]
