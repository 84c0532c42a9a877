"""Readers: files on disk to sources of examples."""
