"""Asking a policy many prompts, in parts that survive a kill."""
