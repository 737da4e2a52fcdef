"""The policy's rollouts, batches, loss and update."""
