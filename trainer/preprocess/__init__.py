"""What is done to examples on their way to the model: transforms of whole batches, one file a kind."""

from trainer.preprocess.chain import Chain
from trainer.preprocess.erasing import CutOut, MaskTokens
from trainer.preprocess.geometry import RandomCrop, RandomFlip, RandomRotation
from trainer.preprocess.mixing import MixUp
from trainer.preprocess.scaling import Normalise, Standardise
from trainer.preprocess.skew import LabelNoise, Noise, Rotation, Skew, skewed
from trainer.preprocess.transform import Batch, Transform

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
