"""Warm-up of the discriminator on pairs."""
