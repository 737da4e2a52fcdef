"""The chain of stages on the embedded corpus."""
