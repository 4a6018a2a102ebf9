"""A multi-task set over the quickstart's corpus: instructions and short labels as people write them, true by construction.

    manifest row (words, voice, level, noise) x task -> instruction ("... The answer could be A, B, or C.") and label

In: rows of the quickstart's manifests. Out: for each clip its questions with their answers.
Names and form of the instructions are those of Dynamic-SUPERB (2309.09510): `Task_Dataset`, several wordings for each task, the
possible answers at the end. This is what naive multi-task fine-tuning learns from, and forgets by. Labels come from how a clip
was made, never from listening: where a clip is between two labels (a level that is neither quiet nor loud) it is not asked.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from speech_llm.synthesis.espeak import ACCENTS
from speech_llm.synthesis.sentences import DID, WHERE_OR_WHEN, WHO

DATASET = "Quickstart"
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Question:
    """What one clip is asked by one task: the possible answers in the order told, the right one, the instruction's fields."""

    options: tuple[str, ...]
    label: str
    fields: Mapping[str, str]


@dataclass(frozen=True)
class AudioTask:
    """One task. `ask(row, rng)` gives a clip's question, None where it has no sure label; `wordings` may hold fields."""

    name: str
    dimension: str
    wordings: tuple[str, ...]
    ask: Callable[[Row, random.Random], Question | None]

    def instruction(self, question: Question, wording: int) -> str:
        """The instruction in one wording, with its options at the end."""
        return f"{self.wordings[wording].format(**question.fields)} The answer could be {listed(question.options)}."


def listed(options: Sequence[str]) -> str:
    """`yes or no`; `slow, normal, or fast`."""
    return f"{', '.join(options[:-1])}{',' if len(options) > 2 else ''} or {options[-1]}"


# ---------------------------------------------------------------- labels of how a clip was made


def _column(name: str, options: Sequence[str]) -> Callable[[Row, random.Random], Question | None]:
    """The value of a manifest column, where it is one of the options."""

    def ask(row: Row, _rng: random.Random) -> Question | None:
        value = row.get(name)
        return Question(tuple(options), str(value), {}) if value in options else None

    return ask


def _level(
    name: str, low: float, high: float, options: tuple[str, str]
) -> Callable[[Row, random.Random], Question | None]:
    """`options[0]` up to `low`, `options[1]` from `high`; a clip between the two is not asked."""

    def ask(row: Row, _rng: random.Random) -> Question | None:
        value = row.get(name)
        if value is None or low < value < high:
            return None
        return Question(options, options[int(value >= high)], {})

    return ask


def _yes(
    test: Callable[[Row], bool | None], ask_no: float = 1.0
) -> Callable[[Row, random.Random], Question | None]:
    """Yes or no by a test of the row; not asked where it gives None. `ask_no`: share of the clips of answer no that are
    asked, so that both answers are about equally frequent."""

    def ask(row: Row, rng: random.Random) -> Question | None:
        found = test(row)
        if found is None or (not found and rng.random() >= ask_no):
            return None
        return Question(("yes", "no"), "yes" if found else "no", {})

    return ask


def _noise_is(kind: str) -> Callable[[Row, random.Random], Question | None]:
    return _yes(lambda row: row["noise"] == kind if "noise" in row else None, ask_no=0.25)


# ---------------------------------------------------------------- labels of what was said

_ACTIONS = [action for actions in DID.values() for action in actions]
_TIMES = {
    "after dinner", "before work", "in the morning", "on Thursday", "last Saturday", "around four o'clock",
    "this afternoon", "last October", "after the storm", "over the weekend",
}  # fmt: skip
_PLACES = set(WHERE_OR_WHEN) - _TIMES - {"at the party"}  # a party is a place and a time
_SEVERAL = {
    "The children",
    "Our friends",
    "The students",
    "Their parents",
    "The workers",
    "The visitors",
    "They",
    "We",
}
_ONE = {"The doctor", "The farmer", "My teacher", "The driver", "My cousin", "Your partner", "Someone"}
# What nobody would sort otherwise.
_TOPICS = {
    "food or drink": (
        "cooked some rice", "drank hot coffee", "brought some fresh bread", "made a birthday cake", "asked for more butter",
        "burned the dinner", "ordered a small pizza", "shared the orange",
    ),
    "animals": ("fed the horses", "walked the dog", "rode a horse"),
    "travel": ("parked the car", "caught the first train", "waited for the bus"),
    "reading or writing": ("read the newspaper", "wrote a letter"),
    "music": ("played the guitar", "sang a sad song"),
}  # fmt: skip
_TOPIC_OF = {action: topic for topic, actions in _TOPICS.items() for action in actions}


def parts_of(text: str) -> tuple[str, str, str] | None:
    """(who, what was done, where or when) of a sentence that `sentences` composed."""
    plain = text.rstrip(".")
    who = max((who for who in WHO if plain.startswith(f"{who} ")), key=len, default=None)
    where = max((where for where in WHERE_OR_WHEN if plain.endswith(f" {where}")), key=len, default=None)
    if who is None or where is None:
        return None
    return who, plain[len(who) + 1 : -len(where) - 1], where


def _among(
    place: int, pool: Sequence[str], count: int = 4, lower: bool = True
) -> Callable[[Row, random.Random], Question | None]:
    """One part of the sentence among `count` of the pool, drawn for each clip."""

    def ask(row: Row, rng: random.Random) -> Question | None:
        parts = parts_of(row["text"])
        if parts is None or parts[place] not in pool:
            return None
        options = [parts[place], *rng.sample([other for other in pool if other != parts[place]], count - 1)]
        rng.shuffle(options)
        shown = [option.lower() if lower else option for option in options]
        return Question(tuple(shown), shown[options.index(parts[place])], {})

    return ask


def _spoken_term(row: Row, rng: random.Random) -> Question | None:
    """Half of the clips are asked for a word of theirs, half for one of another sentence."""
    own = {word for word in _words(row["text"]) if len(word) > 3}
    others = {word for action in _ACTIONS for word in action.split() if len(word) > 3} - set(
        _words(row["text"])
    )
    said = rng.random() < 0.5
    term = rng.choice(sorted(own if said else others))
    return Question(("yes", "no"), "yes" if said else "no", {"term": term})


def _text_matching(row: Row, rng: random.Random) -> Question | None:
    """Half of the clips are shown their own words, half the same with another action."""
    parts = parts_of(row["text"])
    if parts is None:
        return None
    same = rng.random() < 0.5
    action = parts[1] if same else rng.choice([action for action in _ACTIONS if action != parts[1]])
    return Question(("yes", "no"), "yes" if same else "no", {"text": f"{parts[0]} {action} {parts[2]}."})


def _end_word(place: int) -> Callable[[Row, random.Random], Question | None]:
    """The first or last word among four that such sentences begin or end with."""
    pool = sorted({_words(text)[place] for text in (WHO if place == 0 else WHERE_OR_WHEN)})

    def ask(row: Row, rng: random.Random) -> Question | None:
        word = _words(row["text"])[place]
        options = [word, *rng.sample([other for other in pool if other != word], 3)]
        rng.shuffle(options)
        return Question(tuple(options), word, {}) if word in pool else None

    return ask


def _words(text: str) -> list[str]:
    return text.lower().replace(".", "").replace(",", "").split()


def _word_count(row: Row, rng: random.Random) -> Question | None:
    """Six, seven or eight words; longer sentences, of which there are many more, are asked less often."""
    count = len(row["text"].split())
    if rng.random() >= {6: 1.0, 7: 0.2, 8: 0.1}.get(count, 0.0):
        return None
    return Question(("6", "7", "8"), str(count), {})


def _when_or_where(row: Row, _rng: random.Random) -> Question | None:
    parts = parts_of(row["text"])
    if parts is None or parts[2] not in _TIMES | _PLACES:
        return None
    return Question(("time", "place"), "time" if parts[2] in _TIMES else "place", {})


def _how_many(row: Row, _rng: random.Random) -> Question | None:
    parts = parts_of(row["text"])
    if parts is None or parts[0] not in _SEVERAL | _ONE:
        return None
    return Question(("one", "several"), "several" if parts[0] in _SEVERAL else "one", {})


def _topic(row: Row, _rng: random.Random) -> Question | None:
    parts = parts_of(row["text"])
    topic = _TOPIC_OF.get(parts[1]) if parts is not None else None
    return Question(tuple(_TOPICS), topic, {}) if topic is not None else None


def _number(row: Row) -> bool | None:
    words = _words(row["text"])
    # "The first train" is a number to some people and none to others.
    return None if "first" in words else "four" in words


def _day(row: Row) -> bool | None:
    # A weekend is made of days, without naming one.
    return None if "weekend" in row["text"] else any(day in row["text"] for day in ("Thursday", "Saturday"))


TASKS: tuple[AudioTask, ...] = tuple(
    AudioTask(f"{name}_{DATASET}{subset}", dimension, wordings, ask)
    for name, subset, dimension, ask, wordings in (
        ("GenderRecognition", "", "speaker", _column("gender", ("female", "male")), (
            "Tell the gender of the speaker.",
            "Listen to the recording and decide whether a woman or a man is speaking.",
            "What is the gender of the voice in this audio?",
            "Identify the speaker's gender from the sound of the voice.",
        )),
        ("AccentClassification", "", "paralinguistics", _column("accent", tuple(ACCENTS)), (
            "Classify the accent of the speaker.",
            "Which accent of English does the speaker have?",
            "Listen to how the words are pronounced and name the accent.",
            "Determine the English accent that you hear in the recording.",
        )),
        ("SpeakingRateClassification", "", "paralinguistics", _column("speed", ("slow", "normal", "fast")), (
            "How fast does the person speak?",
            "Judge the pace of the speech in this recording.",
            "Classify the speaking rate of the utterance.",
        )),
        ("IntonationClassification", "", "paralinguistics", _level("pitch_range", 45, 65, ("flat", "lively")), (
            "Is the melody of the speech flat or lively?",
            "Describe the intonation of the speaker.",
            "How much does the pitch of the voice move up and down?",
        )),
        ("LoudnessClassification", "", "degradation", _level("level_dbfs", -25.0, -19.0, ("quiet", "loud")), (
            "How loud is the recording?",
            "Tell whether the audio was recorded at a low or a high level.",
            "Classify the volume of this audio clip.",
        )),
        ("NoiseDetection", "", "degradation", _yes(lambda row: row["noise"] != "none" if "noise" in row else None), (
            "Is there background noise in the recording?",
            "Decide whether the speech is disturbed by noise.",
            "Can you hear any noise behind the voice?",
        )),
        ("NoiseDetection", "-White", "degradation", _noise_is("white"), (
            "Has white noise been added to the speech?",
            "Is there a steady hiss of white noise behind the voice?",
            "Check the audio for white noise.",
        )),
        ("NoiseDetection", "-Pink", "degradation", _noise_is("pink"), (
            "Has pink noise been added to the speech?",
            "Is there the soft rush of pink noise behind the voice?",
            "Check the audio for pink noise.",
        )),
        ("NoiseDetection", "-Hum", "degradation", _noise_is("hum"), (
            "Is there a mains hum in the recording?",
            "Can you hear the low hum of a power line behind the voice?",
            "Check the audio for an electric hum.",
        )),
        ("NoiseClassification", "", "degradation", _column("noise", ("white", "pink", "hum")), (
            "What kind of noise is in the background?",
            "Classify the background noise of this recording.",
            "Name the type of noise that lies under the speech.",
        )),
        ("NoiseSNRLevelPrediction", "", "degradation", _level("snr_db", 21.0, 29.0, ("low", "high")), (
            "Is the signal-to-noise ratio of the recording low or high?",
            "Compare the level of the speech with the level of the noise and give the ratio.",
            "Predict the signal-to-noise ratio of this audio.",
        )),
        ("SpokenTermDetection", "", "content", _spoken_term, (
            'Is the word "{term}" spoken in the recording?',
            'Does the speaker say "{term}"?',
            'Find out whether "{term}" occurs in the audio.',
        )),
        ("SpeechTextMatching", "", "content", _text_matching, (
            'Do the speech and this text say the same? Text: "{text}"',
            'Does the recording match the sentence "{text}"?',
            'Check whether the speaker says exactly this: "{text}"',
        )),
        ("WordCounting", "", "content", _word_count, (
            "How many words does the speaker say?",
            "Count the words of the spoken sentence.",
            "Give the number of words in the utterance.",
        )),
        ("FirstWordRecognition", "", "content", _end_word(0), (
            "With which word does the speaker begin?",
            "What is the first word of the sentence?",
            "Recognise the first word that is spoken.",
        )),
        ("LastWordRecognition", "", "content", _end_word(-1), (
            "With which word does the speaker end?",
            "What is the last word of the sentence?",
            "Recognise the last word that is spoken.",
        )),
        ("DayNameDetection", "", "content", _yes(_day, ask_no=0.12), (
            "Does the speaker name a day of the week?",
            "Is a weekday such as Monday mentioned in the recording?",
            "Check whether the name of a day is spoken.",
        )),
        ("NumberDetection", "", "content", _yes(_number, ask_no=0.1), (
            "Does the speaker mention a number?",
            "Is a number spoken in the recording?",
            "Check the sentence for numbers.",
        )),
        ("IntentClassification", "-Actor", "semantics", _among(0, WHO), (
            "Who is the sentence about?",
            "Identify the one who acts in the spoken sentence.",
            "Who did something, according to the speaker?",
        )),
        ("IntentClassification", "-Action", "semantics", _among(1, _ACTIONS), (
            "What was done, according to the speaker?",
            "Identify the action in the spoken sentence.",
            "Which action does the speaker tell of?",
        )),
        ("IntentClassification", "-Location", "semantics", _among(2, sorted(_PLACES)), (
            "Where did it happen?",
            "Identify the place in the spoken sentence.",
            "Which location does the speaker mention?",
        )),
        ("IntentClassification", "-Time", "semantics", _among(2, sorted(_TIMES), lower=False), (
            "When did it happen?",
            "Identify the time in the spoken sentence.",
            "Which time does the speaker mention?",
        )),
        ("AdverbialClassification", "", "semantics", _when_or_where, (
            "Does the end of the sentence tell a time or a place?",
            "What does the speaker say at the end: when, or where?",
            "Classify what the last words of the sentence tell.",
        )),
        ("ActorCounting", "", "semantics", _how_many, (
            "Does one person act in the sentence, or several?",
            "How many people does the sentence say did it?",
            "Tell whether the sentence is about one person or about more.",
        )),
        ("TopicClassification", "", "semantics", _topic, (
            "What is the sentence about?",
            "Classify the topic of the spoken sentence.",
            "Choose the topic that fits what the speaker says.",
        )),
    )
)  # fmt: skip


# ---------------------------------------------------------------- who is asked what


def ask_clips(
    rows: Iterable[Row], per_clip: int, seed: int, tasks: Sequence[AudioTask] = TASKS
) -> Iterator[tuple[Row, AudioTask, Question, int]]:
    """(clip, task, question, wording) for each clip, `per_clip` tasks each; a pure function of its arguments.

    Tasks are dealt in turn among those that a clip can be asked, so that each task is asked about equally often.
    """
    used: Counter[str] = Counter()
    for row in rows:
        rng = random.Random(f"{seed}-tasks-{row['id']}")
        able = [(task, question) for task in tasks if (question := task.ask(row, rng)) is not None]
        rng.shuffle(able)
        able.sort(key=lambda pair: used[pair[0].name])
        for task, question in able[:per_clip]:
            wording = used[task.name] % len(task.wordings)
            used[task.name] += 1
            yield row, task, question, wording
