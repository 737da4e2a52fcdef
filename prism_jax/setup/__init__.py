"""What every command opens first: devices, models, prompts, rows and the judge."""
