"""Instantiate components of the configuration. The only user of Hydra's `instantiate`; errors name their keys."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import hydra.utils
from hydra.errors import InstantiationException

from trainer.config.schema import ComponentConfig, target_arguments, typed_overrides
from trainer.config.signatures import argument_errors
from trainer.utils.errors import ErrorCollector
from trainer.utils.user_code import user_location

EXTRAS = {"pytorch_optimizer": "optimizers"}  # packages that choices of conf/ name, and what installs them


def instantiate(key: str, component: ComponentConfig, reserved_args: tuple[str, ...] = (), **options: Any) -> Any:
    """Instantiate a component.

    Args:
        key: its dotted key.
        component: its `_target_` and arguments.
        reserved_args: the arguments that a user cannot set.
        options: passed on to Hydra's `instantiate`.

    Raises:
        ValueError: lists the errors in the component, each with its key.
    """
    component = target_arguments(key, component)

    def make() -> Any:
        if errors := argument_errors(key, component, import_target, reserved_args):
            raise ValueError("\n".join(errors))
        return hydra.utils.instantiate(component, _convert_="all", **options)

    return annotate_errors(key, component, make)


def import_target(component: ComponentConfig) -> Any:
    """Import the class or function that a component names; an ImportError names the line of the user's module."""
    try:
        return hydra.utils.get_object(component["_target_"])
    except ImportError as error:
        location = user_location(error)
        if extra := EXTRAS.get(component["_target_"].partition(".")[0]):
            raise ImportError(f"{error}\n  pip install silotrain[{extra}]") from error
        raise ImportError(f"{error} in {location}" if location else str(error)) from error


def instantiate_all(key: str, components: dict[str, ComponentConfig], **reserved: Any) -> dict[str, Any]:
    """Instantiate components by name, each with the arguments `reserved`, which a user cannot set.

    Raises:
        ValueError: lists the errors in all of them.
    """
    errors = ErrorCollector()
    made = {
        name: errors.collect(partial(instantiate, f"{key}.{name}", component, tuple(reserved), **reserved))
        for name, component in components.items()
    }
    errors.raise_any()
    return made


def annotate_errors(key: str, component: ComponentConfig, make: Callable[[], Any]) -> Any:
    """Return the result of `make`; raise its errors as ValueErrors that name the key and values of the component.

    An error inside the user's own code is described by its class, and by the file and the line.
    """
    try:
        return make()
    except Exception as error:
        cause = error.__cause__ if isinstance(error, InstantiationException) and error.__cause__ else error
        reason, location = " ".join(str(cause).split()), user_location(cause)
        if location:
            kind = "" if isinstance(cause, ValueError) else f"{type(cause).__name__}{': ' * bool(reason)}"
            reason = f"{kind}{reason}\n  in {location}"
        elif not isinstance(error, ImportError | InstantiationException | TypeError | ValueError):
            raise
        elif isinstance(cause, TypeError) and "argument" not in reason:
            reason = "a value is of the wrong type"
        elif isinstance(cause, ValueError) and (f"{key}=" in reason or f"{key}." in reason):
            raise ValueError(str(cause)) from error
        raise ValueError(f"{key}={component['_target_']}: {reason}{typed_overrides(key, component)}") from error


def class_name(thing: object) -> str:
    """Return the name of an object's class, without its module."""
    return type(thing).__name__
