"""`python -m trainer export`: writes the model of a run as the next version of a folder that model servers watch."""

from __future__ import annotations

import sys
import time
from argparse import ArgumentTypeError, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from trainer.commands.exit_codes import BAD_INPUT, FAILED, FINISHED
from trainer.commands.options import Parser

if TYPE_CHECKING:
    from trainer.commands.export.source_run import SourceRun
    from trainer.commands.export.versions import Exporter

USAGE = """\
python -m trainer export RUN [OPTION ...]     the model of a run, as the next version of MODELS/NAME/

Writes MODELS/NAME/VERSION/ as Triton, OpenVINO Model Server, KServe and `serve` take it: the graph with the transforms
of evaluation in it, its signature and labels, a model card, checksums, and a request with made-up inputs. A version
appears by one rename, so servers never see half of one. No path, host or example of the data is in it.

  --to MODELS          the folder of all models; default: export in the run folder
  --name NAME          of the model; default: the name of the run, or of its data
  --weights WEIGHTS    best, last or ema, or a file of weights; default: best if the run has it, else last
  --format FORMATS     onnx, pt2 (of torch.export), huggingface (of transformers' models), separated by commas;
                       default: onnx
  --quantise int8      an ONNX graph of 8 bits, calibrated on training examples: it needs the data of the run
  --tolerance LOSS     of the monitored figure, which quantising may cost; default: 0.01
  --follow             while the run trains, each new best round becomes the next version
  --keep N             versions that stay; default: all, and 3 with --follow

  python -m trainer export outputs/digits-sync/2026-01-31_12-00-00 --to models --name digits

docs/serving.md explains it. Exit codes: 0 finished, 2 bad input; with --follow those of the run."""

WEIGHTS = ("best", "last", "ema")
KEPT_BY_FOLLOWER = 3
POLL_SECONDS = 1.0
RESTART_SECONDS = 60.0  # in which a launcher has restarted the workers of a run that has crashed, if it does
ENDED = {"finished": FINISHED, "bad_input": BAD_INPUT}
WAITING = {"preempted": "been preempted", "crashed": "crashed"}


def main(arguments: Sequence[str]) -> int:
    """Run the command; its exit code. Raises ValueError for bad input."""
    options = _parse(arguments)
    try:
        from trainer.commands.export.source_run import SourceRun
        from trainer.commands.export.versions import Exporter
    except ImportError as error:
        raise ValueError(f"export needs the package {error.name}\n  pip install silotrain[export]") from error
    run = SourceRun(options.run)
    models = options.to or options.run / "export"
    exporter = Exporter(run, models, options.name or run.default_name, options.format, options.keep, _report)
    if options.follow:
        return _follow(run, exporter)
    trained = (
        run.of_file(Path(options.weights))
        if options.weights not in (*WEIGHTS, None)
        else run.finished(options.weights or run.preferred_weights)
    )
    version = exporter.export(trained, options.tolerance if options.quantise else None)
    _say(f"{version}\n  python -m trainer serve {models}")
    return FINISHED


def export_run(path: Path) -> Path:
    """Export the best model of a finished run into the folder `export` in it, unless that has been done.

    Returns:
        The folder of all models.

    Raises:
        ValueError: the run has not finished, or its model cannot be exported.
    """
    from trainer.commands.export.source_run import SourceRun
    from trainer.commands.export.versions import Exporter
    from trainer.export.model_folder import newest_version

    run, models = SourceRun(path), path / "export"
    trained, newest = run.finished(run.preferred_weights), newest_version(models / run.default_name)
    if newest is None or newest[1].provenance != run.provenance(trained):
        Exporter(run, models, run.default_name, ("onnx",), None, _report).export(trained)
    return models


def _parse(arguments: Sequence[str]) -> Namespace:
    parser = Parser("python -m trainer export")
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--to", type=Path, metavar="MODELS")
    parser.add_argument("--name")
    parser.add_argument("--weights")
    parser.add_argument("--format", type=_formats, default=("onnx",))
    parser.add_argument("--quantise", choices=["int8"])
    parser.add_argument("--tolerance", type=float, default=0.01)
    parser.add_argument("--follow", action="store_true")
    parser.add_argument("--keep", type=_positive)
    options = parser.parse_args(arguments)
    if options.quantise and "onnx" not in options.format:
        raise ValueError("--quantise int8 writes ONNX, and --format leaves it out\n  add onnx to --format")
    if options.follow and (options.weights or options.quantise):
        raise ValueError("--follow exports the best round, as it is\n  leave --weights and --quantise out")
    if options.follow and options.keep is None:
        options.keep = KEPT_BY_FOLLOWER
    return options


def _formats(text: str) -> tuple[str, ...]:
    from trainer.export.version_files import Format

    names = tuple(text.split(","))
    if not {*names} <= {*get_args(Format)} or not {"onnx", "pt2"} & {*names}:
        raise ArgumentTypeError(f"got {text}, valid: onnx or pt2, and huggingface beside them, separated by commas")
    return names


def _positive(text: str) -> int:
    if not (text.isdecimal() and int(text)):
        raise ArgumentTypeError(f"got {text}, valid: a whole number from 1")
    return int(text)


def _follow(run: SourceRun, exporter: Exporter) -> int:
    """Export each new best round until the run has ended; the exit code."""
    exported, shown, crashed_at = exporter.newest_round(), "", 0.0
    while True:
        status = run.folder.status()  # asked first, so that a round that is saved meanwhile is not missed
        if trained := run.best_so_far(exported):
            exported = trained.round
            _say(f"round {exported}: {exporter.export(trained, None)}")
            continue
        if status in ENDED:
            return ENDED[status]
        if status != shown and status in WAITING:
            _report(f"the run has {WAITING[status]}: waits until it continues")
        crashed_at = 0.0 if status != "crashed" else crashed_at or time.monotonic()
        if crashed_at and time.monotonic() - crashed_at > RESTART_SECONDS:
            return FAILED
        shown = status
        time.sleep(POLL_SECONDS)


def _report(step: str) -> None:
    print(step, file=sys.stderr, flush=True)


def _say(text: str) -> None:
    print(text, flush=True)
