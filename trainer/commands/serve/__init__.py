"""`python -m trainer serve`: a server of exported models."""
