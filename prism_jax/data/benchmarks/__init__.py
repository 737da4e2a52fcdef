"""Readers of benchmarks as they are published, one file each, and what they make of a row.

`layout.py` says what a benchmark's file gives, `files.py` finds and reads the published files,
`catalog.py` names the benchmarks, and `convert.py` writes a folder that `evaluate` reads.
"""
