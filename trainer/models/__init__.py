"""Models: plain modules, independent of training."""

from trainer.models.adapters import lora, no_adapter
from trainer.models.cnn import CNN, DigitsCNN
from trainer.models.flops import SupportsFlops
from trainer.models.gpt import GPT
from trainer.models.logistic_regression import Logistic
from trainer.models.lstm import LSTM
from trainer.models.mlp import MLP
from trainer.models.pruning import prune, unpruned
from trainer.models.resnet import ResNet
from trainer.models.summary import describe_model
from trainer.models.transformers import from_transformers
from trainer.models.vit import ViT

__all__ = [
    "CNN",
    "GPT",
    "LSTM",
    "MLP",
    "DigitsCNN",
    "Logistic",
    "ResNet",
    "SupportsFlops",
    "ViT",
    "describe_model",
    "from_transformers",
    "lora",
    "no_adapter",
    "prune",
    "unpruned",
]
