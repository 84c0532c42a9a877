"""What the target of a leaf takes: the leaf's values, held against the signature before the target is called."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from functools import reduce
from inspect import Parameter, signature
from operator import or_
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from torch import Tensor

from trainer.config.renamed_keys import renamed
from trainer.config.schema import ComponentConfig, ValueType, choices, switch, text
from trainer.utils.text import format_value, suggest

ANYTHING = ValueType("anything", lambda value: True)
NUMBER = ValueType("a number", lambda value: type(value) in (int, float))
KINDS = {
    bool: switch,
    int: ValueType("a whole number", lambda value: type(value) is int),
    float: NUMBER,
    str: text,
    Path: text,
    NoneType: choices(None),
}


def argument_errors(
    key: str, component: ComponentConfig, target: Callable[..., Any], reserved_args: Collection[str] = ()
) -> list[str]:
    """What is wrong with the values of the leaf `key`: unknown, missing, or not what its target is annotated with.

    Without an annotation only a text is refused, and only where the default is a number or a switch. `reserved_args` are the
    arguments that the user cannot give. What the signature does not tell is the target's own to say.
    """
    parameters = _parameters(target)
    kinds = [parameter.kind for parameter in parameters]
    named = {
        parameter.name: parameter
        for parameter in parameters
        if parameter.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
        and parameter.name not in reserved_args
    }
    given = {name: value for name, value in component.items() if not name.startswith("_")}
    valid = [f"{key}.{name}" for name in named]
    errors = [
        renamed(f"{key}.{name}={format_value(value)}")
        or f"{key}.{name} is no argument of {component['_target_']}{suggest(f'{key}.{name}', valid)}"
        for name, value in given.items()
        if name not in named and Parameter.VAR_KEYWORD not in kinds
    ]
    for name, parameter in named.items():
        if name in given:
            errors += _value_errors(f"{key}.{name}", given[name], parameter)
        elif parameter.default is Parameter.empty and "_args_" not in component:
            errors.append(f"{key}.{name} has no value\n  set +{key}.{name}=...")
    return errors


def _parameters(target: Callable[..., Any]) -> list[Parameter]:
    """The target's parameters; any, where there is no telling. Their annotations are evaluated where they can be."""
    try:
        found = signature(target)
    except (TypeError, ValueError):  # nothing that can be called, or written in C
        return [Parameter("anything", Parameter.VAR_KEYWORD)]
    with suppress(Exception):  # an annotation may be any text, such as a name that is imported for type checkers alone
        found = signature(target, eval_str=True)
    return list(found.parameters.values())


def _value_errors(name: str, value: Any, parameter: Parameter) -> list[str]:
    kind = _kind_of_parameter(parameter)
    # A mapping is a leaf of its own, from which an object is made.
    return (
        []
        if isinstance(value, dict) or kind.accepts(value)
        else [f"{name}={format_value(value)}\n  valid: {kind.valid}"]
    )


def _kind_of_parameter(parameter: Parameter) -> ValueType:
    annotation, default = parameter.annotation, parameter.default
    if annotation is not Parameter.empty and not isinstance(annotation, str):
        return _kind_of(annotation) | choices(None) if default is None else _kind_of(annotation)
    if isinstance(default, bool | int | float):
        valid = switch.valid if isinstance(default, bool) else NUMBER.valid
        return ValueType(valid, lambda value: not isinstance(value, str))
    return ANYTHING


def _kind_of(annotation: Any) -> ValueType:
    """The plain values that an annotation lets through."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return choices(*parts)
    if origin in (Union, UnionType):
        kinds = [_kind_of(part) for part in parts if part is not Tensor]  # none can be typed
        return reduce(or_, dict.fromkeys(kinds))
    if parts and origin in (list, tuple, Sequence, Iterable):
        repeated = origin is not tuple or Ellipsis in parts
        return _list_of([_kind_of(part) for part in parts if part is not Ellipsis], repeated)
    return KINDS.get(annotation, ANYTHING) if isinstance(annotation, type) else ANYTHING


def _list_of(value_types: list[ValueType], repeated: bool) -> ValueType:
    """A list with an element of each kind, or any number of them of the one kind."""

    def accepts(value: Any) -> bool:
        if not isinstance(value, list):
            return False
        wanted = value_types * len(value) if repeated else value_types
        return len(wanted) == len(value) and all(kind.accepts(one) for kind, one in zip(wanted, value, strict=True))

    listed = ", ".join(kind.valid for kind in value_types)
    return ValueType(f"[{listed}, ...]" if repeated else f"[{listed}]", accepts)
