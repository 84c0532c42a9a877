"""Proof by force: workers are killed at every kind of moment, and the runs end as ones that were left alone."""
