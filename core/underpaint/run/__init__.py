"""A run: from a recipe to a folder with tokenizer, latents, generator, samples and report."""
