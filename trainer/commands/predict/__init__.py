"""`python -m trainer predict`: the predictions of an exported model for the examples of files."""
