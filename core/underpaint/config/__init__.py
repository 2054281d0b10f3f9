"""Recipes: their schema, how they are read, checked and saved. Imports no torch."""
