"""Tables of the models, methods, hosts and exports that a recipe may name, without torch."""
