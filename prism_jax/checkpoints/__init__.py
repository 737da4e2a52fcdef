"""Checkpoints of a run, their checks, the folder's lock, and models in files."""
