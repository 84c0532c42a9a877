"""`python -m trainer doctor`: examines the machines of a run."""
