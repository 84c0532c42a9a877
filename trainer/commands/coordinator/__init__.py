"""`python -m trainer coordinator`: the launch that the sites of a federation dial."""
