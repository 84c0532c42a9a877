"""An exported graph in int8: ONNX Runtime's static quantisation, and what it costs.

Its weights are int8, by channel. Numbers between layers with weights are uint8, in ranges that examples of training
have had. The transforms before the first of these layers, and what the task makes of the outputs, stay in floating
point. The format is QDQ, which other engines read too.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from trainer.loggers import higher_is_better
from trainer.tasks import Task
from trainer.tasks.base import example_units
from trainer.utils.text import format_bytes, format_seconds

if TYPE_CHECKING:  # onnx and onnxruntime take a second
    from onnx import GraphProto
    from onnxruntime import InferenceSession

BATCH_SIZE = 64  # of which the processor's time is measured
REPETITIONS = 9  # of that measurement

WEIGHTED = ("Conv", "Gemm", "MatMul")  # operators with weights that have kernels for int8
# Operators between them that have such kernels, or that only move numbers.
BETWEEN = (
    *("Relu", "Clip", "LeakyRelu", "Sigmoid", "Add", "Mul", "Concat", "MaxPool", "AveragePool", "GlobalAveragePool"),
    *("Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Pad", "Resize", "Split"),
)

OUTPUTS = "outputs"  # of the graph: what the task takes

Inputs = Mapping[str, np.ndarray]  # by the names of the graph, [B, ...]


@dataclass(frozen=True)
class Measurement:
    """Bytes of the file of a model, its figure, and seconds of one thread for `BATCH_SIZE` examples."""

    bytes: int
    figure: float
    cpu_seconds: float


@dataclass(frozen=True)
class Quantisation:
    """The change by quantising.

    Attributes:
        metric: the name of the figure, such as `validation/accuracy`.
        before: the graph in floating point.
        after: the quantised one.
        calibration_examples: their number.
        reduce_range: whether weights have 7 bits.
    """

    metric: str
    before: Measurement
    after: Measurement
    calibration_examples: int
    reduce_range: bool

    @property
    def loss(self) -> float:
        """How much worse the figure is: of scores the difference, of errors, which have no scale, their growth."""
        before, after = self.before.figure, self.after.figure
        return before - after if higher_is_better(self.metric) else (after - before) / abs(before)

    def check(self, tolerance: float) -> None:
        """Raise ValueError if the figure is worse by more than the tolerance."""
        if not self.loss <= tolerance:  # also if it is no number
            raise ValueError(
                f"--quantise int8 takes {self.metric} from {self.before.figure:.4g} to {self.after.figure:.4g}, more "
                f"than --tolerance {tolerance:g} allows: nothing was exported\n"
                "  leave --quantise out, or allow more"
            )

    def describe(self) -> dict[str, Any]:
        """Return what model.json and the card say."""
        bits = "int8 of 7 bits" if self.reduce_range else "int8"
        return {
            "type": "int8",
            "method": f"ONNX Runtime, static, QDQ, weights {bits} by channel, activations uint8",
            "calibration_examples": self.calibration_examples,
            "batch_size": BATCH_SIZE,
            "metric": self.metric,
            "before": asdict(self.before),
            "after": asdict(self.after),
        }

    def __str__(self) -> str:
        before, after = self.before, self.after
        return (
            f"int8: {format_bytes(before.bytes)} -> {format_bytes(after.bytes)}, "
            f"{self.metric} {before.figure:.4g} -> {after.figure:.4g}, {format_seconds(before.cpu_seconds)} -> "
            f"{format_seconds(after.cpu_seconds)} of one thread for {BATCH_SIZE} examples"
        )


def quantise(
    model: Path,
    target: Path,
    calibration: Sequence[Inputs],
    evaluation: Iterable[tuple[Inputs, Tensor]],
    task: Task,
    part: str,
    repetitions: int = REPETITIONS,
) -> Quantisation:
    """Write a quantised copy of a graph, and measure both.

    Args:
        model: the file of the graph.
        target: the file to write.
        calibration: batches of raw training examples.
        evaluation: batches of raw inputs, with their targets.
        task: of the model, whose `outputs` are one tensor.
        part: the name of the set that is evaluated on, for the figure's name.
        repetitions: of the measurement of time.

    Raises:
        ValueError: the graph has no layer whose weights could be quantised.
    """
    reduce_range = not torch.cpu._is_vnni_supported()
    write_quantised(model, target, calibration, reduce_range)
    files = (model, target)
    sessions = [_session(file) for file in files]
    figures = _figures(sessions, evaluation, task)
    seconds = _cpu_seconds(sessions, _batch(calibration), repetitions)
    before, after = (
        Measurement(file.stat().st_size, figure, of_batch)
        for file, figure, of_batch in zip(files, figures, seconds, strict=True)
    )
    examples = sum(map(_num_examples, calibration))
    return Quantisation(f"{part}/{task.headline}", before, after, examples, reduce_range)


def write_quantised(model: Path, target: Path, calibration: Iterable[Inputs], reduce_range: bool) -> None:
    """Write a quantised copy of a graph.

    Args:
        model: the file of the graph.
        target: the file to write.
        calibration: batches of raw training examples.
        reduce_range: weights of 7 bits. Processors without VNNI add pairs of products in 16 bits, which saturate.

    Raises:
        ValueError: the graph has no layer whose weights could be quantised.
    """
    import onnx
    from onnx.external_data_helper import uses_external_data
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    if any(map(uses_external_data, onnx.load(model, load_external_data=False).graph.initializer)):
        raise ValueError(
            "--quantise int8: the parameters of so large a model are in a file of their own\n  leave --quantise out"
        )
    reader: Any = _Reader(iter(calibration))
    with tempfile.TemporaryDirectory() as folder:
        # Shapes are inferred and operators fused before, as the maintainers of ONNX Runtime recommend.
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(model, prepared, auto_merge=True)
        nodes = _quantised_nodes(onnx.load(prepared).graph)
        if not nodes:
            raise ValueError(
                "--quantise int8: the graph has no convolution and no linear layer, whose weights could be quantised\n"
                "  leave --quantise out"
            )
        quantize_static(
            prepared,
            target,
            reader,
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=[*WEIGHTED, *BETWEEN],
            nodes_to_quantize=nodes,
            per_channel=True,
            reduce_range=reduce_range,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            # Products of two activations, as in attention, lose more than they gain. The outputs of linear layers, of
            # which one is the model's, stay as fine as they are.
            extra_options={"MatMulConstBOnly": True, "OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"]},
        )
    _forget_unused_domains(target)


def _forget_unused_domains(model: Path) -> None:
    """Remove the operator sets that no node is of: ONNX Runtime names all its own, which other engines do not know."""
    import onnx

    quantised = onnx.load(model)
    used = {node.domain for node in quantised.graph.node}
    kept = [each for each in quantised.opset_import if each.domain in used]
    del quantised.opset_import[:]
    quantised.opset_import.extend(kept)
    onnx.save(quantised, model)


class _Reader:
    """Batches of examples, as ONNX Runtime's calibration asks for them."""

    def __init__(self, batches: Iterator[Inputs]):
        self._batches = batches

    def get_next(self) -> Inputs | None:
        return next(self._batches, None)


def _quantised_nodes(graph: GraphProto) -> list[str]:
    """Return the names of the nodes with weights, and of all those between two of them."""
    weights = {initializer.name for initializer in graph.initializer}
    with_weights = {
        node.name for node in graph.node if node.op_type in WEIGHTED and weights.intersection(node.input[:2])
    }
    below: set[str] = set()  # tensors that depend on such a node
    for node in graph.node:
        if node.name in with_weights or below.intersection(node.input):
            below.update(node.output)
    above: set[str] = set()  # tensors on which such a node depends
    for node in reversed(graph.node):
        if node.name in with_weights or above.intersection(node.output):
            above.update(node.input)
    return [
        node.name
        for node in graph.node
        if node.name in with_weights or (below.intersection(node.input) and above.intersection(node.output))
    ]


def _session(model: Path) -> InferenceSession:
    """Return a session of one thread, in which time is comparable."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _figures(
    sessions: Sequence[InferenceSession], evaluation: Iterable[tuple[Inputs, Tensor]], task: Task
) -> list[float]:
    """Return the headline of each session over the same examples."""
    units, rows = 0.0, [[] for _ in sessions]
    for inputs, targets in evaluation:
        units += example_units(task, targets).sum().item()
        for session, of_session in zip(sessions, rows, strict=True):
            outputs: Any = session.run([OUTPUTS], dict(inputs))[0]
            of_session.append(task.score_sums(torch.from_numpy(outputs), targets).sum(0))
    return [task.summary(torch.stack(of_session).sum(0), units)[task.headline] for of_session in rows]


def _cpu_seconds(sessions: Sequence[InferenceSession], inputs: Inputs, repetitions: int) -> list[float]:
    """Return the median time of this thread that each session takes for a batch; they take turns."""
    times: list[list[float]] = [[] for _ in sessions]
    for _ in range(repetitions + 1):  # the first is a rehearsal
        for session, of_session in zip(sessions, times, strict=True):
            began = time.thread_time()
            session.run(None, dict(inputs))
            of_session.append(time.thread_time() - began)
    return [statistics.median(of_session[1:]) for of_session in times]


def _batch(calibration: Sequence[Inputs]) -> Inputs:
    """Return a batch of `BATCH_SIZE` examples, of which there may be fewer."""
    first = calibration[0]
    rows = np.arange(BATCH_SIZE) % _num_examples(first)
    return {name: array[rows] for name, array in first.items()}


def _num_examples(inputs: Inputs) -> int:
    return len(next(iter(inputs.values())))
