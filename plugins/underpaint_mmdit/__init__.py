"""Multimodal diffusion transformers: MMDiT of Stable Diffusion 3, and FLUX."""
