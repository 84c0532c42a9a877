"""`python -m trainer export`: the model of a run, as model servers take it."""
