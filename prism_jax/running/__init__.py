"""A training run: folder, identity, loop, metrics, dumps, preemption."""
