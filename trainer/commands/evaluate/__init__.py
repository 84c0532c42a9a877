"""`python -m trainer evaluate`: exact figures of a finished model, on any number of ranks."""
