"""Client sampling: which clients take part in a round."""
