"""Validate plain values, as YAML holds them, against type annotations, and describe the valid ones."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from trainer.utils.annotations import STRICT
from trainer.utils.text import format_value

TEXT = "a text (digits as \"'7'\")"
NAMES: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: TEXT,
    Path: TEXT,
    re.Pattern: "a regular expression",
    dict: "a mapping",
    list: "a list",
    tuple: "a list",
    NoneType: "null",
    Any: "anything",
}
BOUNDS = {"ge": "from", "gt": "above", "lt": "to below", "le": "to"}


def value_errors(key: str, value: Any, annotation: Any, config: ConfigDict = STRICT) -> list[str]:
    """Return the error of a value that its annotation does not accept; an empty list for a valid one."""
    try:
        # As JSON, because only there a strict tuple accepts a list, and a strict Path a string.
        TypeAdapter(annotation, config=config).validate_json(json.dumps(value))
    except ValidationError:
        return [f"{key}={format_value(value)}\n  valid: {describe(annotation)}"]
    return []


def describe(annotation: Any) -> str:
    """Describe the values that an annotation accepts, as part of an error message."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _describe_annotated(*arguments)
    if origin is Literal:
        return " or ".join(map(format_value, arguments))
    if origin in (Union, UnionType):
        parts = [part for part in arguments if part is not int or float not in arguments]
        return ", or ".join(dict.fromkeys(map(describe, parts)))
    if origin in (list, tuple):
        items = ", ".join(describe(item) for item in arguments if item is not Ellipsis)
        return f"[{items}]" if origin is tuple and Ellipsis not in arguments else f"[{items}, ...]"
    return NAMES[origin or annotation]


def _describe_annotated(annotation: Any, *metadata: Any) -> str:
    fields = [item for item in metadata if isinstance(item, FieldInfo)]
    for field in fields:
        if field.description:
            return field.description
    limits = [limit for field in fields for limit in field.metadata]
    bounds = [
        f"{word} {getattr(limit, name):g}" for name, word in BOUNDS.items() for limit in limits if hasattr(limit, name)
    ]
    return " ".join([describe(annotation), *bounds])
