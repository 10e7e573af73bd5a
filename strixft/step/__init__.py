"""The one training step, and the tracker that adds up what it keeps in memory."""
