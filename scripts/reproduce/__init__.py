"""Published tables, run again: which runs they take, running them, and what came of them."""
