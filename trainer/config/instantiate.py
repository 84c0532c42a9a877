"""From a leaf of the configuration to its object: the only user of Hydra's `instantiate`. Faults name their keys."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import hydra.utils
from hydra.errors import InstantiationException

from trainer.config.schema import Leaf, for_target, given
from trainer.config.signatures import argument_faults


class Faults:
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


def instantiate(key: str, leaf: Leaf, ours: tuple[str, ...] = (), **options: Any) -> Any:
    """What the leaf describes; `ours` are the arguments that are not the user's."""
    leaf = for_target(key, leaf)

    def make() -> Any:
        if faults := argument_faults(key, leaf, object_of(leaf), ours):
            raise ValueError("\n".join(faults))
        return hydra.utils.instantiate(leaf, _convert_="all", **options)

    return guard(key, leaf, make)


def object_of(leaf: Leaf) -> Any:
    """The class or function that the leaf names."""
    return hydra.utils.get_object(leaf["_target_"])


def each(key: str, leaves: dict[str, Leaf], **told: Any) -> dict[str, Any]:
    """What each of the leaves describes, `told` what is not the user's; all that is wrong is said at once."""
    faults = Faults()
    made = {
        name: faults.collect(partial(instantiate, f"{key}.{name}", leaf, tuple(told), **told))
        for name, leaf in leaves.items()
    }
    faults.raise_any()
    return made


def guard(key: str, leaf: Leaf, make: Callable[[], Any]) -> Any:
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
        raise ValueError(f"{key}={leaf['_target_']}: {reason}{given(key, leaf)}") from error


def name_of(thing: object) -> str:
    """The last name of its class."""
    return type(thing).__name__
