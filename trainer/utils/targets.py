"""Facts that the classes of a configuration state about themselves, for code that has their names alone."""

from __future__ import annotations

from functools import cache
from pkgutil import resolve_name


@cache
def declares(target: str, attribute: str) -> bool:
    """Return whether a class or function has an attribute that is True, such as `is_natural = True`.

    Args:
        target: its dotted name, a `_target_` of the configuration. One that cannot be imported declares nothing.
        attribute: the name of the attribute. A property, which depends on the object, is not True of its class.
    """
    try:
        return getattr(resolve_name(target), attribute, False) is True
    except Exception:  # whatever importing a user's module raises: the run that needs it reports it
        return False
