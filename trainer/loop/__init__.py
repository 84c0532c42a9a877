"""The training loop: rounds of local training, each ended by one combination."""
