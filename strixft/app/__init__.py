"""What people start: the command line, notebooks, chat, reports."""
