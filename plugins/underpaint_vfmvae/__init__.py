"""VFM-VAE (Bi et al. 2025)."""
