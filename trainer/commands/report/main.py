"""`python -m trainer report`: prints a table of runs, writes a page and CSV files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from trainer.commands.options import Parser
from trainer.commands.report.output_files import (
    CONFIGURATION,
    ROUND,
    RUN,
    OutputFile,
    curves_csv,
    runs_csv,
    summary_csv,
    write_all,
)
from trainer.commands.report.page import GENERATOR, page
from trainer.commands.report.run_records import RunRecord, read_records
from trainer.commands.report.summary import Report, summarize
from trainer.commands.report.table import show

USAGE = """\
python -m trainer report FOLDER ... [OPTION ...]     compare the runs in these folders, at any depth

Prints a table with a row for each configuration, the settings that differ, and the mean and standard deviation over
seeds, the best first. Writes a page that needs no network, with curves by round, examples, seconds and bytes.
Unfinished runs are read as far as they got.

  --by METRIC      orders the configurations; default: test/accuracy, else test/perplexity, else test/loss
  --html FILE      the page; default: report.html in the first FOLDER
  --csv FILE       a row for each run: settings, status, all metrics
  --summary FILE   a row for each configuration: mean and deviation of all metrics over its seeds
  --curves FILE    a row for each round of each run
  --figures FOLDER a PDF and a PNG for each metric by round

  python -m trainer report outputs
  python -m trainer report multirun/lr outputs/digits-sync --by validation/accuracy
  python -m trainer report outputs --html page.html --csv runs.csv --curves curves.csv
  python -m trainer report outputs --summary summary.csv --figures figures

docs/reports.md explains the report. Exit codes: 0 finished, 2 bad input."""


def main(arguments: Sequence[str]) -> int:
    """Report on the runs in the given folders, and return the exit code.

    Raises ValueError for bad input.
    """
    parser = Parser("python -m trainer report")
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--by", metavar="METRIC")
    for option in ("--html", "--csv", "--summary", "--curves"):
        parser.add_argument(option, type=Path, metavar="FILE")
    parser.add_argument("--figures", type=Path, metavar="FOLDER")
    options = parser.parse_args(arguments)
    records = read_records(options.folders)
    report = summarize(records, options.by)
    path = options.html or _default_page(options.folders[0], records)
    files = {"page": OutputFile("--html", path, GENERATOR, page(report, path.parent))}
    if options.csv:
        files["runs"] = OutputFile("--csv", options.csv, ",".join(RUN), runs_csv(report))
    if options.summary:
        files["summary"] = OutputFile("--summary", options.summary, ",".join(CONFIGURATION), summary_csv(report))
    if options.curves:
        files["curves"] = OutputFile("--curves", options.curves, ",".join(ROUND), curves_csv(report))
    pictures = _figures(report, options.figures) if options.figures else []
    write_all([*files.values(), *pictures])
    console = Console()
    show(report, console)
    for name, file in files.items():
        console.print(Text(f"{name:<7} {file.path}"), soft_wrap=True)
    if pictures:
        console.print(Text(f"figures {options.figures}: {len(pictures)} files"), soft_wrap=True)
    return 0


def _figures(report: Report, folder: Path) -> list[OutputFile]:
    """Draw the figures, and make their folder."""
    from trainer.commands.report.figures import figures  # matplotlib takes a second

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--figures {folder} cannot be made: {error.strerror}\n  name another folder") from error
    return list(figures(report, folder))


def _default_page(folder: Path, records: Sequence[RunRecord]) -> Path:
    """Return report.html in this folder, or in the run's if it holds a single run."""
    within = [record.folder for record in records if record.folder.resolve().is_relative_to(folder.resolve())]
    return (within[0] if len(within) == 1 else folder) / "report.html"
