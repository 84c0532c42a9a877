"""Parameter groups: weight decay, learning rates, and the matrices of Muon."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from trainer.algorithms.effective_steps import EffectiveSteps, nonlinear_optimizer
from trainer.optim import GradientClipper, GroupedOptimizerFactory, Muon
from trainer.optim.optimizers import parameters_of

Named = list[tuple[str, nn.Parameter]]
Make = Callable[..., torch.optim.Optimizer]


def model() -> nn.Module:
    """A model with names 0.weight, 0.bias, 1.weight, 1.bias, 2.weight, 2.bias; 1 is a norm."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3))


def trained(make: Make, named: bool = True, steps: int = 4) -> dict[str, Tensor]:
    """Return the parameters after some steps on a quadratic."""
    module = model()
    parameters = list(module.named_parameters())
    optimizer = make(parameters if named else [parameter for _, parameter in parameters])
    for _ in range(steps):
        module.zero_grad()
        sum(parameter.square().sum() + parameter.sum() for _, parameter in parameters).backward()  # pyright: ignore
        optimizer.step()
    return {name: parameter.detach() for name, parameter in parameters}


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW, torch.optim.NAdam])
def test_without_options_it_is_the_plain_optimizer(make: Make):
    """Bit for bit, with and without names."""
    bare = trained(partial(make, lr=0.01), named=False)
    for named in (True, False):
        assert_equal(trained(GroupedOptimizerFactory(partial(make, lr=0.01)), named), bare)


def test_norms_and_biases_do_not_decay():
    """AdamW without gradients: w (1 - lr decay)^2 after two steps for matrices, w for other tensors."""
    module = model()
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    optimizer = GroupedOptimizerFactory(
        partial(torch.optim.AdamW, lr=0.1, weight_decay=0.5), exclude_norm_bias_decay=True
    )(module.named_parameters())
    for _ in range(2):
        for parameter in module.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    for name, parameter in module.named_parameters():
        factor = 0.95**2 if name in ("0.weight", "2.weight") else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor)


def test_the_first_matching_pattern_decides_the_learning_rate():
    """A step of SGD is lr times the factor; the first group has the optimizer's lr."""
    module = model()
    grouped = GroupedOptimizerFactory(partial(torch.optim.SGD, lr=0.1), lr_multipliers=(("weight$", 2.0), ("^2", 0.0)))
    optimizer = grouped(module.named_parameters())
    assert optimizer.param_groups[0]["lr"] == 0.1
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    expected = {"0.weight": 0.2, "0.bias": 0.1, "1.weight": 0.2, "1.bias": 0.1, "2.weight": 0.2, "2.bias": 0.0}
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(before[name] - parameter.detach(), torch.full_like(parameter, expected[name]))


def test_unused_patterns():
    """Including a pattern that an earlier one always precedes."""
    grouped = GroupedOptimizerFactory(torch.optim.SGD, lr_multipliers=(("^0", 2.0), ("head", 3.0), ("^0.bias", 4.0)))
    assert grouped.unused([name for name, _ in model().named_parameters()]) == ["head", "^0.bias"]


def test_excluding_from_decay_needs_an_optimizer_with_decay():
    with pytest.raises(ValueError, match="no weight decay"):
        GroupedOptimizerFactory(partial(torch.optim.Rprop, lr=0.1), exclude_norm_bias_decay=True)(
            model().named_parameters()
        )


def test_learning_rate_multipliers_have_no_effective_steps():
    """SCAFFOLD and FedNova measure one parameter for all; groups that differ only in decay move equally far."""
    plain = partial(torch.optim.SGD, lr=0.1, weight_decay=0.1)
    rates = GroupedOptimizerFactory(plain, lr_multipliers=(("^0", 2.0),))
    (error,) = nonlinear_optimizer("scaffold", rates, GradientClipper())
    assert error.startswith("optimizer.lr_multipliers with algorithm=scaffold")
    no_decay = GroupedOptimizerFactory(plain, exclude_norm_bias_decay=True)
    assert not nonlinear_optimizer("scaffold", no_decay, GradientClipper())
    assert EffectiveSteps(GroupedOptimizerFactory(plain, exclude_norm_bias_decay=True)).displacement(
        (1.0, 0.5)
    ) == EffectiveSteps(plain).displacement((1.0, 0.5))


def test_muon_is_muon_for_matrices_and_adamw_for_the_rest():
    """Bit for bit torch's two optimizers on their parameters; 2.weight goes to AdamW by its name."""
    ours = trained(GroupedOptimizerFactory(partial(Muon, lr=0.01, adamw="^2"), exclude_norm_bias_decay=True))

    def both(named: Named) -> torch.optim.Optimizer:
        parameters = dict(named)
        rest = [parameter for name, parameter in named if name not in ("0.weight", "2.weight")]
        groups = [{"params": [parameters["2.weight"]]}, {"params": rest, "weight_decay": 0.0}]
        adamw = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
        muon = torch.optim.Muon([parameters["0.weight"]], lr=0.01, adjust_lr_fn="match_rms_adamw")
        adamw.register_step_pre_hook(lambda *_: muon.step())
        return adamw

    assert_equal(ours, trained(both))


def test_learning_rates_set_in_the_groups_of_muon_apply():
    """To both of its optimizers."""
    module = model()
    optimizer = Muon(module.named_parameters(), lr=0.1, weight_decay=0.0)
    assert len(parameters_of(optimizer)) == 6
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = [parameter.detach().clone() for parameter in module.parameters()]
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
