"""From a leaf of the configuration to its object: the only user of Hydra's `instantiate`. Faults name their keys."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import hydra.utils
from hydra.errors import InstantiationException

from trainer.config.schema import ComponentConfig, target_arguments, typed_overrides
from trainer.config.signatures import argument_errors


class ErrorCollector:
    """Collects what is wrong, so that it can be said all at once."""

    def __init__(self):
        self.messages: list[str] = []

    def collect(self, make: Callable[[], Any]) -> Any:
        """What `make` returns; None, and its ValueError remembered, if it fails."""
        try:
            return make()
        except ValueError as error:
            self.messages.append(str(error))
            return None

    def raise_any(self) -> None:
        """Raises a ValueError that says all of it, if anything is wrong."""
        if self.messages:
            raise ValueError("\n".join(self.messages))


def instantiate(key: str, component: ComponentConfig, reserved_args: tuple[str, ...] = (), **options: Any) -> Any:
    """What the leaf describes; `reserved_args` are the arguments that are not the user's."""
    component = target_arguments(key, component)

    def make() -> Any:
        if errors := argument_errors(key, component, import_target(component), reserved_args):
            raise ValueError("\n".join(errors))
        return hydra.utils.instantiate(component, _convert_="all", **options)

    return annotate_errors(key, component, make)


def import_target(component: ComponentConfig) -> Any:
    """The class or function that the leaf names."""
    return hydra.utils.get_object(component["_target_"])


def instantiate_all(key: str, components: dict[str, ComponentConfig], **reserved: Any) -> dict[str, Any]:
    """What each of the leaves describes, `reserved` what is not the user's; all that is wrong is said at once."""
    errors = ErrorCollector()
    made = {
        name: errors.collect(partial(instantiate, f"{key}.{name}", leaf, tuple(reserved), **reserved))
        for name, leaf in components.items()
    }
    errors.raise_any()
    return made


def annotate_errors(key: str, component: ComponentConfig, make: Callable[[], Any]) -> Any:
    """What `make` returns; what a user did wrong in the leaf becomes a ValueError that names the key."""
    try:
        return make()
    except (ImportError, InstantiationException, TypeError, ValueError) as error:
        cause = error.__cause__ if isinstance(error, InstantiationException) and error.__cause__ else error
        reason = " ".join(str(cause).split())
        if isinstance(cause, TypeError) and "argument" not in reason:
            reason = "a value is of the wrong type"
        elif isinstance(cause, ValueError) and (f"{key}=" in reason or f"{key}." in reason):
            raise ValueError(str(cause)) from error
        raise ValueError(f"{key}={component['_target_']}: {reason}{typed_overrides(key, component)}") from error


def class_name(thing: object) -> str:
    """The last name of its class."""
    return type(thing).__name__
