"""Checkpoints in the form of Hugging Face: read, streamed, written, checked."""
