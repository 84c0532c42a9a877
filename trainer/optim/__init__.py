"""How a step changes the weights: its rate, what limits and scales its gradient, and optimizers besides torch's."""

from trainer.optim.clip import Clip
from trainer.optim.groups import Grouped
from trainer.optim.muon import Muon
from trainer.optim.scaler import Scaled, Scaler, Unscaled
from trainer.optim.schedules import Constant, Schedule
from trainer.optim.stepping import step

__all__ = ["Clip", "Constant", "Grouped", "Muon", "Scaled", "Scaler", "Schedule", "Unscaled", "step"]
