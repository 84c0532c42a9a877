"""The dry pass before training: what a run does with a model, done once with two examples, on a copy of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from trainer.loop.monitor import metric_errors
from trainer.loop.run import Run
from trainer.loop.text_samples import continue_text
from trainer.models.calling import call_model
from trainer.models.flat import trainable_parameters
from trainer.optim.optimizers import enter_training, has_modes, leave_training, step
from trainer.optim.schedules import Scheduler
from trainer.optim.state import OptimizerState, clone
from trainer.tasks.base import example_units
from trainer.utils.errors import InputError, raise_errors
from trainer.utils.hardware import to_device
from trainer.utils.oom import raise_if_oom
from trainer.utils.seeding import preserve_random_states
from trainer.utils.text import first_few
from trainer.utils.user_code import user_location

EXAMPLES = 2  # with fewer, layers that normalize by the statistics of their batch cannot be trained
NAMES_SHOWN = 8  # parameters in a message


def dry_pass(run: Run, copy_model: Callable[[], nn.Module]) -> None:
    """Try a step of training, saving and restoring of its state, and an evaluation; on this rank alone.

    Nothing of it remains: random generators are restored, and the model is a copy. It takes the memory of a training
    step of two examples, and a copy of the parameters.

    Args:
        run: the choices.
        copy_model: returns a copy of the initial model.

    Raises:
        ValueError: a run with this model would fail. A sentence says why, with the line of the user's code if the error
            comes from there.
    """
    with preserve_random_states(run.topology.device), torch.enable_grad():
        _DryPass(run, copy_model().to(run.topology.device)).run_all()


class _DryPass:
    """The parts of the dry pass, in their order."""

    def __init__(self, run: Run, module: nn.Module):
        self.run, self.module = run, module
        self.model, self.task = f"model={type(module).__name__}", f"task={type(run.task).__name__}"
        self.parameters = trainable_parameters(module)
        ids, device = torch.arange(min(EXAMPLES, len(run.data.train))), run.topology.device
        examples = run.data.train.fetch(ids)
        untransformed = replace(run.transforms, transforms={}, channels_last=False)  # some have to be fitted first
        _, self.training_targets = untransformed.for_training(run.data.train, ids, ids, run.seed, 0, device, examples)
        self.inputs, self.targets = untransformed.for_evaluation(examples, device)
        self.examples = len(ids)
        self.weights = () if run.weights is None else (to_device(run.weights.examples[ids], run.topology.device),)

    def run_all(self) -> None:
        self.module.train(self.examples > 1)
        self._backward(self._loss_sum())
        self._check_gradients()
        self._step()
        self._evaluate()

    def _forward(self) -> Tensor:
        with _named(f"{self.model} failed in its forward pass"), self._autocast(), self._in_memory():
            return call_model(self.module, self.inputs)

    def _loss_sum(self) -> Tensor:
        outputs = self._forward()
        with _named(f"{self.task}: the loss failed"), self._autocast():
            loss_sum = self.run.task.loss_sum(outputs, self.training_targets, *self.weights)
        if not isinstance(loss_sum, Tensor) or loss_sum.dim():
            raise ValueError(f"{self.task}: loss_sum gave {_described(loss_sum)}\n  valid: a tensor of no dimensions")
        if not loss_sum.requires_grad:
            raise ValueError(
                f"{self.model}: the loss has no gradient.\n"
                "  do not detach the outputs, convert them to numbers, or compute them under torch.no_grad()"
            )
        return loss_sum

    def _backward(self, loss_sum: Tensor) -> None:
        with _named(f"{self.model} failed in its backward pass"), self._in_memory():
            loss_sum.backward()

    def _check_gradients(self) -> None:
        unused = [name for name, parameter in self.parameters.items() if parameter.grad is None]
        if unused and max(self.run.topology.silo_sizes) > 1 and not self.run.training.allow_unused:
            raise ValueError(
                f"{self.model}: the loss does not depend on {', '.join(first_few(unused, NAMES_SHOWN))}, and the "
                "replicas of a silo wait for all gradients.\n"
                f"  set allow_unused=true, which costs some time; or model.freeze='^{unused[0]}$'; or use them"
            )
        sparse = [name for name, parameter in self.parameters.items() if _is_sparse(parameter.grad)]
        if sparse and (obstacles := self._needs_dense_gradients()):
            raise ValueError(
                f"{self.model}: the gradients of {', '.join(first_few(sparse, NAMES_SHOWN))} are sparse, which "
                f"{' and '.join(obstacles)} cannot take.\n  make the embedding with sparse=False"
            )

    def _needs_dense_gradients(self) -> list[str]:
        """Return the choices that cannot work with sparse gradients."""
        run, has_replicas = self.run, max(self.run.topology.silo_sizes) > 1
        obstacles = list(run.clipper.settings)
        if run.algorithm.adds_to_gradients:
            obstacles.append(f"algorithm={type(run.algorithm).__name__} with its terms of the gradient")
        if has_replicas and not run.gradient_compression().takes_sparse:
            obstacles.append("gradient_compression=")
        if has_replicas and run.topology.device.type == "cuda":
            obstacles.append("NCCL")
        return obstacles

    def _step(self) -> None:
        """Clip the gradients, step, and then save and restore the state of the optimizer."""
        self.run.clipper(list(self.parameters.values()), measure=True)
        with _named("optimizer: it cannot be made for this model"):
            optimizer = self.run.optimizer(list(self.parameters.items()))
        Scheduler(optimizer, self.run.schedule).set_progress(0.0)
        name = f"optimizer={type(optimizer).__name__}"
        self._check_modes(optimizer, name)
        state = OptimizerState(optimizer)
        with _named(f"{name} failed in its step"), self._in_memory():
            enter_training(optimizer)
            step(optimizer)
            leave_training(optimizer)
        with _named(f"{name}: its state cannot be restored"):
            state.load_state_dict(clone(state.state_dict()))
        self.module.zero_grad()

    def _check_modes(self, optimizer: torch.optim.Optimizer, name: str) -> None:
        """Check that nothing takes the weights of a step for those that an optimizer with two of them has learnt."""
        if not has_modes(optimizer):
            return
        run = self.run
        if run.training.ema_decay is not None and run.algorithm.moves_global_model:
            raise InputError(
                f"ema_decay={run.training.ema_decay} with {name}, which averages its weights itself.\n"
                "  set ema_decay=null"
            )
        if run.algorithm.overlap_steps:
            raise InputError(
                f"algorithm.overlap_steps={run.algorithm.overlap_steps} with {name}: a sum would come to weights that "
                "are not those it was made of.\n  set algorithm.overlap_steps=0, or another optimizer"
            )

    @torch.no_grad()
    def _evaluate(self) -> None:
        task = self.run.task
        self.module.eval()
        outputs = self._forward()
        with _named(f"{self.task}: the evaluation failed"):
            rows, pooled = task.score_sums(outputs, self.targets), task.pooled_sums(outputs, self.targets)
            if not isinstance(rows, Tensor) or rows.dim() != 2 or len(rows) != self.examples:
                raise ValueError(f"score_sums gave {_described(rows)}; valid: a tensor [{self.examples}, k]")
            measured = task.summary(rows.double().sum(0).cpu(), example_units(task, self.targets).sum().item())
            measured |= task.pooled_summary({key: part.double().cpu() for key, part in pooled.items()})
        are_shared = set(map(self.run.algorithm.is_shared, self.parameters))
        raise_errors(metric_errors(self.run, measured, has_personal=len(are_shared) > 1))
        for prompt in self.run.sample.prompts:
            with _named(f"{self.model} cannot continue sample.prompts={prompt}"):
                continue_text(self.run, self.module, prompt, 1, self.run.sample.temperature)

    def _autocast(self) -> torch.autocast | nullcontext[None]:
        run = self.run
        return torch.autocast(run.topology.device.type, run.autocast) if run.autocast else nullcontext()

    @contextmanager
    def _in_memory(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            raise_if_oom(error, "micro_batch_size", self.run.training.micro_batch_size, self.examples)
            raise


@contextmanager
def _named(what: str) -> Iterator[None]:
    """Raise the errors of the block as ValueErrors that begin like this, and name the line of the user's code."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        location = user_location(error)
        where = f"\n  in {location}" if location else ""
        raise ValueError(f"{what}: {type(error).__name__}: {error}{where}") from error


def _is_sparse(gradient: Tensor | None) -> bool:
    return gradient is not None and gradient.layout != torch.strided


def _described(value: object) -> str:
    """Describe a value of the wrong kind."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    return f"a {type(value).__name__}"
