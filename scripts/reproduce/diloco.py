"""DiLoCo (Douillard et al. 2023, arXiv 2311.08105) against data parallelism: loss at equal tokens, and bytes sent.

Shakespeare as bytes, a GPT of 0.4 million parameters, two workers with batch size 16, 2000 steps of AdamW under one
cosine schedule. Data parallelism sends the gradient in every step, DiLoCo the change of the model after every 20 or 100
steps.
"""

from __future__ import annotations

from collections.abc import Sequence

from scripts.reproduce.curves import curve
from scripts.reproduce.markdown import spread, table
from scripts.reproduce.trials import Series, Trial

SEEDS: tuple[int, ...] = (0,)
LEARNING_RATE = 0.001
STEPS = 2000
TOKENS = 2 * 16 * 128  # in a step of both workers
EVALUATED = 100  # steps between evaluations
BYTES = "bytes_between_silos"
SHARES = (0.25, 0.5, 1.0)  # of the run, at which the table has the loss
ROWS = {"sync": "data parallel", "diloco20": "DiLoCo, 20 steps a round", "diloco100": "DiLoCo, 100 steps a round"}


def trials(seeds: Sequence[int]) -> list[Trial]:
    """Return the runs of the table."""
    return [Trial(name, LEARNING_RATE, seed, _overrides(name), workers=2) for name in ROWS for seed in seeds]


def _overrides(name: str) -> tuple[str, ...]:
    if name == "sync":
        return ("experiment=diloco_shakespeare", "algorithm=sync", "silos=1", "batch_size=32")
    steps = int(name.removeprefix("diloco"))
    length = (f"round.steps={steps}", f"rounds={STEPS // steps}", f"eval.every_rounds={EVALUATED // steps}")
    return ("experiment=diloco_shakespeare", *length)


def text(series: Series) -> str:
    """Return the test loss in nats a byte by trained tokens, and the bytes that the workers sent in all."""
    tokens = [f"loss at {share * STEPS * TOKENS / 1e6:.1f}M tokens" for share in SHARES]
    rows = [[label, *_losses(series, name), _sent(series, name)] for name, label in ROWS.items()]
    return table(["two workers", *tokens, "MB sent"], rows)


def _losses(series: Series, name: str) -> list[str]:
    """Return mean and standard deviation over the seeds after each share of the run; dashes until all have ended."""
    mine = [trial for trial in series.trials if trial.cell == name]
    if not all(series.is_over(trial) for trial in mine):
        return ["–"] * len(SHARES)
    curves = [curve(series.of(trial), "test/loss")[1] for trial in mine]
    places = [round(share * STEPS / EVALUATED) - 1 for share in SHARES]
    return [spread([losses[place] for losses in curves], unit=1, digits=3) for place in places]


def _sent(series: Series, name: str) -> str:
    """Return the megabytes sent: a step of data parallelism sends as much as a combination of DiLoCo."""
    rounds, sent = curve(series.of(series.of_cell("diloco100", series.trials[0].seed)[0]), BYTES)
    if not len(rounds):
        return "–"
    combinations = STEPS if name == "sync" else STEPS // int(name.removeprefix("diloco"))
    return f"{combinations * sent[-1] / rounds[-1] / 1e6:,.0f}"


def figures(series: Series, seeds: Sequence[int]) -> dict[str, list[str]]:
    """Return the curves of the test loss by examples, as arguments of scripts.reproduce.plot."""
    curves = [f"{ROWS[trial.cell]}={series.of(trial)}" for trial in series.trials if series.rounds_done(trial)]
    return {"diloco_shakespeare.png": [*curves, "--x", "examples", "--y", "test/loss"]}
