"""What is done to examples on their way to the model: transforms of whole batches, one file a kind."""

from trainer.data.transforms.base import Batch, Transform
from trainer.data.transforms.client_skew import LabelNoise, Noise, Rotation, Skew, skewed
from trainer.data.transforms.compose import Chain
from trainer.data.transforms.erasing import CutOut, MaskTokens
from trainer.data.transforms.geometry import RandomCrop, RandomFlip, RandomRotation
from trainer.data.transforms.mixing import MixUp
from trainer.data.transforms.normalization import Normalise, Standardise

__all__ = [
    "Batch",
    "Chain",
    "CutOut",
    "LabelNoise",
    "MaskTokens",
    "MixUp",
    "Noise",
    "Normalise",
    "RandomCrop",
    "RandomFlip",
    "RandomRotation",
    "Rotation",
    "Skew",
    "Standardise",
    "Transform",
    "skewed",
]
