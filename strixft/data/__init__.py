"""Rows of files → chats → token rows with a mask of what is trained → batches.

Shapes: B rows, T tokens, K trained tokens of a batch.
"""

from strixft.data.batches import Batch, PackedShape, collate, on_device, shape_batch
from strixft.data.encode import Encoder, TokenRow
from strixft.data.load import Input, Problem, open_inputs, read_rows
from strixft.data.order import largest_batch, rows_of_epochs, training_order
from strixft.data.pack import PackedRows, Packing, length_groups, pack
from strixft.data.rows import Record, RowWriter, TokenRows

__all__ = [
    "Batch",
    "Encoder",
    "Input",
    "PackedRows",
    "PackedShape",
    "Packing",
    "Problem",
    "Record",
    "RowWriter",
    "TokenRow",
    "TokenRows",
    "collate",
    "largest_batch",
    "length_groups",
    "on_device",
    "open_inputs",
    "pack",
    "read_rows",
    "rows_of_epochs",
    "shape_batch",
    "training_order",
]
