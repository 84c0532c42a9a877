"""`python -m trainer partition`: the partition of a run's examples."""
