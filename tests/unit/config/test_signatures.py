"""Arguments must match the annotations of their target, or the types of its defaults.

Without either, any value is valid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Optional, Protocol, SupportsFloat

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trainer.config.signatures import argument_errors


def errors(target: Callable[..., Any], ours: tuple[str, ...] = (), **values: Any) -> list[str]:
    return argument_errors("key", {"_target_": "the.target", **values}, lambda _: target, ours)


def taking(annotation: Any) -> Callable[..., Any]:
    """Return a function of one argument `x` with this annotation."""

    def target(x: Any) -> None: ...

    target.__annotations__ = {"x": annotation}
    return target


class Rule(Protocol):
    def apply(self) -> None: ...


ACCEPTED = [
    (int, [3, -1]),
    (float, [3, 0.5]),
    (bool, [True]),
    (str, ["3", ""]),
    (Path, ["a/b"]),
    (str | Path, ["a"]),
    (int | None, [3, None]),
    (Optional[float], [3, None]),  # noqa: UP045
    (float | Tensor, [0.1]),
    (Literal["a", "b", 3, None], ["a", 3, None]),
    (tuple[float, float | None], [[1, None]]),
    (tuple[int, ...], [[], [1, 2]]),
    (list[str], [["a"], []]),
    (Sequence[int], [[1]]),
    (list[tuple[int, str]], [[[1, "a"]]]),
    (Any, [1, "a", None, [1]]),
    (list, [[1], ["a"]]),
    (dict, [{"a": 1}]),
    (Mapping[str, int], [{"a": 1}]),
    (tuple[()], [[]]),
    (Callable[[int], int], ["a"]),
    (float | Callable[[], float], ["a"]),
    (torch.dtype, ["float32"]),
    (Rule | None, [None]),
    (SupportsFloat, [3]),
    ("ImportedForTypeCheckersAlone | int", ["a"]),
]
REFUSED = [
    (int, [2.5, True, "3", None, [3]], "a whole number"),
    (float, ["fast", True, None, [0.1]], "a number"),
    (bool, [1, "yes", None], "true or false"),
    (Path, [3], "a text (digits as \"'7'\")"),
    (str | Path, [3], "a text (digits as \"'7'\")"),
    (int | None, ["a"], "a whole number, or null"),
    (float | Tensor, ["fast"], "a number"),
    (Literal["a", 3, None], ["b", 4], "a or 3 or null"),
    (tuple[float, float | None], [3, [1], [1, "a"], [1, 2, 3]], "[a number, a number, or null]"),
    (tuple[int, ...], [3, ["a"]], "[a whole number, ...]"),
    (list[int], [3, [1, 2.5]], "[a whole number, ...]"),
    (list, ["a", {"a": 1}], "a list"),
    (Iterable[int], [3, ["a"]], "[a whole number, ...]"),
    (Mapping[str, int], [3, [1]], "a mapping"),
    (int, [{"a": 1}], "a whole number"),
    (Rule | None, ["a", 3, {"a": 1}], "a mapping with a _target_, or null"),
]


@pytest.mark.parametrize(("annotation", "values"), ACCEPTED, ids=str)
def test_values_that_meet_the_annotation_are_valid(annotation: Any, values: list[Any]) -> None:
    for value in values:
        assert errors(taking(annotation), x=value) == []


@pytest.mark.parametrize(("annotation", "values", "valid"), REFUSED, ids=str)
def test_other_values_are_answered_by_the_valid_ones(annotation: Any, values: list[Any], valid: str) -> None:
    for value in values:
        (fault,) = errors(taking(annotation), x=value)
        assert fault.startswith("key.x=") and fault.endswith(f"\n  valid: {valid}")


def test_values_are_formatted_as_they_are_typed() -> None:
    assert errors(taking(int), x=[1, None, True])[0].startswith("key.x=[1,null,true]\n")


def test_a_default_of_null_makes_null_valid() -> None:
    def target(x: int = None) -> None: ...  # pyright: ignore[reportArgumentType]  # noqa: RUF013

    assert errors(target, x=None) == [] and len(errors(target, x="a")) == 1


def test_without_an_annotation_only_a_text_for_a_number_or_a_switch_is_refused() -> None:
    def target(rate=0.1, count=1, fast=False, name="a", other=None) -> None: ...

    assert errors(target, rate=1, count=2.5, fast=1, name=3, other="b") == []
    assert errors(target, rate=None, count=[1, 2]) == []
    assert errors(target, rate="a", count="b", fast="c") == [
        "key.rate=a\n  valid: a number",
        "key.count=b\n  valid: a number",
        "key.fast=c\n  valid: true or false",
    ]


def test_unknown_and_missing_arguments_are_reported_at_once() -> None:
    def target(made, needed: int, width: int = 3) -> None: ...

    assert errors(target, ("made",), widht=4) == [
        "key.widht is no argument of the.target; did you mean key.width?\n  valid: key.width, key.needed",
        "key.needed has no value\n  set +key.needed=...",
    ]
    assert errors(lambda: None, x=3) == ["key.x is no argument of the.target\n  valid: none"]


def test_arguments_that_the_signature_leaves_open_are_valid() -> None:
    def target(*args: int, **options: int) -> None: ...

    assert errors(target, x="anything") == []
    assert errors(torch.zeros, x=3) == [], "written in C"
    assert errors(taking(int), _args_=[3]) == [] and errors(taking(int), _args_=[3], _recursive_=False) == []


class Inner:
    def __init__(self, trim: float, other: Any = None): ...


def outer(inner: Inner, count: int = 1) -> None: ...


def nested(**inner: Any) -> list[str]:
    """Return the errors of `outer` with an inner component of these arguments."""
    component = {"_target_": "outer", "inner": {"_target_": "Inner", **inner}}
    targets = {"outer": outer, "Inner": Inner}

    def import_target(component: dict[str, Any]) -> Callable[..., Any]:
        if component["_target_"] not in targets:
            raise ImportError("no such\nmodule")
        return targets[component["_target_"]]

    return argument_errors("key", component, import_target)


def test_components_inside_a_component_are_checked_under_their_full_keys() -> None:
    assert nested(trim=0.1) == []
    assert nested(trimm=1, trim="much") == [
        "key.inner.trimm is no argument of Inner; did you mean key.inner.trim?\n"
        "  valid: key.inner.trim, key.inner.other",
        "key.inner.trim=much\n  valid: a number",
    ]
    assert nested() == ["key.inner.trim has no value\n  set +key.inner.trim=..."]
    assert nested(_partial_=True) == []
    assert nested(trim=1, other={"_target_": "Inner", "trim": None}) == ["key.inner.other.trim=null\n  valid: a number"]
    assert nested(trim=1, other={"_target_": "Inner"}, _recursive_=False) == []
    assert nested(trim=1, other={"_target_": "nowhere"}) == ["key.inner.other=nowhere: no such module"]


@given(st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers()))
def test_a_whole_number_is_a_number(value: Any) -> None:
    """A float accepts an int, and a union accepts the values of each member."""
    refused = [bool(errors(taking(annotation), x=value)) for annotation in (int, float, int | float, int | str)]
    assert refused[1] <= refused[0] and refused[2] == refused[1] and refused[3] <= refused[0]
