"""The version of slimline."""

__version__ = "0.1.0"
