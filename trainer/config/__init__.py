"""Compose the YAML files and the command line into one tree, validate it, and build a Run from it."""
