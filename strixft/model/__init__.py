"""A model as a recipe asks for it: configuration, weights, adapter, shapes without weights."""
