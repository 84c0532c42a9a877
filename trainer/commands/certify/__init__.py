"""`python -m trainer certify`: keys and certificates of the members of a federation."""
