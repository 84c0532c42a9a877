"""`python -m trainer report`: compares runs in a table, a page and CSV files."""
