"""Failures of an exporter as sentences: which layer or operation, and a way out."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator

from torch import nn
from torch.export import ExportedProgram

from trainer.utils.user_code import user_location

OPERATION = re.compile(r"OpOverload\(op='([\w.]+)', overload='(\w+)'\)|target=torch\.ops\.([\w.]+)")
MAX_REASON = 200  # characters of a library's own words


def tracing_error(error: BaseException, served: nn.Module) -> ValueError:
    """Return why a model cannot be traced.

    Args:
        error: of torch.export, or of the model itself.
        served: the module that was traced.
    """
    text = " ".join(str(error).split())
    if "Constraints violated" in text and "batch" in text:
        reason = (
            "its graph is one of a batch of some size alone, since its code makes the number of examples a constant: "
            "len(x) does\n  write x.shape[0], and -1 in view and reshape"
        )
    elif "data-dependent" in text:
        reason = "it decides by the values of tensors\n  compute both sides, and choose by torch.where"
    else:
        reason = f"{_shortened(text)}\n  docs/serving.md lists models that cannot be exported"
    where = ", ".join(filter(None, (_layer(error, served), user_location(error))))
    return ValueError(f"the model cannot be exported: {reason}" + (f"\n  in {where}" if where else ""))


def conversion_error(error: BaseException, program: ExportedProgram) -> ValueError:
    """Return why a traced model cannot be converted to ONNX.

    Args:
        error: of torch.onnx.
        program: the traced model.
    """
    found = OPERATION.search("\n".join(str(cause) for cause in _causes(error)))
    if not found:
        reason = _shortened(" ".join(str(list(_causes(error))[-1]).split()))
        return ValueError(f"the model cannot be converted to ONNX: {reason}\n  use --format pt2")
    operation = found[3] or f"{found[1]}.{found[2]}"
    layers = [_layer_of_node(node) for node in program.graph.nodes if str(node.target) == operation]
    where = f" (in {layers[0]})" if layers and layers[0] else ""
    return ValueError(f"the model cannot be converted to ONNX, which has no {operation}{where}\n  use --format pt2")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, and what it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _layer(error: BaseException, served: nn.Module) -> str:
    """Return the innermost layer that an error came through; empty if it came through none."""
    names = {id(layer): name.removeprefix("model.") for name, layer in served.named_modules()}
    for cause in reversed(list(_causes(error))):
        frames = [frame for frame, _ in traceback.walk_tb(cause.__traceback__)]
        for frame in reversed(frames):
            layer = frame.f_locals.get("self")
            if name := names.get(id(layer)):
                return f"layer {name} ({type(layer).__name__})" if name != "model" else type(layer).__name__
    return ""


def _layer_of_node(node: object) -> str:
    """Return the innermost layer that has called an operation of a graph; empty if none has."""
    stack = list(getattr(node, "meta", {}).get("nn_module_stack", {}).values())
    name, kind = stack[-1] if stack else ("", "")
    return f"layer {name.removeprefix('model.')} ({str(kind).rpartition('.')[2]})" if name else ""


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_REASON else f"{text[:MAX_REASON].rsplit(' ', 1)[0]} ..."
