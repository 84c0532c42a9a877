"""Who would get which examples, before anything is trained: a table and a picture."""

from trainer.commands.partition.main import main as main
