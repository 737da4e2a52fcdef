"""Sources, images, chat and batches."""
