"""Utilities: seeding, timing, hardware, compilation, out-of-memory errors, text."""
