"""Published tables, reproduced: their runs, the execution of the runs, and the results."""
