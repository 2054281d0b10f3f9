"""Measuring reconstructions and samples, and the protocol that each number carries."""
