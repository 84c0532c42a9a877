"""Transforms of whole batches between the source and the model, and shifts of clients' data."""

from trainer.data.transforms.base import Batch as Batch
from trainer.data.transforms.base import Transform as Transform
from trainer.data.transforms.client_skew import ClientShift as ClientShift
from trainer.data.transforms.client_skew import LabelNoise as LabelNoise
from trainer.data.transforms.client_skew import Noise as Noise
from trainer.data.transforms.client_skew import Rotation as Rotation
from trainer.data.transforms.client_skew import shift_clients as shift_clients
from trainer.data.transforms.compose import Compose as Compose
from trainer.data.transforms.erasing import CutOut as CutOut
from trainer.data.transforms.erasing import MaskTokens as MaskTokens
from trainer.data.transforms.geometry import RandomCrop as RandomCrop
from trainer.data.transforms.geometry import RandomFlip as RandomFlip
from trainer.data.transforms.geometry import RandomRotation as RandomRotation
from trainer.data.transforms.mixing import MixUp as MixUp
from trainer.data.transforms.normalization import Normalise as Normalise
from trainer.data.transforms.normalization import Standardise as Standardise
