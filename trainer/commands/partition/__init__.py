"""`python -m trainer partition`: the partition of a run's examples."""

from trainer.commands.partition.main import main as main
