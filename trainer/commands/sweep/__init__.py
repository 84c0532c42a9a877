"""`python -m trainer -m`: sweeps of runs, through Hydra's sweepers and launchers."""
