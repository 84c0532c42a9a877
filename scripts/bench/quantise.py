"""Measure what int8 costs: bytes, the figure of the whole test set, and processor time at batch 64.

    python -m scripts.bench.quantise outputs/digits outputs/fashion

Each argument is the folder of a finished run. Its graph in floating point and the quantised one take turns in this
process, with one thread; times are those of the processor, which other work on the machine disturbs little.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from scripts.bench.paired_timing import machine
from trainer.checkpoint.run_dir import RunDir
from trainer.commands.evaluate.subject import FinishedRun
from trainer.config.build import build_evaluation
from trainer.config.compose import compose_tree
from trainer.config.saved_model import load_model
from trainer.config.schema import read_config
from trainer.data.sources.signature import DataSignature
from trainer.distributed.topology import Topology
from trainer.export.graph import Graph, trace
from trainer.export.quantise import Quantisation, quantise
from trainer.export.raw_examples import calibration_batches, evaluation_batches
from trainer.export.served_model import ServedModel
from trainer.loop.run import Run

ALONE = Topology(0, 1, 0, 0, (1,), torch.device("cpu"), None, None)


def open_run(folder: Path) -> tuple[Run, Graph]:
    """Return a finished run, and the graph of its model."""
    subject = FinishedRun(RunDir(folder), "last")
    run = build_evaluation(read_config(compose_tree(subject.overrides([]))), ALONE, subject.preprocessing())
    signature = DataSignature.of(run.data)
    assert signature is not None
    return run, trace(ServedModel(load_model(folder), run.transforms, run.task, signature))


def compare(run: Run, graph: Graph, repetitions: int) -> Quantisation:
    """Quantise a graph, and compare both on the test set of its run."""
    names = [spec.name for spec in graph.inputs]
    with tempfile.TemporaryDirectory() as folder:
        exact, coarse = Path(folder) / "model.onnx", Path(folder) / "int8.onnx"
        graph.save_onnx(exact)
        calibration, evaluation = calibration_batches(run, names), evaluation_batches(run, "test", names)
        return quantise(exact, coarse, calibration, evaluation, run.task, "test", repetitions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--repetitions", type=int, default=101)
    choices = parser.parse_args()
    print(machine())
    for folder in choices.runs:
        found = compare(*open_run(folder), choices.repetitions)
        before, after = found.before, found.after
        print(f"{folder.name}: {found}")
        print(
            f"  bytes {after.bytes / before.bytes:.3f}, time {after.cpu_seconds / before.cpu_seconds:.3f}, "
            f"lost {found.loss:.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
