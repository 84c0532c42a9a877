"""Files that Triton wants beside the versions of a model: config.pbtxt and the names of the labels."""

from __future__ import annotations

import json
from collections.abc import Sequence

from trainer.service.version import ModelDescription, TensorSpec

MAX_BATCH_SIZE = 64  # examples that Triton computes together


def config_pbtxt(name: str, description: ModelDescription, labels: str) -> str:
    """Return the configuration of a model for Triton, which batches the requests of several clients.

    Args:
        name: of the model.
        description: of any of its versions.
        labels: the name of the file of labels.
    """
    named = labelled_output(description)
    outputs = [_tensor(spec, labels if spec.name == named else "") for spec in description.outputs]
    return "\n".join(
        (
            f"name: {json.dumps(name)}",
            'backend: "onnxruntime"',
            f"max_batch_size: {MAX_BATCH_SIZE}",
            "dynamic_batching { }",
            _listed("input", [_tensor(spec) for spec in description.inputs]),
            _listed("output", outputs),
            "",
        )
    )


def labelled_output(description: ModelDescription) -> str:
    """Return the name of the output whose numbers are those of the labels; empty if there are no names of labels."""
    count = len(description.label_names)
    fitting = [spec.name for spec in description.outputs if spec.shape == [-1, count] and count]
    return "scores" if "scores" in fitting else next(iter(fitting), "")


def labels_txt(description: ModelDescription) -> str:
    """Return the names of the labels, one a line."""
    return "".join(f"{' '.join(name.split())}\n" for name in description.label_names)


def _listed(side: str, tensors: Sequence[str]) -> str:
    return f"{side} [\n" + ",\n".join(tensors) + "\n]"


def _tensor(spec: TensorSpec, labels: str = "") -> str:
    dims = spec.shape[1:]
    fields = [
        f"name: {json.dumps(spec.name)}",
        f"data_type: TYPE_{spec.datatype}",
        f"dims: [ {', '.join(map(str, dims or [1]))} ]",
        *([] if dims else ["reshape: { shape: [ ] }"]),  # of a number for each example
        *([f"label_filename: {json.dumps(labels)}"] if labels else []),
    ]
    return f"  {{ {', '.join(fields)} }}"
