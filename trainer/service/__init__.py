"""Serving exported models: the layout of their folders, engines, batching, and the servers. Needs no torch."""
