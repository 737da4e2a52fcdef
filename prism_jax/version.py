"""The version of the project, written into every checkpoint."""

VERSION = "0.1.0"
