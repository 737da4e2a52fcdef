"""`python -m prism_jax plan`: whether a configuration fits a machine that is not there."""
