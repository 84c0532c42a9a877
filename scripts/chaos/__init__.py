"""A stress test: workers are killed at every kind of moment, and the runs must end like undisturbed ones."""
