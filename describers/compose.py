"""Attributes in, one description out: a plain English sentence, DeSTA's bracketed form, or key-value lines.

Which attributes are told, in which order and with which wording is the caller's choice; `drop` leaves some out by
chance, so that a model trained on descriptions does not come to rely on any single attribute.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from describers.vocabulary import canonical, display, display_name
from speech_llm.errors import UserError, nearest

FORMS = ("sentence", "desta", "key_value")

# The order in which attributes are told unless the caller says otherwise; others follow in the order given.
DEFAULT_ORDER = (
    "transcript", "gender", "age_group", "accent", "language", "speed", "emotion", "pitch", "volume", "keyword", "event",
    "native_language", "num_speakers", "pauses", "noise", "reverberation", "pitch_hz", "pitch_range_st", "level_dbfs",
    "words_per_minute", "syllables_per_s", "pause_share", "snr_db", "rt60_s", "duration",
)  # fmt: skip

# A number and the word that stands for it: unless the caller asks for the number, the word is enough.
WORD_FOR = {
    "pitch_hz": "pitch", "pitch_range_st": "pitch", "level_dbfs": "volume", "words_per_minute": "speed",
    "syllables_per_s": "speed", "pause_share": "pauses", "snr_db": "noise", "rt60_s": "reverberation",
}  # fmt: skip

# The wording of the sentence form, all of it. Small LLMs repeat short, complete sentences best, subject first.
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
_OF_SPEAKER = ("gender", "age_group", "accent", "language", "speed", "emotion", "pitch", "volume")
_OF_RECORDING = ("noise", "reverberation", "pauses")
_UNITS = {
    "duration": "s", "snr_db": " dB", "pitch_hz": " Hz", "pitch_range_st": " semitones", "level_dbfs": " dBFS",
    "words_per_minute": " words per minute", "syllables_per_s": " syllables per second", "rt60_s": " s",
}  # fmt: skip


def compose(
    attributes: Mapping[str, Any],
    form: str = "sentence",
    use: Sequence[str] | None = None,
    drop: float = 0.0,
    shuffle: bool = False,
    seed: int | random.Random = 0,
) -> str:
    """The description of a clip.

    `attributes`: name -> value (duration in seconds; `segments` a list of `{"start_s", "end_s", "text"}` for the parts
    of a long transcript). `form`: "sentence", "desta" or "key_value". `use`: the attributes to tell, in this order
    (default: all, but no number whose word is told: not the hertz of a high voice). `drop`: probability of leaving each one out; the last one left is always told. `shuffle`: tell them
    in a random order. `seed`: makes both choices. Raises `UserError` for an unknown form.
    """
    if form not in FORMS:
        raise UserError(
            f"unknown description form {form!r}; choose one of {', '.join(FORMS)}.{nearest(form, [*FORMS])}"
        )
    told = _choose(attributes, use, drop, shuffle, seed)
    if not told:
        return WORDING["nothing"]
    segments = attributes.get("segments") if "transcript" in told else None
    if form == "desta":
        return _desta(told, segments or [], attributes.get("duration"))
    if form == "key_value":
        return "\n".join(f"{display_name(name)}: {_written(name, value)}" for name, value in told.items())
    return _sentences(told)


def _choose(
    attributes: Mapping[str, Any],
    use: Sequence[str] | None,
    drop: float,
    shuffle: bool,
    seed: int | random.Random,
) -> dict[str, Any]:
    known = {
        name: value
        for name, value in attributes.items()
        if value not in (None, "", []) and name != "segments"
    }
    if use is None:
        use = [*DEFAULT_ORDER, *(name for name in known if name not in DEFAULT_ORDER)]
        use = [name for name in use if WORD_FOR.get(name) not in known]
    names = [name for name in use if name in known]
    if drop or shuffle:
        rng = seed if isinstance(seed, random.Random) else random.Random(seed)
        if shuffle:
            rng.shuffle(names)
        kept = [name for name in names if rng.random() >= drop]
        names = kept or names[-1:]
    return {name: known[name] for name in names}


def _sentences(told: dict[str, Any]) -> str:
    text, keyword = _quoted(told.get("transcript", "")), str(told.get("keyword", ""))
    of_speaker = any(name in told for name in _OF_SPEAKER)
    said = [_speaker(told)] if of_speaker else []
    pronoun = _worded("pronoun", canonical("gender", told.get("gender", "")))
    if text:
        template = WORDING["saying" if of_speaker else "transcript_only"]
        said.append(_ended(template.format(pronoun=pronoun, value=text)))
    if keyword and text.strip(" .!?").casefold() != keyword.casefold():
        template = WORDING["keyword" if text else "saying" if of_speaker else "keyword_only"]
        said.append(_ended(template.format(pronoun=pronoun, value=keyword)))
    if "event" in told:
        known = canonical("event", told["event"])
        sound = WORDING.get(f"event.{known}", known)
        said.append(WORDING["event" if said else "event_only"].format(value=sound))
    for name, value in told.items():
        if name not in (*_OF_SPEAKER, "transcript", "keyword", "event", "duration"):
            template = _worded(name if name in _OF_RECORDING else "other", canonical(name, value))
            said.append(template.format(name=display_name(name), value=_written(name, value)))
    if "duration" in told:
        said.append(WORDING["duration"].format(value=_length(told["duration"])))
    return " ".join(said)


def _speaker(told: dict[str, Any]) -> str:
    """The sentence about the speaker: who, then how. Without a manner of speaking the speaker "is heard"."""
    age = canonical("age_group", told["age_group"]) if "age_group" in told else ""
    noun = _worded("noun", age)
    adjectives = [display("gender", told["gender"])] if "gender" in told else []
    if age and noun == WORDING["noun"]:
        adjectives.insert(0, display("age_group", age))
    subject = " ".join([*adjectives, noun])
    subject = _capital(f"{_article(subject)} {subject}")
    if "accent" in told:
        subject += " " + _phrase("accent", told["accent"])
    manner = [_phrase("language", told["language"])] if "language" in told else []
    for name, value in told.items():  # in the caller's order
        if name in ("speed", "emotion") or (name in ("pitch", "volume") and isinstance(value, str)):
            manner.append(_phrase(name, value))
    if not manner:
        return WORDING["heard"].format(subject=subject)
    return WORDING["speaks"].format(subject=subject, manner=" ".join(manner))


def _worded(name: str, value: str) -> str:
    return WORDING.get(f"{name}.{value}", WORDING[name])


def _phrase(name: str, value: Any) -> str:
    shown = display(name, value)
    return _worded(name, canonical(name, value)).format(article=_article(shown), value=shown)


def _ended(sentence: str) -> str:
    """A sentence that ends with a quotation gets its full stop, unless the quotation has its own."""
    return sentence if sentence.rstrip('"').endswith((".", "!", "?")) else sentence + "."


def _desta(told: dict[str, Any], segments: Sequence[Mapping[str, Any]], duration_s: Any) -> str:
    """`[00:00-00:04] "text" (Gender: Female, Emotion: Happy, Duration: 4s)`, a line a segment (DeSTA2.5, arXiv 2507.02768)."""
    facts = [
        f"{display_name(name).capitalize()}: {_capital(_written(name, value))}"
        for name, value in told.items()
        if name != "transcript"
    ]
    lines = [(part["start_s"], part["end_s"], part["text"]) for part in segments]
    if not lines:
        lines = [(0, duration_s, told.get("transcript", ""))]
    out = []
    for start_s, end_s, text in lines:
        pieces = [f"[{_clock(start_s)}-{_clock(end_s)}]"] if end_s is not None else []
        if text:
            pieces.append(f'"{_quoted(text)}"')
        out.append(pieces)
    if facts:
        out[-1].append(f"({', '.join(facts)})")
    return "\n".join(" ".join(pieces) for pieces in out)


def _written(name: str, value: Any) -> str:
    """A value as it stands in a list: numbers with their unit, words by their display name."""
    if name == "transcript":
        return f'"{_quoted(value)}"'
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        rounded = max(round(value), 1) if name == "duration" else value
        return f"{rounded:g}{_UNITS.get(name, '')}"
    return display(name, value)


def _quoted(text: Any) -> str:
    """Text that can stand between double quotes."""
    return " ".join(str(text).split()).replace('"', "'")


def _length(duration_s: Any) -> str:
    """ "4 seconds", "1 second", "10 minutes 5 seconds"; whole seconds, as nobody hears tenths."""
    total = max(round(float(duration_s)), 1)
    minutes, seconds = divmod(total, 60)
    parts = [
        f"{count} {unit}{'' if count == 1 else 's'}"
        for count, unit in ((minutes, "minute"), (seconds, "second"))
        if count
    ]
    return " ".join(parts)


def _clock(time_s: Any) -> str:
    minutes, seconds = divmod(round(float(time_s)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{seconds:02}" if hours else f"{minutes:02}:{seconds:02}"


def _capital(word: str) -> str:
    return word[:1].upper() + word[1:]


def _article(word: str) -> str:
    """ "a" or "an", by spelling; "US" and "UK" are spelled out with a consonant sound."""
    return (
        "an"
        if word[:1].casefold() in "aeiou" and not word.startswith(("US", "UK", "U.", "Eu", "Uy", "uni"))
        else "a"
    )
