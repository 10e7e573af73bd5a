"""The one training step, and the tracker that adds up what it keeps in memory.

Shapes: B rows, T tokens, C channels, K trained tokens, V vocabulary.
"""

from strixft.step.layers import decoder_layers
from strixft.step.loss import chunked_cross_entropy, rows_of_whole_chunks
from strixft.step.peak import peak_memory, release_memory
from strixft.step.tracker import MemoryTracker, part
from strixft.step.update import TrainingStep, Ways, batch_loss, token_losses

__all__ = [
    "MemoryTracker",
    "TrainingStep",
    "Ways",
    "batch_loss",
    "chunked_cross_entropy",
    "decoder_layers",
    "part",
    "peak_memory",
    "release_memory",
    "rows_of_whole_chunks",
    "token_losses",
]
