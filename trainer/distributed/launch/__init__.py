"""Launch worker processes and bring their nodes together."""
