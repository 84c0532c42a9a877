"""A run that is served: it is exported into its own folder first, and followed while it is still trained."""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

from trainer.checkpoint.run_dir import RunDir
from trainer.commands.exit_codes import BAD_INPUT, FINISHED
from trainer.service.version import DESCRIPTION

EXPORTED = "export"  # in the run folder
POLL_SECONDS = 0.5


@contextmanager
def exported_models(folder: Path) -> Iterator[Path]:
    """Yield the folder of models to serve: that of a run, if the named folder is one, else the named one.

    Exporting needs PyTorch, and much memory: another process does it. While the run is trained, it exports each new
    best round, until the block is left.

    Raises:
        ValueError: the run cannot be exported; that process has printed why.
    """
    run, models = RunDir(folder), folder / EXPORTED
    if not run.has_started():
        yield folder
        return
    is_trained = run.is_in_use()
    exporter = _start(_follow if is_trained else _export, folder)
    try:
        if is_trained:
            print(f"{folder} is being trained: its first evaluated round is waited for", flush=True)
            while exporter.is_alive() and not any(models.glob(f"*/[0-9]*/{DESCRIPTION}")):
                time.sleep(POLL_SECONDS)
        else:
            exporter.join()
        if exporter.exitcode:
            raise ValueError(f"{folder} cannot be served: it was not exported")
        yield models
    finally:
        exporter.terminate()
        exporter.join()


def _start(export: Callable[[Path], int], folder: Path) -> BaseProcess:
    process = multiprocessing.get_context("spawn").Process(target=_exit_with, args=(export, folder), daemon=True)
    process.start()
    return process


def _exit_with(export: Callable[[Path], int], folder: Path) -> None:
    try:
        sys.exit(export(folder))
    except ValueError as error:
        print(error, file=sys.stderr, flush=True)
        sys.exit(BAD_INPUT)
    except KeyboardInterrupt:  # of a terminal; the server ends, too
        sys.exit(FINISHED)


def _export(folder: Path) -> int:
    from trainer.commands.export.main import export_run

    export_run(folder)
    return FINISHED


def _follow(folder: Path) -> int:
    from trainer.commands.export.main import main

    return main([str(folder), "--to", str(folder / EXPORTED), "--follow"])
