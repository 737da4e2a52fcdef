"""Losses: arrays in, Sum(total, weight) and metrics out."""
