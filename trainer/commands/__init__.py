"""Commands: `python -m trainer` with `train` (the default), `sweep`, `report`, `plan`, `doctor` or `partition`."""
