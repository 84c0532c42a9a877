"""`python -m trainer predict`: predicts the examples of files by an exported model."""

from __future__ import annotations

import sys
from argparse import ArgumentTypeError
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from rich.console import Console
from rich.table import Column

from trainer.checkpoint.files import write_file
from trainer.commands.exit_codes import FINISHED
from trainer.commands.options import Parser
from trainer.commands.output_file import check_output
from trainer.loggers.messages import number
from trainer.loggers.terminal import make_terminal
from trainer.utils.errors import ErrorCollector
from trainer.utils.tables import make_table

if TYPE_CHECKING:
    from trainer.commands.predict.predictions import Predictions

USAGE = """\
python -m trainer predict MODELS/NAME[/VERSION] FILE ... [OPTION ...] [data.KEY=value ...]     predictions of a model
python -m trainer predict RUN FILE ...     the same of a finished run, whose best round is exported to RUN/export first

Each FILE is a table (.csv, .jsonl, .parquet), a .npz file, an image or a folder of images, or a text with an example a
line (.txt). They are read as the examples of training were, and need no targets: columns.json of the version says how
the columns of a table are encoded. Anything else than inputs of the model is refused.

  --out FILE           .csv, .parquet or .npz: a row for each example, with its file and its row there, the label with
                       its name, the scores and the outputs; without it the first rows are shown
  --overwrite          replace FILE, if there is one
  --batch-size N       examples that are computed together; default: 64
  data.KEY=value       another key of data= than in training, such as data.inputs=[a,b] or data.size=32

  python -m trainer predict models/digits new.npz --out predictions.csv

docs/serving.md explains it. Exit codes: 0 finished, 2 bad input."""

DATA = "data."
ROWS_SHOWN = 10


def main(arguments: Sequence[str]) -> int:
    """Run the command; its exit code. Raises ValueError for bad input."""
    parser = Parser("python -m trainer predict")
    parser.add_argument("model", type=Path)
    parser.add_argument("files", type=str, nargs="+", metavar="FILE")
    parser.add_argument("--out", type=Path, metavar="FILE")
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--batch-size", type=_positive, default=64, metavar="N")
    options = parser.parse_args(arguments)
    typed = dict(_setting(text) for text in options.files if _is_setting(text))
    files = [Path(text).expanduser() for text in options.files if not _is_setting(text)]
    try:
        from trainer.commands.exported_version import open_version
        from trainer.commands.predict.inputs import read_file
        from trainer.commands.predict.predictions import FORMATS, predict
        from trainer.service.engine import load_engine
    except ImportError as error:
        raise ValueError(f"predict needs the package {error.name}\n  pip install silotrain[serve]") from error
    check_output("--out", options.out, options.overwrite)
    if options.out and options.out.suffix not in FORMATS:
        raise ValueError(f"--out {options.out}\n  valid: a file named *{', *'.join(FORMATS)}")
    version, errors = open_version(options.model), ErrorCollector()
    read = [errors.collect(lambda path=path: read_file(path, version, typed)) for path in files]
    errors.raise_any()
    engine, names = load_engine(version.folder, version.description), version.description.label_names
    found = predict(engine, [file for file in read if file], names, options.batch_size, make_terminal(sys.stderr))
    if options.out:
        _write(options.out, FORMATS[options.out.suffix](found))
        print(f"{len(found):,} predictions of {version.folder} in {options.out}")
    else:
        _show(found, Console())
    return FINISHED


def _is_setting(text: str) -> bool:
    return text.startswith(DATA) and "=" in text


def _setting(text: str) -> tuple[str, Any]:
    key, _, value = text.removeprefix(DATA).partition("=")
    return key, yaml.safe_load(value)


def _positive(text: str) -> int:
    if not (text.isdecimal() and int(text)):
        raise ArgumentTypeError(f"got {text}, valid: a whole number from 1")
    return int(text)


def _write(path: Path, content: bytes) -> None:
    try:
        write_file(path, content)
    except OSError as error:
        raise ValueError(f"--out {path} cannot be written: {error.strerror}\n  name another file") from error


def _show(found: Predictions, console: Console) -> None:
    """Print the first rows: what has one value a row, and the highest score."""
    columns = {name: values for name, values in found.columns.items() if values.ndim == 1}
    if "scores" in found.columns and found.columns["scores"].ndim == 2:
        columns["score"] = found.columns["scores"].max(1)
    if len(columns) == 2:  # the model has no labels
        columns |= dict(found.flat())
    shown = list(columns.items())
    rows = [[_cell(values[row]) for _, values in shown] for row in range(min(len(found), ROWS_SHOWN))]
    console.print(make_table([Column(name, overflow="fold") for name, _ in shown], rows))
    if len(found) > ROWS_SHOWN:
        console.print(f"... and {len(found) - ROWS_SHOWN:,} more, which --out writes")


def _cell(value: Any) -> str:
    return number(float(value)) if np.issubdtype(type(value), np.floating) else str(value)
