"""Sources: examples by index, as tensors."""
