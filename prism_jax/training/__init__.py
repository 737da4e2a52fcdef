"""One optimiser step: state, update, optimiser."""
