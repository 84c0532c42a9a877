"""How a step changes the weights: its rate, what limits and scales its gradient, and optimizers besides torch's."""

from trainer.optim.clip import GradientClipper
from trainer.optim.groups import GroupedOptimizerFactory
from trainer.optim.muon import Muon
from trainer.optim.scaler import DynamicLossScaler, IdentityLossScaler, LossScaler
from trainer.optim.schedules import Constant, Schedule
from trainer.optim.stepping import step

__all__ = [
    "GradientClipper",
    "Constant",
    "GroupedOptimizerFactory",
    "Muon",
    "DynamicLossScaler",
    "LossScaler",
    "Schedule",
    "IdentityLossScaler",
    "step",
]
