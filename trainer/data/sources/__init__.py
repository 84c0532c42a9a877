"""Sources: examples by number, as tensors."""
