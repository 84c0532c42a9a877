"""`python -m trainer report`: prints a table of runs, writes a page and CSV files."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from trainer.commands.report import csv_export
from trainer.commands.report.console import show
from trainer.commands.report.output_files import OutputFile, check
from trainer.commands.report.page import GENERATOR, page
from trainer.commands.report.run_records import RunRecord, read_records
from trainer.commands.report.summary import summarize

PAGE = "report.html"
NAMES = {"--html": "page", "--csv": "runs", "--curves": "curves"}

DESCRIPTION = """\
Compare runs: a table with a row for each configuration, the settings that differ, and the mean and standard deviation
over seeds, the best first; and a page that needs no network, with curves by round, examples, seconds and bytes.
Unfinished runs are read as far as they got."""

EXAMPLES = """\
examples:
  python -m trainer report outputs
  python -m trainer report multirun/lr outputs/digits-sync --by validation/accuracy
  python -m trainer report outputs --html page.html --csv runs.csv --curves curves.csv

docs/reports.md explains the report."""


def main(arguments: Sequence[str]) -> int:
    """Report on the runs in the given folders, and return the exit code.

    Raises ValueError for bad input.
    """
    options = _parser().parse_args(arguments)
    records = read_records(options.folders)
    report = summarize(records, options.by)
    target = OutputFile("--html", options.html or _default_page(options.folders[0], records), GENERATOR)
    texts: dict[OutputFile, Callable[[], str]] = {target: lambda: page(report, target.path.parent)}
    if options.csv:
        texts[OutputFile("--csv", options.csv, ",".join(csv_export.RUN))] = lambda: csv_export.runs_csv(report)
    if options.curves:
        texts[OutputFile("--curves", options.curves, ",".join(csv_export.ROUND))] = lambda: csv_export.curves_csv(
            report
        )
    check(texts)
    for written, text in texts.items():
        written.write(text())
    console = Console()
    show(report, console)
    for written in texts:
        console.print(Text(f"{NAMES[written.option]:<7} {written.path}"), soft_wrap=True)
    return 0


def _default_page(folder: Path, records: Sequence[RunRecord]) -> Path:
    """Return report.html in this folder, or in the run's if it holds a single run."""
    within = [record.folder for record in records if record.folder.resolve().is_relative_to(folder.resolve())]
    return (within[0] if len(within) == 1 else folder) / PAGE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m trainer report",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="FOLDER", help="a run folder, or a folder that holds run folders"
    )
    by = "orders the configurations; default: test/accuracy, else test/perplexity, else test/loss"
    parser.add_argument("--by", metavar="METRIC", help=by)
    html = f"the page; default: {PAGE} in the first FOLDER"
    parser.add_argument("--html", type=Path, metavar="FILE", help=html)
    parser.add_argument("--csv", type=Path, metavar="FILE", help="a row for each run: settings, status, all metrics")
    parser.add_argument("--curves", type=Path, metavar="FILE", help="a row for each round of each run")
    return parser
