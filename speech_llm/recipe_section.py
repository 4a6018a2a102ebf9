"""What the sections of a recipe have in common: strictness, kinds of values, and how a contradiction is told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from pydantic_core import PydanticCustomError

Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Text = Annotated[str, StringConstraints(min_length=1)]


class Section(BaseModel):
    """A part of a recipe: no unknown keys, no silent conversions ("3" is not a number)."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


def contradiction(keys: Sequence[str], sentence: str) -> PydanticCustomError:
    """Keys that cannot stand together; the message points at the one given by `--set`, else at the first."""
    # As a value of the context, so that braces in the sentence are not taken for fields.
    return PydanticCustomError("contradiction", "{sentence}", {"sentence": sentence, "keys": list(keys)})
