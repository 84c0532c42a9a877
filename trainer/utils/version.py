"""The version of silotrain, for all layers."""

__version__ = "0.1.0"
