"""Alignment: policy and discriminator against each other."""
