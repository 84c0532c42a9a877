"""Transforms of whole batches between the source and the model, and shifts of clients' data."""

from trainer.data.transforms.base import Batch, Transform
from trainer.data.transforms.client_skew import ClientShift, LabelNoise, Noise, Rotation, shift_clients
from trainer.data.transforms.compose import Compose
from trainer.data.transforms.distillation import ComposeForTeacher
from trainer.data.transforms.erasing import CutOut, MaskTokens
from trainer.data.transforms.geometry import RandomCrop, RandomFlip, RandomRotation
from trainer.data.transforms.mixing import MixUp
from trainer.data.transforms.normalization import Normalise, Standardise

__all__ = [
    "Batch",
    "ClientShift",
    "Compose",
    "ComposeForTeacher",
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
    "Standardise",
    "Transform",
    "shift_clients",
]
