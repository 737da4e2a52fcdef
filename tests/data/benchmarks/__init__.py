"""Tests of the readers of benchmarks."""
