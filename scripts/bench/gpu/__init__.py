"""The cost of training on a GPU, compared with a hand-written loop: speed, use of the chip, memory."""
