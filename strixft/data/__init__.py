"""Rows of files → chats → token rows with a mask of what is trained → batches."""
