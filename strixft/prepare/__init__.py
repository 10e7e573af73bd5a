"""The first stage: rows of files become token rows on disk."""
