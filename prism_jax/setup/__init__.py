"""Devices, models, prompts, rows and the judge, opened by every command first."""
