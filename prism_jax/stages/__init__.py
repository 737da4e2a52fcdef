"""The stages: one readable page each."""
