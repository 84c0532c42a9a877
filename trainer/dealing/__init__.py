"""Who would get which examples, before anything is trained: a table and a picture."""

from trainer.dealing.command import main as main
