"""The server beside others, with the same exported models."""
