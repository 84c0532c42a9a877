"""Samples of text: prompts, and how a language model continues them."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from trainer.loggers import TextSample
from trainer.loop.run import Run
from trainer.loop.train_state import TrainState
from trainer.models.calling import call_model
from trainer.utils.seeding import generator


def write_samples(state: TrainState) -> list[TextSample]:
    """Continue the run's prompts on rank 0, by the model as it was evaluated; other ranks write none.

    A prompt draws the same random numbers at every evaluation, so that its samples differ by the model alone.
    """
    run, options = state.run, state.run.sample
    if not options.prompts or not writes_samples(state):
        return []
    state.control.set_activity(f"round {state.progress.rounds + 1}: writing samples")
    samples = [
        TextSample(prompt, continue_text(run, state.model.module, prompt, options.tokens, options.temperature, number))
        for number, prompt in enumerate(options.prompts)
    ]
    return [] if run.topology.rank else samples


def writes_samples(state: TrainState) -> bool:
    """Return whether this rank calls the model for samples: rank 0, and its silo where a forward is a collective."""
    topology = state.run.topology
    return topology.rank == 0 or (topology.silo == 0 and state.trainer.step.parallel.forwards_together)


@torch.no_grad()
def continue_text(run: Run, module: nn.Module, prompt: str, count: int, temperature: float, *tags: int) -> str:
    """Return up to `count` tokens with which a model continues a prompt, as text.

    Args:
        run: says how text becomes tokens.
        module: the model; left in evaluation mode. It is not compiled: every length would be compiled anew.
        prompt: the beginning, of one token or more.
        count: most tokens to sample.
        temperature: divides the logits; 0: the most likely token is taken.
        tags: of the random numbers, beside the run's seed.
    """
    device, text_format = run.topology.device, run.data.text_format
    assert text_format
    module.eval()
    numbers, tokens = generator(run.seed, "sample", *tags), text_format.encode(prompt)
    begin = len(tokens)
    with torch.autocast(device.type, run.autocast) if run.autocast else nullcontext():
        for _ in range(count):
            logits = call_model(module, torch.tensor([tokens[-text_format.length :]], device=device))[0, -1]
            token = _draw(logits[: run.data.classes], temperature, numbers)
            if token in text_format.end:
                break
            tokens.append(token)
    return text_format.decode(tokens[begin:])


def _draw(logits: Tensor, temperature: float, numbers: torch.Generator) -> int:
    """Draw a token; the generator is on the CPU."""
    if not temperature:
        return int(logits.argmax())
    return int(torch.multinomial((logits.float() / temperature).softmax(0).cpu(), 1, generator=numbers))
