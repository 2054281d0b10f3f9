"""LightningDiT (Yao et al. 2025) and DiT^DH (Zheng et al. 2025)."""
