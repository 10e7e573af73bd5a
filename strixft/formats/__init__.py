"""What a row of a data set looks like, and how it becomes a chat."""
