"""Critics and the adversarial losses that own them."""
