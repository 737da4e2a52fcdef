"""The discriminator's batches, loss and segments."""
