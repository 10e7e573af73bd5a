"""`FORMATS`: what a row of a data set looks like, and how it becomes a chat."""

from strixft.formats.detect import fitting, suggest_columns
from strixft.formats.faults import RowFault
from strixft.formats.messages import ROLES, Chat, Message, Row
from strixft.formats.table import FORMATS, Format

__all__ = [
    "FORMATS",
    "ROLES",
    "Chat",
    "Format",
    "Message",
    "Row",
    "RowFault",
    "fitting",
    "suggest_columns",
]
