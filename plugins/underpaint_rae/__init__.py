"""Representation autoencoders (Zheng et al. 2025, arXiv 2510.11690)."""
