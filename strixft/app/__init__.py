"""Entry points: the command line, notebooks, chat, reports."""
