"""Client samplers: which clients take part in a round."""
