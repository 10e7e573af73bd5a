"""Helpers without knowledge of models: files, locks, text, tables, pages."""
