"""The monitored metric: it chooses the best round, and may end a run early."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from trainer.loggers import Metrics, higher_is_better
from trainer.loop.progress import Progress
from trainer.utils.text import format_value, suggest

if TYPE_CHECKING:
    from trainer.loop.run import Run

SPREADS = ("worst_{}", "{}_std")  # over the clients, of each of their scores
COORDINATOR = "coordinator"  # the prefix of metrics on the coordinator's own test set, which has no clients


def monitored_metric(run: Run) -> str:
    """Return the name of the monitored metric: that of the run, or the task's headline on the validation set."""
    return run.monitor or f"validation/{run.task.headline}"


def score_of(run: Run, value: float) -> float:
    """Return the score of a value of the monitored metric: the higher, the better. It is its own inverse."""
    return value if higher_is_better(monitored_metric(run)) else -value


def monitored_score(run: Run, metrics: Metrics) -> float | None:
    """Return the score of a round; None if the metric was not measured in it."""
    value = metrics.get(monitored_metric(run))
    return None if value is None else score_of(run, value)


def best_round(run: Run, progress: Progress) -> dict[str, Any]:
    """Return the best saved round, with its value and the metric; empty if there is none."""
    if progress.best_saved_score is None:
        return {}
    value = score_of(run, progress.best_saved_score)
    return {"monitor": monitored_metric(run), "best_value": value, "best_round": progress.best_saved_round}


def client_scores(run: Run) -> tuple[str, ...]:
    """Return the scores that are reported of single clients, the headline first; empty if none are."""
    if run.metrics.per_client == "none" or len(run.clients) < 2:
        return ()
    return tuple(dict.fromkeys((run.task.headline, *run.metrics.client_scores)))


def metric_errors(run: Run, scores: Iterable[str], has_personal: bool = True) -> list[str]:
    """Return why metrics that the run names cannot be measured.

    Args:
        run: the choices.
        scores: the names of all that the task measures.
        has_personal: whether some parameters are shared and others stay with their clients, as far as is known.
    """
    scores = list(dict.fromkeys(("loss", *scores)))
    asked = f"metrics.client_scores={format_value(list(run.metrics.client_scores))}"
    errors = [
        f"{asked}: the task has no {name}{suggest(name, scores)}"
        for name in run.metrics.client_scores
        if name not in scores
    ]
    if run.metrics.client_scores and run.metrics.per_client == "none":
        errors.append(
            f"{asked} with metrics.per_client=none, which hides them.\n"
            "  set metrics.per_client=scores, or metrics.client_scores=[]"
        )
    known = _metric_names(run, scores, has_personal)
    if run.monitor and run.monitor not in known and not _needs_validation(run):
        errors.append(f"monitor={run.monitor}: this run measures no such metric{suggest(run.monitor, known)}")
    return errors + _validation_errors(run)


def _metric_names(run: Run, scores: Iterable[str], has_personal: bool) -> list[str]:
    """Return the metrics that can be monitored, by the scores of the task."""
    spread = [pattern.format(score) for score in client_scores(run) for pattern in SPREADS]
    parts = {"validation": has_validation(run), "test": True, "global": has_personal}
    parts |= {"ema": run.training.ema_decay is not None, "personal": run.eval.personal_steps > 0}
    parts |= {COORDINATOR: run.data.has_central}
    measured = [part for part, is_measured in parts.items() if is_measured]
    names = [f"{part}/{score}" for part in measured for score in scores]
    measured = [part for part in measured if part != COORDINATOR]
    names += [f"{'clients' if part == 'test' else part}/{name}" for part in measured for name in spread]
    return [*names, "train/loss"]


def has_validation(run: Run) -> bool:
    """Return whether any examples are held out for validation."""
    return any(map(len, run.clients.validation))


def _needs_validation(run: Run) -> bool:
    return monitored_metric(run).startswith("validation/") and not has_validation(run)


def _validation_errors(run: Run) -> list[str]:
    """Return the errors of choices that go by a validation set that is empty."""
    goes_by = {
        "monitor": run.monitor,
        "stop.metric_target": run.stop.metric_target,
        "stop.patience_evaluations": run.stop.patience_evaluations,
    }
    asked = [f"{name}={value}" for name, value in goes_by.items() if value is not None]
    if not asked or not _needs_validation(run):
        return []
    return [
        f"{' and '.join(asked)}: no examples are held out for validation, which it goes by.\n"
        "  set data.validation=0.1 or more, another metric by monitor=, or stop by stop.max_training_seconds"
    ]
