"""How workers come into being."""
