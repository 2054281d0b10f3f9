"""DiT (Peebles and Xie 2023)."""
