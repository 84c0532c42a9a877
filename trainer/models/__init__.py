"""Models: plain modules that know nothing of training."""

from trainer.models.cnn import CNN, DigitsCNN
from trainer.models.gpt import GPT
from trainer.models.logistic import Logistic
from trainer.models.mlp import MLP

__all__ = ["CNN", "GPT", "MLP", "DigitsCNN", "Logistic"]
