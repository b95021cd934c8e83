"""stager: pack a Python environment into one file, stage it node-local, run from there."""

__version__ = "0.1.0"
