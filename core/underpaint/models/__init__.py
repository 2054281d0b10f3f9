"""Finished models: tokenizers and generators, and the folders they live in."""
