"""`python -m trainer plan`: time, traffic and memory of a run, before it starts."""
