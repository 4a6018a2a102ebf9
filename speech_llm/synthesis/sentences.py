"""Plain sentences for synthetic speech, composed so that the words say nothing about the voice.

Someone did something somewhere: 6 to 8 everyday words. No word tells gender, place of origin or pace ("she",
"quickly", "Glasgow"), none is spelled differently in Britain, and most hold sounds in which the accents differ
(car, water, boat, path, door). What was done differs between the training and the test sentences, so that no action and
object of a test sentence was ever trained on.
"""

from __future__ import annotations

import random

from speech_llm.errors import UserError

WHO = [
    "The doctor",
    "The farmer",
    "My teacher",
    "The driver",
    "The children",
    "Our friends",
    "The students",
    "My cousin",
    "Their parents",
    "The workers",
    "Your partner",
    "The visitors",
    "Everybody",
    "Someone",
    "They",
    "We",
]

WHERE_OR_WHEN = [
    "after dinner",
    "before work",
    "in the morning",
    "at the market",
    "by the river",
    "in the garden",
    "near the station",
    "on Thursday",
    "last Saturday",
    "around four o'clock",
    "at the party",
    "this afternoon",
    "last October",
    "in the kitchen",
    "after the storm",
    "over the weekend",
    "at the hotel",
    "next to the road",
]

DID = {
    "train": [
        "parked the car",
        "closed the door",
        "read the newspaper",
        "wrote a letter",
        "fed the horses",
        "cooked some rice",
        "drank hot coffee",
        "lost the house keys",
        "found a gold coin",
        "told a funny story",
        "played the guitar",
        "sold the old boat",
        "cleaned the floor",
        "carried the water",
        "dropped the glass",
        "brought some fresh bread",
        "cut the grass",
        "heard a loud noise",
        "learned a new word",
        "caught the first train",
        "bought a warm coat",
        "took a bath",
        "saw a dark cloud",
        "made a birthday cake",
        "walked the dog",
        "asked for more butter",
        "planted an apple tree",
        "fixed the broken chair",
        "started the computer",
        "paid for the tickets",
        "painted the front wall",
        "waited for the bus",
        "heard the bird sing",
        "burned the dinner",
        "opened the first bottle",
        "talked about the job",
    ],
    "test": [
        "washed the shirt",
        "ordered a small pizza",
        "lit a large fire",
        "packed the last box",
        "watched the football game",
        "picked four red flowers",
        "answered the phone",
        "rode a horse",
        "sang a sad song",
        "called for help",
        "held the rope",
        "drew a map",
        "forgot the password",
        "shared the orange",
    ],
}


def compose(split: str, count: int, seed: int) -> list[str]:
    """`count` distinct sentences of a split ("train" or "test"), the same ones for the same seed.

    Raises `UserError` when the grammar has fewer than `count`.
    """
    possible = [
        f"{who} {did} {where}."
        for who in WHO
        for did in DID[split]
        for where in WHERE_OR_WHEN
        if 6 <= len(f"{who} {did} {where}".split()) <= 8
    ]
    if count > len(possible):
        raise UserError(
            f"{count} different {split} sentences were asked for; the grammar has {len(possible)}"
        )
    return random.Random(f"sentences {split} {seed}").sample(possible, count)
