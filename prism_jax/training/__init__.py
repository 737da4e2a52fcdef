"""One optimizer step: state, update, optimizer."""
