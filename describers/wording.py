"""The words of the sentence form, and which of them may be replaced by others."""

from __future__ import annotations

import string
from collections.abc import Mapping

from speech_llm.errors import UserError

# Small LLMs repeat short, complete sentences best, subject first.
# A key with a dot is the wording for one value; the key before the dot serves every other value.
WORDING: dict[str, str] = {
    "noun": "speaker",
    "noun.child": "child",
    "noun.teenager": "teenager",
    "accent": "with {article} {value} accent",
    "speaks": "{subject} speaks {manner}.",
    "heard": "{subject} is heard.",
    "language": "{value}",
    "speed": "at {article} {value} speed",
    "speed.slow": "slowly",
    "speed.normal": "at a normal speed",
    "speed.fast": "fast",
    "emotion": "in {article} {value} tone",
    "pitch": "with {article} {value}-pitched voice",
    "volume": "in {article} {value} voice",
    "volume.moderate": "at a moderate volume",
    "voice": "with {article} {volume}, {pitch}-pitched voice",  # both known; a volume with a wording of its own stays apart
    "saying": '{pronoun}: "{value}"',
    "pronoun": "The speaker says",
    "pronoun.female": "She says",
    "pronoun.male": "He says",
    "transcript_only": 'Someone says: "{value}"',
    "keyword_only": 'Someone says the word "{value}".',
    "keyword": 'The keyword is "{value}".',
    "event_only": "The sound of {value} is heard.",
    "event": "In the background, the sound of {value} is heard.",
    "event.dog bark": "a dog barking",
    "event.sea waves": "sea waves",
    "event.helicopter": "a helicopter",
    "event.person sneeze": "a person sneezing",
    "event.rooster": "a rooster",
    "event.clock tick": "a clock ticking",
    "event.chainsaw": "a chainsaw",
    "event.fire crackling": "a crackling fire",
    "event.baby cry": "a baby crying",
    "event.rain": "rain",
    "event.bus": "a bus",
    "event.kitchen": "a kitchen",
    "noise": "The recording is {value}.",
    "reverberation": "The recording is {value}.",
    "pauses": "The speech has {value} pauses.",
    "pauses.0": "The speech has no pauses.",
    "pauses.1": "The speech has one pause.",
    "duration": "The recording is {value} long.",
    "other": "The {name} is {value}.",
    "nothing": "Nothing is known about the recording.",
}

# The keys of `WORDING` that are no attributes, and what every key may have in braces where that is not its value alone.
GRAMMAR = (
    "noun",
    "speaks",
    "heard",
    "voice",
    "saying",
    "pronoun",
    "transcript_only",
    "keyword_only",
    "event_only",
    "other",
    "nothing",
)
_FIELDS: dict[str, tuple[str, ...]] = {
    "noun": (), "pronoun": (), "nothing": (), "speaks": ("subject", "manner"), "heard": ("subject",),
    "voice": ("article", "volume", "pitch"), "saying": ("pronoun", "value"), "keyword": ("pronoun", "value"),
    **dict.fromkeys(("accent", "language", "speed", "emotion", "pitch", "volume"), ("article", "value")),
    **dict.fromkeys(("transcript_only", "keyword_only", "event_only", "event", "duration"), ("value",)),
}  # fmt: skip
# Told inside the sentence about the speaker, so that they have no sentence to word.
_UNWORDED = ("gender", "age_group", "transcript", "segments")


def check_wording(wording: Mapping[str, str]) -> None:
    """Raise `UserError` for a wording that no description could use.

    A key is one of `WORDING`, one of them with a value (`emotion.angry`), or any other attribute (`room`, `room.kitchen`),
    whose sentence may have `{value}` and `{name}` in it.
    """
    if not isinstance(wording, Mapping) or not all(isinstance(text, str) for text in wording.values()):
        raise UserError('wording: expected an object with texts, such as {"emotion": "and sounds {value}"}')
    for key, text in wording.items():
        name, dot, _ = key.partition(".")
        if name in _UNWORDED:
            raise UserError(
                f"wording of {key!r}: it has no words of its own; it is told by 'speaks', 'heard' and 'saying'"
            )
        as_it_is = dot and name in ("event", "noun", "pronoun")
        allowed = () if as_it_is else _FIELDS.get(name, ("name", "value"))
        try:
            fields = [field for _, field, _, _ in string.Formatter().parse(text) if field is not None]
        except ValueError as error:
            raise UserError(f"wording of {key!r}: {text!r} has a malformed field ({error})") from None
        for field in fields:
            if field not in allowed:
                may = ", ".join(f"{{{one}}}" for one in allowed) or "no field"
                raise UserError(f"wording of {key!r}: {{{field}}} means nothing there; it may have {may}")
