"""Check the arguments of a component against the signature of its target, before the target is called."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from inspect import Parameter, signature
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from torch import Tensor

from trainer.config.renamed_keys import renamed
from trainer.config.schema import ComponentConfig
from trainer.config.validators import NAMES, value_errors
from trainer.utils.text import format_value, suggest

KEYWORD = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)


def argument_errors(
    key: str,
    component: ComponentConfig,
    import_target: Callable[[ComponentConfig], Callable[..., Any]],
    reserved_args: Collection[str] = (),
) -> list[str]:
    """List the unknown, missing and invalid arguments of the component `key`, and of the components inside it.

    Without an annotation only a text is invalid, and only where the default is a number or a switch.

    Args:
        key: the dotted key of the component.
        component: its `_target_` and arguments.
        import_target: imports the target of a component; raises ImportError where there is none.
        reserved_args: the arguments that a user cannot set.
    """
    try:
        parameters = _parameters(import_target(component))
    except ImportError as error:
        return [f"{key}={component['_target_']}: {' '.join(str(error).split())}"]
    named = {item.name: item for item in parameters if item.kind in KEYWORD and item.name not in reserved_args}
    given = {name: value for name, value in component.items() if not name.startswith("_")}
    is_open = any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters)
    errors: list[str] = []
    for name, value in given.items():
        if name not in named and not is_open:
            errors.append(_unknown(f"{key}.{name}", value, component, [f"{key}.{name}" for name in named]))
        elif isinstance(value, dict) and "_target_" in value and component.get("_recursive_", True):
            errors += argument_errors(f"{key}.{name}", value, import_target)
        elif name in named:
            errors += value_errors(f"{key}.{name}", value, _accepted(named[name], value))
    if "_args_" not in component and not component.get("_partial_"):
        missing = [name for name, item in named.items() if item.default is Parameter.empty and name not in given]
        errors += [f"{key}.{name} has no value\n  set +{key}.{name}=..." for name in missing]
    return errors


def _unknown(name: str, value: Any, component: ComponentConfig, valid: Sequence[str]) -> str:
    return renamed(f"{name}={format_value(value)}") or (
        f"{name} is no argument of {component['_target_']}{suggest(name, valid)}"
    )


def _parameters(target: Callable[..., Any]) -> list[Parameter]:
    """Return the parameters of a target, their annotations evaluated if possible; any keyword, if they are unknown."""
    try:
        found = signature(target)
    except (TypeError, ValueError):  # not callable, or written in C
        return [Parameter("anything", Parameter.VAR_KEYWORD)]
    return [item.replace(annotation=_evaluate(item.annotation, target)) for item in found.parameters.values()]


def _evaluate(annotation: Any, target: Callable[..., Any]) -> Any:
    """Evaluate an annotation that is a string, in the module of the class that it may be inherited from."""
    if isinstance(annotation, str):
        for owner in getattr(target, "__mro__", [target]):
            with suppress(Exception):  # it may be any text, or a name that is imported for type checkers alone
                return eval(annotation, vars(sys.modules[owner.__module__]))
    return annotation


def _accepted(parameter: Parameter, value: Any) -> Any:
    """Return the annotation that the value of a parameter has to meet."""
    annotation, default = parameter.annotation, parameter.default
    if annotation is not Parameter.empty:
        return _plain(annotation) | None if default is None else _plain(annotation)
    if isinstance(default, bool | int | float) and isinstance(value, str):
        return bool if isinstance(default, bool) else float
    return Any


def _plain(annotation: Any) -> Any:
    """Reduce an annotation to the plain values among those it accepts; Any, if it says nothing about them."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return annotation
    if origin in (Union, UnionType):
        return Union[tuple(_plain(item) for item in arguments if item is not Tensor)]  # noqa: UP007
    if arguments and origin in (list, Sequence, Iterable):
        return list[_plain(arguments[0])]
    if origin is tuple:
        return tuple[tuple(item if item is Ellipsis else _plain(item) for item in arguments)]
    if (origin or annotation) in (dict, Mapping):
        return dict
    if getattr(annotation, "_is_protocol", False) and annotation.__module__ != "typing":
        return ComponentConfig  # no plain value has the methods of one of our protocols
    return annotation if isinstance(annotation, type) and annotation in NAMES else Any
