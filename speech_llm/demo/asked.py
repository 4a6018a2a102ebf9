"""What the page may ask, and within which bounds; whatever breaks them is told in one sentence."""

from __future__ import annotations

from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from speech_llm.demo.voices import Turn, VoiceName
from speech_llm.errors import UserError
from speech_llm.streaming import Drawing

# Of the JSON of one request; the bounds below keep what is inside it smaller.
MAX_JSON_BYTES = 256 << 10
MAX_QUESTION = 2_000
MAX_ANSWER = 8_000
MAX_TURNS = 20
MAX_NEW_TOKENS = 512


Model = TypeVar("Model", bound=BaseModel)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class AskedTurn(_Strict):
    """A turn of before, as the page remembers it."""

    question: Annotated[str, Field(min_length=1, max_length=MAX_QUESTION)]
    answers: dict[VoiceName, Annotated[str, Field(max_length=MAX_ANSWER)]] = Field(default_factory=dict)


class Asked(_Strict):
    """A question about a clip (by id) or about none, and how it is to be answered."""

    question: Annotated[str, Field(min_length=1, max_length=MAX_QUESTION)]
    clip: Annotated[str, Field(max_length=64)] | None = None
    turns: Annotated[list[AskedTurn], Field(max_length=MAX_TURNS)] = Field(default_factory=list)
    voices: Annotated[list[VoiceName], Field(min_length=1, max_length=3)] = ["model"]
    max_new_tokens: Annotated[int, Field(ge=1, le=MAX_NEW_TOKENS)] = 128
    temperature: Annotated[float, Field(ge=0, le=2, strict=False, allow_inf_nan=False)] = 0.0
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0

    def drawing(self) -> Drawing:
        return Drawing(self.max_new_tokens, self.temperature, seed=self.seed)

    def history(self) -> list[Turn]:
        return [Turn(turn.question, dict(turn.answers)) for turn in self.turns]


class Described(_Strict):
    """A clip (by id) that is to be described."""

    clip: Annotated[str, Field(max_length=64)]


def read_asked(body: bytes) -> Asked:
    """Raises `UserError`."""
    return _read(Asked, body)


def read_described(body: bytes) -> Described:
    """Raises `UserError`."""
    return _read(Described, body)


def _read(kind: type[Model], body: bytes) -> Model:
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        if where == "question" and first["type"] == "string_too_short":
            raise UserError("the question is empty; type or pick one") from None
        if where == "turns" and first["type"] == "too_long":
            raise UserError(
                f"this conversation has {MAX_TURNS} turns, which is all there may be; start a new one"
            ) from None
        raise UserError(f"{where or 'the request'}: {first['msg'][:1].lower()}{first['msg'][1:]}") from None
