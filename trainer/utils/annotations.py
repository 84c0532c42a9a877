"""Types of plain values with their bounds, for options that pydantic validates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field

# true is no number, 2.0 no whole number, and 7 no text; an unknown name is an error.
STRICT = ConfigDict(strict=True)
OPTIONS = ConfigDict(STRICT, extra="forbid", allow_inf_nan=False)

Count = Annotated[int, Field(ge=0)]
PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Seconds = Annotated[float, Field(ge=0)]


def predicate(condition: Callable[[Any], bool]) -> AfterValidator:
    """Return the metadata of an annotation whose values have to meet a condition too."""

    def check(value: Any) -> Any:
        if not condition(value):
            raise ValueError(value)
        return value

    return AfterValidator(check)


Span = Annotated[
    tuple[PositiveInt, PositiveInt],
    Field(description="[least,most] such as [2,5]"),
    predicate(lambda span: span[0] <= span[1]),
]
