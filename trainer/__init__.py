"""Synchronous data-parallel and federated training as one loop. See docs/concepts.md for the walk through the files."""

__version__ = "0.1.0"
