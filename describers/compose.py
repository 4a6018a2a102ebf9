"""Attributes in, one description out: a plain English sentence, DeSTA's bracketed form, or key-value lines.

Which attributes are told, in which order and with which wording is the caller's choice; `drop` leaves some out by
chance, so that a model trained on descriptions does not come to rely on any single attribute.

Several segments, of one speaker or of several: an attribute `segments`, a list of `{"start_s", "end_s", "text"}` in which
anything else (`speaker`, `gender`, `emotion`) is an attribute of that segment alone.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from describers.vocabulary import canonical, display, display_name
from describers.wording import GRAMMAR, WORDING
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

_OF_SPEAKER = ("gender", "age_group", "accent", "language", "speed", "emotion", "pitch", "volume")
_OF_RECORDING = ("noise", "reverberation", "pauses")
# What a segment says of itself, which is no attribute.
_OF_SEGMENT = ("start_s", "end_s", "text")
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
    seed: int | str | random.Random = 0,
    keep: Collection[str] = (),
    wording: Mapping[str, str] | None = None,
) -> str:
    """The description of a clip.

    `attributes`: name -> value (duration in seconds; `segments` as at the top of this file). `form`: "sentence", "desta" or
    "key_value". `use`: the attributes to tell, in this order (default: all, but no number whose word is told: not the
    hertz of a high voice). `drop`: probability of leaving each one out; one is always told. `shuffle`: tell them in a
    random order. `seed`: makes both choices. `keep`: attributes that are told if known, whatever `use` and `drop` say.
    `wording`: replaces entries of `WORDING`, see `wording.check_wording`. The sentence form tells what is said right after who
    says it, whatever the order. Raises `UserError` for an unknown form.
    """
    if form not in FORMS:
        raise UserError(
            f"unknown description form {form!r}; choose one of {', '.join(FORMS)}.{nearest(form, [*FORMS])}"
        )
    words = {**WORDING, **(wording or {})}
    known = {
        name: value
        for name, value in attributes.items()
        if value not in (None, "", []) and name != "segments"
    }
    segments = list(attributes.get("segments") or ())
    names = _choose([*known, *_only_in(segments, known)], use, drop, shuffle, seed, keep)
    told = {name: known[name] for name in names if name in known}
    parts = [_part(segment, names) for segment in segments]
    if not any(part["text"] or _own(part) for part in parts):
        parts = []  # times alone are never told
    if not told and not parts:
        return words["nothing"]
    if form == "desta":
        return _desta(told, parts, attributes.get("duration"))
    if form == "key_value":
        lines = [f"{display_name(name)}: {_written(name, value)}" for name, value in told.items()]
        return "\n".join([*(_segment_line(part) for part in parts if _own(part)), *lines])
    return _sentences(told, parts, words, ordered=use is not None or shuffle)


def _choose(
    known: Sequence[str],
    use: Sequence[str] | None,
    drop: float,
    shuffle: bool,
    seed: int | str | random.Random,
    keep: Collection[str],
) -> list[str]:
    """Which of the known attributes are told, in which order."""
    every = [*DEFAULT_ORDER, *(name for name in known if name not in DEFAULT_ORDER)]
    if use is None:
        use = [name for name in every if WORD_FOR.get(name) not in known or name in keep]
    wanted = dict.fromkeys([*use, *(name for name in every if name in keep)])
    names = [name for name in wanted if name in known]
    if drop or shuffle:
        rng = seed if isinstance(seed, random.Random) else random.Random(seed)
        if shuffle:
            rng.shuffle(names)
        # A draw for each attribute, kept or not, so that a prompt that asks for one changes nothing for the others.
        lucky = [rng.random() >= drop for _ in names]
        chosen = [name for name, luck in zip(names, lucky, strict=True) if luck or name in keep]
        names = chosen or names[-1:]
    return names


def _only_in(segments: Sequence[Mapping[str, Any]], known: Mapping[str, Any]) -> list[str]:
    """Attributes that only the segments have, `transcript` among them when nothing else has the words."""
    names = [name for segment in segments for name in _own(segment)]
    if any(segment.get("text") for segment in segments):
        names.append("transcript")
    return [name for name in dict.fromkeys(names) if name not in known]


def _part(segment: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """What is told of a segment."""
    own = {name: value for name, value in _own(segment).items() if name in names}
    text = segment.get("text") if "transcript" in names else ""
    return {"start_s": segment["start_s"], "end_s": segment["end_s"], "text": text or "", **own}


def _own(part: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes that a segment has for itself."""
    return {
        name: value for name, value in part.items() if name not in _OF_SEGMENT and value not in (None, "")
    }


def _sentences(
    told: Mapping[str, Any],
    segments: Sequence[Mapping[str, Any]],
    words: Mapping[str, str],
    ordered: bool,
) -> str:
    """Who speaks and what they say, then the rest; `ordered`: each where the first of its attributes stands in `told`."""
    parts: list[tuple[int, str]] = []
    place = {name: index for index, name in enumerate(told)}
    speech = [name for name in told if name in (*_OF_SPEAKER, "transcript", "keyword")]
    if any(_own(part) for part in segments):
        for part in segments:
            of_part = {name: value for name, value in told.items() if name in _OF_SPEAKER} | _own(part)
            of_part.pop("speaker", None)
            parts.append((0, _speech({**of_part, "transcript": part["text"]}, words)))
        if "keyword" in told:
            keyword = words["keyword"].format(pronoun=words["pronoun"], value=_quoted(told["keyword"]))
            parts.append((place["keyword"], _ended(keyword)))
    elif speech:
        parts.append((place[speech[0]], _speech(told, words)))
    if "event" in told:
        known = canonical("event", told["event"])
        sound = words.get(f"event.{known}", known)
        first = all(index > place["event"] for index, _ in parts) if ordered else not parts
        template = words["event_only" if first else "event"]
        parts.append((place["event"], template.format(value=sound)))
    for name, value in told.items():
        if name not in (*_OF_SPEAKER, "transcript", "keyword", "event", "duration"):
            known = canonical(name, value)
            template = words["other"] if name in GRAMMAR else words.get(name, words["other"])
            template = words.get(f"{name}.{known}", template)
            parts.append((place[name], template.format(name=display_name(name), value=_written(name, value))))
    if "duration" in told:
        parts.append((place["duration"], words["duration"].format(value=_length(told["duration"]))))
    if ordered:
        parts.sort(key=lambda part: part[0])
    return " ".join(sentence for _, sentence in parts if sentence)


def _speech(told: Mapping[str, Any], words: Mapping[str, str]) -> str:
    """The sentences about one speaker: who and how, then what is said."""
    text, keyword = _quoted(told.get("transcript", "")), _quoted(told.get("keyword", ""))
    of_speaker = any(name in told for name in _OF_SPEAKER)
    said = [_speaker(told, words)] if of_speaker else []
    pronoun = _worded(words, "pronoun", canonical("gender", told.get("gender", "")))
    if text:
        template = words["saying" if of_speaker else "transcript_only"]
        said.append(_ended(template.format(pronoun=pronoun, value=text)))
    if keyword and text.strip(" .!?").casefold() != keyword.casefold():
        template = words["keyword" if text else "saying" if of_speaker else "keyword_only"]
        said.append(_ended(template.format(pronoun=pronoun, value=keyword)))
    return " ".join(said)


def _speaker(told: Mapping[str, Any], words: Mapping[str, str]) -> str:
    """The sentence about the speaker: who, then how. Without a manner of speaking the speaker "is heard"."""
    age = canonical("age_group", told["age_group"]) if "age_group" in told else ""
    noun = _worded(words, "noun", age)
    adjectives = [display("gender", told["gender"])] if "gender" in told else []
    if age and noun == words["noun"]:
        adjectives.insert(0, display("age_group", age))
    subject = " ".join([*adjectives, noun])
    subject = _capital(f"{_article(subject)} {subject}")
    if "accent" in told:
        subject += " " + _phrase(words, "accent", told["accent"])
    manner = [_phrase(words, "language", told["language"])] if "language" in told else []
    voice = _voice(told, words)
    for name, value in told.items():  # in the caller's order
        if name in ("pitch", "volume") and voice:
            manner += [voice] if voice not in manner else []
        elif name in ("speed", "emotion") or (name in ("pitch", "volume") and isinstance(value, str)):
            manner.append(_phrase(words, name, value))
    if not manner:
        return words["heard"].format(subject=subject)
    return words["speaks"].format(subject=subject, manner=" ".join(manner))


def _voice(told: Mapping[str, Any], words: Mapping[str, str]) -> str:
    """Pitch and volume as one phrase, "with a loud, low-pitched voice"; empty where they are not both words to be joined."""
    pitch, volume = told.get("pitch"), told.get("volume")
    if not isinstance(pitch, str) or not isinstance(volume, str):
        return ""
    if any(f"{name}.{canonical(name, told[name])}" in words for name in ("pitch", "volume")):
        return ""
    shown = display("volume", volume)
    return words["voice"].format(article=_article(shown), volume=shown, pitch=display("pitch", pitch))


def _worded(words: Mapping[str, str], name: str, value: str) -> str:
    return words.get(f"{name}.{value}", words[name])


def _phrase(words: Mapping[str, str], name: str, value: Any) -> str:
    shown = display(name, value)
    return _worded(words, name, canonical(name, value)).format(article=_article(shown), value=shown)


def _ended(sentence: str) -> str:
    """A sentence that ends with a quotation gets its full stop, unless the quotation has its own."""
    return sentence if sentence.rstrip('"').endswith((".", "!", "?")) else sentence + "."


def _desta(told: Mapping[str, Any], segments: Sequence[Mapping[str, Any]], duration_s: Any) -> str:
    """`[00:00-00:04] "text" (Gender: Female, Emotion: Happy, Duration: 4s)`, a line a segment (DeSTA2.5, arXiv 2507.02768).

    What a segment says of itself stands in its own line; what holds for the whole clip ends the last one.
    """
    several = [name for part in segments for name in _own(part)]
    whole = {name: value for name, value in told.items() if name != "transcript" and name not in several}
    if not segments:
        return _desta_line({"start_s": 0, "end_s": duration_s, "text": told.get("transcript", "")}, whole)
    lines = [_desta_line(part, _own(part)) for part in segments[:-1]]
    return "\n".join([*lines, _desta_line(segments[-1], {**_own(segments[-1]), **whole})])


def _desta_line(part: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    pieces = [f"[{_clock(part['start_s'])}-{_clock(part['end_s'])}]"] if part["end_s"] is not None else []
    if part["text"]:
        pieces.append(f'"{_quoted(part["text"])}"')
    if facts:
        shown = [
            f"{display_name(name).capitalize()}: {_capital(_written(name, value))}"
            for name, value in facts.items()
        ]
        pieces.append(f"({', '.join(shown)})")
    return " ".join(pieces)


def _segment_line(part: Mapping[str, Any]) -> str:
    """A segment as one line of the key-value form."""
    facts = [f"{display_name(name)}: {_written(name, value)}" for name, value in _own(part).items()]
    words = [f'"{_quoted(part["text"])}"'] if part["text"] else []
    return f"{_clock(part['start_s'])} to {_clock(part['end_s'])}: {', '.join([*words, *facts])}"


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
