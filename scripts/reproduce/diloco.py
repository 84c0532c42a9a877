"""DiLoCo (Douillard et al. 2023, arXiv 2311.08105) against data parallelism: loss at equal tokens, and bytes sent.

Shakespeare by the bytes, a gpt of 0.4 million parameters, two workers of batch 16, 2000 steps of AdamW under one cosine
schedule. Data parallelism sends the gradient at every step, DiLoCo the change of the model after every 20 or 100.
"""

from __future__ import annotations

from collections.abc import Sequence

from scripts.reproduce.curves import curve
from scripts.reproduce.markdown import spread, table
from scripts.reproduce.trials import Series, Trial

SEEDS: tuple[int, ...] = (0,)
LEARNING_RATE = 0.001
STEPS = 2000
TOKENS = 2 * 16 * 128  # of a step of both workers
EVALUATED = 100  # steps between evaluations
BYTES = "bytes_between_silos"
SHARES = (0.25, 0.5, 1.0)  # of the run, after which the loss is told
ROWS = {"sync": "data parallel", "diloco20": "DiLoCo, 20 steps a round", "diloco100": "DiLoCo, 100 steps a round"}


def trials(seeds: Sequence[int]) -> list[Trial]:
    """The runs of the table."""
    return [Trial(name, LEARNING_RATE, seed, _overrides(name), workers=2) for name in ROWS for seed in seeds]


def _overrides(name: str) -> tuple[str, ...]:
    if name == "sync":
        return ("experiment=diloco_shakespeare", "algorithm=sync", "silos=1", "batch_size=32")
    steps = int(name.removeprefix("diloco"))
    length = (f"round.steps={steps}", f"rounds={STEPS // steps}", f"eval.every_rounds={EVALUATED // steps}")
    return ("experiment=diloco_shakespeare", *length)


def text(series: Series) -> str:
    """The test loss in nats a byte by the tokens that went through the model, and what the workers sent in all."""
    tokens = [f"loss at {share * STEPS * TOKENS / 1e6:.1f}M tokens" for share in SHARES]
    rows = [[label, *_losses(series, name), _sent(series, name)] for name, label in ROWS.items()]
    return table(["two workers", *tokens, "MB sent"], rows)


def _losses(series: Series, name: str) -> list[str]:
    """After each share of the run: mean and standard deviation of the seeds; dashes until all are over."""
    mine = [trial for trial in series.trials if trial.cell == name]
    if not all(series.is_over(trial) for trial in mine):
        return ["–"] * len(SHARES)
    curves = [curve(series.of(trial), "test/loss")[1] for trial in mine]
    places = [round(share * STEPS / EVALUATED) - 1 for share in SHARES]
    return [spread([losses[place] for losses in curves], unit=1, digits=3) for place in places]


def _sent(series: Series, name: str) -> str:
    """A step of data parallelism sends what a combination of DiLoCo does: an all-reduce of all parameters."""
    rounds, sent = curve(series.of(series.of_cell("diloco100", series.trials[0].seed)[0]), BYTES)
    if not len(rounds):
        return "–"
    combinations = STEPS if name == "sync" else STEPS // int(name.removeprefix("diloco"))
    return f"{combinations * sent[-1] / rounds[-1] / 1e6:,.0f}"


def figures(series: Series, seeds: Sequence[int]) -> dict[str, list[str]]:
    """Test loss by examples, as arguments of scripts.reproduce.plot by the name of the picture."""
    curves = [f"{ROWS[trial.cell]}={series.of(trial)}" for trial in series.trials if series.rounds_done(trial)]
    return {"diloco_shakespeare.png": [*curves, "--x", "examples", "--y", "test/loss"]}
