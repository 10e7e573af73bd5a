"""What a recipe may name, as tables: models, methods, hosts, exports. Nothing imports torch."""
