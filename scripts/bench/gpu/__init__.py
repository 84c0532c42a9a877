"""The cost of training on a GPU, beside the same loop written by hand: speed, use of the chip, memory."""
