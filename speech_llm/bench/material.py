"""Clips of two to four seconds spoken by eSpeak NG, several questions about each, and what a text LLM reads in their place."""

from __future__ import annotations

from pathlib import Path

from speech_llm.examples import Example, user_turn

_WHO = ("female", "male")
_VARIANTS = {"female": ("f1", "f2", "f3", "f4"), "male": ("m1", "m2", "m3", "m7")}
_SENTENCES = (
    "The old man carried a basket of apples to the market this morning.",
    "She closed the window because the wind was cold.",
    "We walked along the river until it was dark.",
    "My brother has forgotten the key of the garden gate again.",
    "There are three letters for you on the kitchen table.",
    "The train to the coast leaves in ten minutes from platform two.",
)
_ASKED = (
    ("Who is speaking?", "A {who} speaker is speaking."),
    ("Is the speaker female or male?", "The speaker is {who}."),
    ('Tell me the gender of the speaker. Answer in JSON with the key "gender".', '{{"gender": "{who}"}}'),
    ("Describe the voice in one sentence.", "It is the voice of a {who} speaker who reads a sentence."),
    ("What can you hear?", "I can hear a {who} speaker."),
)
SAMPLE_RATE_HZ = 16_000


def speak(folder: Path, clips: int, questions: int) -> list[Example]:
    """`clips` sounds in `folder` and `questions` Examples about each; the same for the same numbers."""
    import soundfile
    import soxr  # type: ignore[import-untyped]

    from speech_llm.synthesis import espeak

    folder.mkdir(parents=True, exist_ok=True)
    examples = []
    for number in range(clips):
        who = _WHO[number % 2]
        path = folder / f"{number:04d}.flac"
        if not path.exists():
            accents = tuple(espeak.ACCENTS.values())
            voice = f"{accents[number // 2 % len(accents)]}+{_VARIANTS[who][number // 8 % 4]}"
            samples = espeak.synthesize(_SENTENCES[number % len(_SENTENCES)], voice, 150 + 10 * (number % 5))
            sound = soxr.resample(samples, espeak.SAMPLE_RATE_HZ, SAMPLE_RATE_HZ)
            soundfile.write(path, 0.7 * sound[: 4 * SAMPLE_RATE_HZ], SAMPLE_RATE_HZ)
        for place in range(questions):
            question, answer = _ASKED[place % len(_ASKED)]
            examples.append(
                Example(
                    id=f"{number}/{place}",
                    messages=[
                        user_turn(question, {"path": str(path)}),
                        {"role": "assistant", "content": answer.format(who=who)},
                    ],
                    context=f"A {who} speaker reads a sentence.",
                )
            )
    return examples
