"""The files of a version: the graph in the formats that are asked for, a made-up request, and its reply."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from trainer.export.graph import Graph
from trainer.export.made_up import request, response
from trainer.service.engine import Engine, load_engine
from trainer.service.version import (
    EXAMPLE_REQUEST,
    EXAMPLE_RESPONSE,
    EXPORTED_PROGRAM,
    HUGGINGFACE,
    ONNX,
    ModelDescription,
    checksums,
)

Format = Literal["onnx", "pt2", "huggingface"]


@dataclass(frozen=True)
class VersionFiles:
    """Writes the files of a version.

    Attributes:
        name: of the model.
        graph: of the model.
        description: of the version, without checksums.
        formats: in which it is written; `onnx` or `pt2` is among them.
        texts: other files by their names.
        save_huggingface: writes the layout of Hugging Face into a folder.
        quantise: replaces the ONNX graph in a folder, and returns what that has cost, for the description.
        report: is given what is done next, in words.
    """

    name: str
    graph: Graph
    description: ModelDescription
    formats: Collection[Format] = ("onnx",)
    texts: Mapping[str, str] = field(default_factory=dict)
    save_huggingface: Callable[[Path], Any] | None = None
    quantise: Callable[[Path], dict[str, Any]] | None = None
    report: Callable[[str], Any] = lambda step: None

    def __call__(self, folder: Path) -> ModelDescription:
        """Write the files into a folder, and check that what was exported answers as the module does.

        Raises:
            ValueError: the model cannot be converted, or answers otherwise.
        """
        if "onnx" in self.formats:
            self.report("converts it to ONNX")
            self.graph.save_onnx(folder / ONNX)
        if "pt2" in self.formats:
            self.graph.save_program(folder / EXPORTED_PROGRAM)
        if self.save_huggingface:
            (folder / HUGGINGFACE).mkdir()
            self.save_huggingface(folder / HUGGINGFACE)
        for name, text in self.texts.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text)
        self.report("compares its answers with the model's")
        self.graph.check_engine(self._engine(folder))
        description = self.description
        if self.quantise:
            description = replace(description, quantisation=self.quantise(folder))
        self._write_example(folder)
        return description

    def _engine(self, folder: Path) -> Engine:
        return load_engine(folder, replace(self.description, sha256=checksums(folder)))

    def _write_example(self, folder: Path) -> None:
        engine = self._engine(folder)
        inputs = {name: tensor.numpy() for name, tensor in self.graph.example().items()}
        outputs = engine.run(inputs)
        _write_json(folder / EXAMPLE_REQUEST, request(inputs))
        _write_json(folder / EXAMPLE_RESPONSE, response(self.name, outputs))


def _write_json(path: Path, content: Any) -> None:
    try:
        path.write_text(json.dumps(content, allow_nan=False) + "\n")
    except ValueError as error:
        raise ValueError(
            "the model answers made-up numbers from 0 to 1 with some that are not finite: it was not exported\n"
            "  export the weights of another round, by --weights"
        ) from error
