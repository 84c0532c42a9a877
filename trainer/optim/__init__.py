"""Optimizers, parameter groups, learning-rate schedules, gradient clipping and loss scaling."""

from trainer.optim.clip import GradientClipper
from trainer.optim.groups import GroupedOptimizerFactory
from trainer.optim.muon import Muon
from trainer.optim.optimizers import step
from trainer.optim.scaler import DynamicLossScaler, IdentityLossScaler, LossScaler
from trainer.optim.schedules import Constant, Schedule

__all__ = [
    "Constant",
    "DynamicLossScaler",
    "GradientClipper",
    "GroupedOptimizerFactory",
    "IdentityLossScaler",
    "LossScaler",
    "Muon",
    "Schedule",
    "step",
]
