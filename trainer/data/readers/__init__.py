"""Readers: files on disk to data sets."""
