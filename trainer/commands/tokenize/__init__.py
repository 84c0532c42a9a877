"""`python -m trainer tokenize`: files of text to a file of tokens."""
