"""Graphs of a served model: traced by torch.export, and converted to ONNX."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from trainer.data.sources.signature import ANY, DATATYPES
from trainer.export.failures import conversion_error, tracing_error
from trainer.export.made_up import make_inputs
from trainer.export.served_model import ServedModel
from trainer.service.engine import Engine
from trainer.service.version import TensorSpec

BATCH, LENGTH = "batch", "length"
EXAMPLES, TOKENS = 3, 11  # of the batch with which a graph is traced; 1 would be taken for a constant
OTHER_EXAMPLES = 2  # of the batch with which it is checked
MAX_BYTES_IN_FILE = 1_500_000_000  # of parameters in model.onnx itself; the format ends at 2 GB
TOKEN_TYPES = ("INT32", "INT64")
NOISY = "torch.onnx._internal.exporter._registration"  # names operations of packages that are not installed


@dataclass(frozen=True)
class Graph:
    """A traced model.

    Attributes:
        program: as torch.export has it.
        served: the module that was traced.
        inputs: raw ones.
        outputs: by the names that `served` gives them.
    """

    program: ExportedProgram
    served: ServedModel
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]

    def example(self, examples: int = 1, length: int = TOKENS) -> dict[str, Tensor]:
        """Return made-up inputs by name."""
        tensors = make_inputs(self.served.signature, self.served, examples, length)
        return dict(zip((spec.name for spec in self.inputs), tensors, strict=True))

    def save_program(self, path: Path) -> None:
        """Write the graph as `torch.export.load` reads it: bit-equal to the module, without this package."""
        torch.export.save(self.program, path)

    def save_onnx(self, path: Path) -> None:
        """Write the graph as ONNX. The parameters of a large model go to a file of their own beside it.

        Raises:
            ValueError: an operation has no counterpart in ONNX.
        """
        passes = _onnx("onnx_ir.passes.common")
        _onnx("onnxscript")
        try:
            with _quiet():
                program = torch.onnx.export(
                    self.program,
                    dynamo=True,
                    input_names=[spec.name for spec in self.inputs],
                    output_names=[spec.name for spec in self.outputs],
                    verbose=False,
                )
        except Exception as error:  # it documents none
            raise conversion_error(error, self.program) from error
        assert program is not None
        program.rename_axes({**_axes(self.program)})
        passes.ClearMetadataAndDocStringPass()(program.model)  # paths of source files are in it
        count = sum(tensor.nbytes for tensor in self.program.state_dict.values())
        program.save(path, external_data=count > MAX_BYTES_IN_FILE)

    @torch.no_grad()
    def check_engine(self, engine: Engine) -> None:
        """Raise ValueError if an engine of the exported graph answers otherwise than the module.

        The batch is of another size than that with which the graph was traced.
        """
        inputs = self.example(OTHER_EXAMPLES)
        expected, got = self.served(*inputs.values()), engine.run({name: each.numpy() for name, each in inputs.items()})
        for name, tensor in expected.items():
            if not tensor.is_floating_point():
                continue
            tolerance = torch.finfo(tensor.dtype).eps ** 0.5 * max(1.0, tensor.abs().max().item())
            difference = (torch.from_numpy(got[name]) - tensor).abs().max().item()
            if not difference <= tolerance:
                raise ValueError(
                    f"the exported graph answers {name} with numbers that differ from the model's by up to "
                    f"{difference:.2g}, or are not finite: it was not exported\n  use --format pt2"
                )


def trace(served: ServedModel) -> Graph:
    """Trace a model for batches of any size, and for tokens of any length if it allows that.

    A model whose graph depends on the length says so: with an attribute `dynamic_dimensions = (0,)` only the batch is
    of any size.

    Raises:
        ValueError: it cannot be traced.
    """
    given = make_inputs(served.signature, served, EXAMPLES, TOKENS)
    with torch.no_grad(), _quiet():
        try:
            outputs = served(*given)
        except Exception as error:
            raise tracing_error(error, served) from error
        _check_outputs(outputs)
        lengths = _lengths(served) if 1 in getattr(served.model, "dynamic_dimensions", (0, 1)) else set[str]()
        try:
            program = _export(served, given, lengths)
        except Exception as error:
            if not lengths or _is_padded(served):
                raise tracing_error(error, served) from error
            lengths = set[str]()
            program = _export(served, given, lengths)
    _forget_sources(program)
    inputs = [
        TensorSpec(spec.name, spec.datatype, _shape(tensor, spec.name in lengths))
        for spec, tensor in zip(served.signature.inputs, given, strict=True)
    ]
    return Graph(program, served, inputs, _output_specs(program, outputs))


def _export(served: ServedModel, given: tuple[Tensor, ...], lengths: set[str]) -> ExportedProgram:
    batch, length = Dim(BATCH), Dim(LENGTH)
    shapes = [{0: batch, 1: length} if spec.name in lengths else {0: batch} for spec in served.signature.inputs]
    return torch.export.export(served, given, dynamic_shapes=(tuple(shapes),))


def _lengths(served: ServedModel) -> set[str]:
    """Return the names of the inputs of any length: those that are padded, and tokens with what belongs to them."""
    has_tokens = any(hasattr(layer, "num_embeddings") for layer in served.model.modules())
    return {
        spec.name
        for spec in served.signature.inputs
        if ANY in spec.shape[1:] or (has_tokens and spec.datatype in TOKEN_TYPES and len(spec.shape) == 2)
    }


def _is_padded(served: ServedModel) -> bool:
    return any(ANY in spec.shape[1:] for spec in served.signature.inputs)


def _check_outputs(outputs: Mapping[str, Tensor]) -> None:
    for name, tensor in outputs.items():
        if tensor.dtype not in DATATYPES:
            raise ValueError(f"the model's {name} are {tensor.dtype}, which servers do not know\n  set task.output=")
        if tensor.shape[:1] != (EXAMPLES,):
            raise ValueError(
                f"the model's {name} have the shape {list(tensor.shape)} for {EXAMPLES} examples: servers split "
                "outputs by their first dimension\n  set task.output="
            )


def _shape(tensor: Tensor, is_any_length: bool) -> list[int]:
    """Return the shape of an input, whose batch is of any size."""
    return [ANY, ANY, *tensor.shape[2:]] if is_any_length else [ANY, *tensor.shape[1:]]


def _output_specs(program: ExportedProgram, outputs: Mapping[str, Tensor]) -> list[TensorSpec]:
    symbolic = _values(program, program.graph_signature.user_outputs)
    return [
        TensorSpec(
            name, DATATYPES[tensor.dtype], [size if isinstance(size, int) else ANY for size in symbolic[index].shape]
        )
        for index, (name, tensor) in enumerate(outputs.items())
    ]


def _axes(program: ExportedProgram) -> dict[str, str]:
    """Return the names of dimensions of any size, by those that torch has made up for them."""
    inputs = _values(program, program.graph_signature.user_inputs)
    named = [(size, name) for tensor in inputs for size, name in zip(tensor.shape, (BATCH, LENGTH), strict=False)]
    return {str(size): name for size, name in named if not isinstance(size, int)}


def _values(program: ExportedProgram, names: Any) -> list[Tensor]:
    """Return the tensors without values that the nodes of these names stand for."""
    nodes = {node.name: node for node in program.graph.nodes}
    return [nodes[name].meta["val"] for name in names]


def _forget_sources(program: ExportedProgram) -> None:
    """Remove what a graph tells of the machine that has traced it: paths and lines of source files."""
    for module in program.graph_module.modules():
        for node in getattr(getattr(module, "graph", None), "nodes", ()):
            node.meta.pop("stack_trace", None)


def _onnx(name: str) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"exporting to ONNX needs the package {error.name}\n  pip install silotrain[export], or use --format pt2"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries' warnings to themselves: they are about their own code."""
    logger = logging.getLogger(NOISY)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logger.setLevel(level)
