"""An offline set in Speech-IFEval's form for the test clips of a run: closed questions with a constraint, the same without, creative tasks.

In: a run folder with described test clips. Out: three tasks (`ifeval-closed`, `ifeval-woprompt`, `ifeval-creative`), the same for the same
run. Chain of thought needs a judge and has no rule, so there is none of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.speech_ifeval import IFEVAL, SPEECH_IFEVAL, conversation
from eval.tasks import Instance, Task
from speech_llm.errors import UserError
from speech_llm.files import read_jsonl

LIMIT = 48
QUESTIONS = {
    "gender": "Is the speaker female or male?",
    "accent": "Which accent does the speaker have: {options}?",
    "speed": "How fast does the speaker talk: {options}?",
    "emotion": "Which emotion does the speaker show: {options}?",
    "words": "What does the speaker say?",
}
# Constraint -> its arguments and the ways of asking for it.
CLOSED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "detectable_format:json_format": (
        {},
        ("Give your whole answer as JSON.", "Answer in valid JSON and nothing else."),
    ),
    "change_case:english_capital": (
        {},
        ("Write your whole answer in capital letters.", "Use only upper case."),
    ),
    "change_case:english_lowercase": (
        {},
        ("Write your whole answer in lower case.", "Use no capital letters."),
    ),
    "startend:quotation": ({}, ("Put your whole answer in double quotation marks.",)),
    "detectable_format:title": ({}, ("Begin with a title in double angle brackets, such as <<Title>>.",)),
    "combination:repeat_prompt": (
        {"prompt_to_repeat": "{question}"},
        ('First repeat this question word for word, then answer it: "{question}"',),
    ),
    "startend:end_checker": (
        {"end_phrase": "That is all I can tell."},
        ('End your answer with exactly these words: "That is all I can tell."',),
    ),
}
CREATIVE: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "Describe the recording in exactly 2 bullet points that begin with *."),
    ("detectable_format:number_bullet_lists", {"num_bullets": 3}, "Write down exactly 3 things about the speaker as bullet points that begin with *."),
    ("length_constraints:number_sentences", {"num_sentences": 3, "relation": "less than"}, "Tell a story about this speaker in less than 3 sentences."),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "at least"}, "Describe the speaker in at least 2 sentences."),
    ("keywords:existence", {"keywords": ["river"]}, 'Write a sentence about this speaker with the word "river" in it.'),
    ("keywords:forbidden_words", {"forbidden_words": ["speaker", "voice"]}, 'Describe who is speaking without the words "speaker" and "voice".'),
    ("length_constraints:number_words", {"num_words": 15, "relation": "less than"}, "Say something about the recording in less than 15 words."),
    ("length_constraints:number_words", {"num_words": 20, "relation": "at least"}, "Write at least 20 words about the person in the recording."),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "Write 2 paragraphs about the recording, divided by ***."),
)  # fmt: skip


def run_tasks(run_dir: Path, limit: int = LIMIT) -> list[Task]:
    """`build` for a run folder. Raises `UserError` when there are no described test clips."""
    described = run_dir / "describe" / "test.jsonl"
    if not described.exists():
        raise UserError(f"{described}: no such file; give the folder of a run whose test clips are described")
    words = {}
    manifest = run_dir / "corpus" / "test.jsonl"
    if manifest.exists():
        words = {str(row.get("id")): str(row["text"]) for _, row in read_jsonl(manifest) if row.get("text")}
    clips = []
    for _, row in read_jsonl(described):
        sound = Path(row["audio"])
        path = sound if sound.is_absolute() else (described.parent / sound).resolve()
        clips.append({**row, "audio": str(path), "words": words.get(str(row["id"]))})
    return build(clips, limit)


def build(clips: Sequence[dict[str, Any]], limit: int = LIMIT) -> list[Task]:
    """`limit` instances of each of the three tasks; clips, questions and constraints by turns."""
    values: dict[str, list[str]] = {}
    for clip in clips:
        for name in QUESTIONS:
            value = clip["attributes"].get(name)
            if isinstance(value, str) and value not in values.setdefault(name, []):
                values[name].append(value)
    closed, without, creative = [], [], []
    constraints = list(CLOSED.items())
    for number, (clip, name) in enumerate(itertools.islice(_asked(clips, values), limit)):
        options = sorted(values.get(name) or [])
        question = QUESTIONS[name].replace(
            "{options}", ", ".join(options[:-1]) + f" or {options[-1]}" if options else ""
        )
        constraint, (arguments, wordings) = constraints[number % len(constraints)]
        wording = wordings[number // len(constraints) % len(wordings)].replace("{question}", question)
        given = {key: str(value).replace("{question}", question) for key, value in arguments.items()}
        label = str(clip["words"] if name == "words" else clip["attributes"][name])
        answer = {"id": "answer", "arguments": {"metric": "wer" if name == "words" else "accuracy"}}
        common = (clip, label, options if name != "words" else None)
        closed.append(
            _instance(
                f"closed-{number:03d}",
                f"{question}\n{wording}",
                "ifeval-closed",
                *common,
                [{"id": constraint, "arguments": given}, answer],
            )
        )
        without.append(_instance(f"closed-{number:03d}", question, "ifeval-woprompt", *common, [answer]))
    for number, clip in enumerate(itertools.islice(itertools.cycle(clips), limit if clips else 0)):
        constraint, given, text = CREATIVE[number % len(CREATIVE)]
        rules = [{"id": constraint, "arguments": given}]
        creative.append(_instance(f"creative-{number:03d}", text, "ifeval-creative", clip, "", None, rules))
    made = {"ifeval-closed": closed, "ifeval-woprompt": without, "ifeval-creative": creative}
    return [Task(name, SPEECH_IFEVAL, found, IFEVAL) for name, found in made.items() if found]


def _asked(clips: Sequence[dict[str, Any]], values: dict[str, list[str]]) -> Any:
    """(clip, what is asked about it), over and over."""
    names = [name for name in QUESTIONS if name in values and len(values[name]) > 1]
    names += ["words"] if any(clip.get("words") for clip in clips) else []
    if not names:
        return
    for number in itertools.count():
        clip = clips[number % len(clips)]
        # Another question about the same clip the next time round.
        name = names[(number + number // len(clips)) % len(names)]
        if clip.get("words") if name == "words" else name in clip["attributes"]:
            yield clip, name
        elif number > 50 * len(clips):
            return


def _instance(
    name: str,
    text: str,
    task: str,
    clip: dict[str, Any],
    label: str,
    options: list[str] | None,
    constraints: list[dict[str, Any]],
) -> Instance:
    audio = {"path": clip["audio"], "transcript": clip["attributes"].get("transcript", "")}
    return Instance(
        id=name,
        messages=conversation(text, audio, str(clip.get("description") or "")),
        label=label,
        task=task,
        metric=IFEVAL,
        options=options,
        constraints=constraints,
    )
