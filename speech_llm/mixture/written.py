"""Rows that the base LLM writes itself before it is trained: pseudo replay, Magpie, self-synthesized rehearsal.

    starts -> sampled turns -> rules (`filters`) -> greedy answers -> rules -> Examples, until the budget is full

In: a source of the mixture, a budget and a `Writer`. Out: Examples with where they come from, and what was dropped and why.
Candidates are numbered; the rows kept are the first ones that pass, whatever was killed and resumed in between.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from speech_llm.errors import UserError
from speech_llm.examples import Example, Message
from speech_llm.mixture.filters import Seen, turn_verdict
from speech_llm.mixture.share import Budget, promised
from speech_llm.mixture.writer import Frame, Turn, Writer

if TYPE_CHECKING:
    from speech_llm.recipe_mixture import Magpie, PseudoReplay, SelfSynthesized

# Candidates written at a time, two for each row wanted; after so many times it is given up.
LEAST_CHUNK, MOST_CHUNK = 8, 1024
MOST_TRIES = 20
# So many candidates of which none passes: the LLM cannot do this.
HOPELESS = 160
# A conversation that has not come to an answer after so many turns is dropped.
MOST_TURNS = 4


@dataclass
class Written:
    """What a source wrote: `tried` candidates, why some were dropped, and how many good ones were left over."""

    tried: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    spare: int = 0


Candidate = Example | str  # or why it is dropped


def fill_written(budget: Budget, what: str, make: Callable[[range], list[Candidate]]) -> Written:
    """Put candidates into the budget until it is full; `make(numbers)` writes them, in order.

    Raises `UserError` when too few pass.
    """
    out = Written()
    per_row = 1 if budget.unit == "rows" else 32
    chunk = min(MOST_CHUNK, max(LEAST_CHUNK, 2 * budget.wanted // per_row))
    most = MOST_TRIES * max(LEAST_CHUNK, 2 * budget.wanted // per_row)
    while not budget.full:
        if out.tried >= most or (out.tried >= HOPELESS and not budget.rows):
            reasons = ", ".join(f"{reason} {count}" for reason, count in out.dropped.most_common(4))
            raise UserError(
                f"mixture, {what}: only {len(budget.rows)} rows of {out.tried} that the LLM wrote could be used, and {budget} "
                f"are promised (dropped: {reasons}); take a larger LLM, a lower ratio, or another type of rows"
            )
        for candidate in make(range(out.tried, out.tried + chunk)):
            if budget.full:
                break
            out.tried += 1
            if isinstance(candidate, str):
                out.dropped[candidate] += 1
            else:
                budget.put(candidate)
    return out


def checked(turn: Turn, role: str) -> str:
    """`"ok"` or why a written turn is dropped: it never ended, or breaks a rule of `filters`."""
    return turn_verdict(turn.text, role) if turn.ended else f"{role} turn does not end"


# ---------------------------------------------------------------- Magpie


def magpie(settings: Magpie, name: str, budget: Budget, writer: Writer, source: dict[str, Any]) -> Written:
    """2406.08464: the user's turn is sampled after what a chat template puts before it, then answered greedily."""
    seen = Seen()

    def start() -> list[int]:
        return writer.tokens_of(writer.frame.opening)

    def make(numbers: range) -> list[Candidate]:
        users = writer.sample(
            name,
            "user",
            [(number, start) for number in numbers],
            max_new_tokens=settings.max_new_tokens,
            batch_tokens=settings.batch_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
        )
        return _answered(settings, name, writer, numbers, users, seen, source)

    return fill_written(budget, name, make)


def _answered(
    settings: Magpie | SelfSynthesized,
    name: str,
    writer: Writer,
    numbers: Sequence[int],
    users: Sequence[Turn],
    seen: Seen,
    source: dict[str, Any],
) -> list[Candidate]:
    """Candidates from users' turns: those that pass are answered greedily, and the answers checked too."""
    verdicts = []
    for user in users:
        verdict = checked(user, "user")
        if verdict == "ok" and not seen.add(user.text):
            verdict = "like an earlier one"
        verdicts.append(verdict)
    chats = [
        (number, [{"role": "user", "content": user.text.strip()}])
        for number, user, verdict in zip(numbers, users, verdicts, strict=True)
        if verdict == "ok"
    ]
    answers = writer.answer(
        name, chats, max_new_tokens=settings.max_answer_tokens, batch_tokens=settings.batch_tokens
    )
    made = {number: (chat, answer) for (number, chat), answer in zip(chats, answers, strict=True)}
    out: list[Candidate] = []
    for number, verdict in zip(numbers, verdicts, strict=True):
        if number not in made:
            out.append(verdict)
            continue
        chat, answer = made[number]
        verdict = checked(answer, "assistant")
        if verdict != "ok":
            out.append(verdict if verdict.startswith("assistant") else f"answer: {verdict}")
        else:
            out.append(
                _example(name, number, [*chat, {"role": "assistant", "content": answer.text.strip()}], source)
            )
    return out


def _example(name: str, number: int, messages: list[Message], source: dict[str, Any]) -> Example:
    return Example(id=f"{name}/{number:06d}", messages=messages, source={**source, "number": number})


# ---------------------------------------------------------------- pseudo replay


def pseudo_replay(
    settings: PseudoReplay, name: str, budget: Budget, writer: Writer, source: dict[str, Any]
) -> Written:
    """LAMOL (1909.03329): whole conversations sampled token by token, kept when they hold exactly one answer.

    From what opens a chat, which most instruct LLMs need to hold one, or the beginning-of-sequence token (`settings.begin`); or
    from each of `settings.starts`, which open the user's turn. LAMOL rounds its share
    down to a multiple of the starts; here the first starts get one row more, so that the share is what was promised.
    """
    total = Written()
    starts: list[str | None] = list(settings.starts) or [None]
    for place, (start, part) in enumerate(zip(starts, budget.split(len(starts)), strict=True)):
        written = _from_start(settings, name, place, start, part, writer, {**source, "start": start})
        total.tried += written.tried
        total.dropped += written.dropped
        budget.fill(part.rows)
    return total


def _from_start(
    settings: PseudoReplay,
    name: str,
    place: int,
    start: str | None,
    budget: Budget,
    writer: Writer,
    source: dict[str, Any],
) -> Written:
    seen = Seen()
    label = name if start is None else f"{name}-{place + 1}"

    def first() -> list[int]:
        tokenizer = writer.tokenizer
        if settings.begin == "chat" or start is not None:
            return writer.tokens_of(writer.frame.opening + (start or ""))
        bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if bos is None:
            raise UserError(
                f"mixture, {name}: {writer.reference} has no beginning-of-sequence token; set begin to chat"
            )
        return [bos]

    def make(numbers: range) -> list[Candidate]:
        texts = _conversations(settings, label, numbers, first, writer)
        frame = writer.frame
        out: list[Candidate] = []
        for number, text in zip(numbers, texts, strict=True):
            parsed = parse_conversation(text, frame) if text is not None else "assistant turn does not end"
            if not isinstance(parsed, str):
                user, answer = parsed[-2]["content"], parsed[-1]["content"]
                verdict = turn_verdict(user, "user")
                if verdict == "ok" and (verdict := turn_verdict(answer, "assistant")) != "ok":
                    verdict = f"answer: {verdict}"
                if verdict == "ok" and not seen.add(user):
                    verdict = "like an earlier one"
                parsed = verdict if verdict != "ok" else parsed
            out.append(parsed if isinstance(parsed, str) else _example(label, number, parsed, source))
        return out

    return fill_written(budget, label, make)


def _conversations(
    settings: PseudoReplay, name: str, numbers: range, first: Callable[[], list[int]], writer: Writer
) -> list[str | None]:
    """Each conversation's text with its special tokens, up to the end of its first answer; None when it has no end.

    Generation stops at the end of every turn; what is no answer yet is continued after it.
    """
    texts: dict[int, str] = {}
    ended: dict[int, str | None] = {}
    waiting = list(numbers)
    for turn_number in range(MOST_TURNS):
        if not waiting:
            break

        def start_of(number: int) -> Callable[[], list[int]]:
            def ids() -> list[int]:
                return writer.tokens_of(texts[number]) if number in texts else first()

            return ids

        turns = writer.sample(
            name,
            f"turn {turn_number + 1}",
            [(number, start_of(number)) for number in waiting],
            max_new_tokens=settings.max_answer_tokens,
            batch_tokens=settings.batch_tokens,
            temperature=settings.temperature,
            top_k=settings.top_k,
            special=True,
        )
        frame, closing = writer.frame, writer.turn_end
        again = []
        for number, turn in zip(waiting, turns, strict=True):
            texts.setdefault(number, writer.tokenizer.decode(first()))
            texts[number] += turn.text
            if not turn.ended:
                ended[number] = None
            elif frame.between.strip() in texts[number]:
                ended[number] = texts[number]
            else:
                texts[number] += closing
                again.append(number)
        waiting = again
    return [ended.get(number, texts[number]) for number in numbers]


def parse_conversation(text: str, frame: Frame) -> list[Message] | str:
    """The messages of a sampled conversation, or why it is none: LAMOL's filter, exactly one part that is an answer."""
    between = frame.between.strip()
    if text.count(between) != 1:
        return "no answer part" if between not in text else "several answer parts"
    before, _, answer = text.partition(between)
    system, head, user = before.rpartition(frame.user_head.strip())
    if not head:
        return "no user turn"
    if frame.user_head.strip() in system:
        return "several user turns"
    return [{"role": "user", "content": user.strip()}, {"role": "assistant", "content": answer.strip()}]


# ---------------------------------------------------------------- self-synthesized rehearsal


def self_synthesized(
    settings: SelfSynthesized,
    name: str,
    budget: Budget,
    writer: Writer,
    demonstrations: Sequence[Example],
    source: dict[str, Any],
) -> Written:
    """2403.01244: the LLM sees two requests with their answers and writes a third, which it then answers without them.

    Demonstrations are ordered pairs, drawn without repeating one. `settings.oversample` times the promised rows are written;
    the LLM's own embeddings of the requests are clustered (k-means), and rows are taken from the clusters in turn, those
    nearest to the middle first, so that what is kept covers what was written.
    """
    pairs = list(itertools.permutations(range(len(demonstrations)), 2))
    if not pairs:
        raise UserError(
            f"mixture, {name}: two demonstrations or more are needed, and there are {len(demonstrations)}"
        )
    random.Random(f"{writer.seed}-{name}-pairs").shuffle(pairs)
    requests = [str(example.messages[0]["content"]) for example in demonstrations]
    answers = [str(example.messages[1]["content"]) for example in demonstrations]
    seen = Seen()
    for request in requests:
        seen.add(request)

    def start_of(number: int) -> Callable[[], list[int]]:
        def ids() -> list[int]:
            frame = writer.frame
            shown = [
                f"{requests[i]}{frame.between}{answers[i]}{frame.closing}" for i in pairs[number % len(pairs)]
            ]
            return writer.tokens_of(frame.opening + "".join(f"{text}{frame.user_head}" for text in shown))

        return ids

    def make(numbers: range) -> list[Candidate]:
        users = writer.sample(
            name,
            "user",
            [(number, start_of(number)) for number in numbers],
            max_new_tokens=settings.max_new_tokens,
            batch_tokens=settings.batch_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
        )
        return _answered(settings, name, writer, numbers, users, seen, source)

    pool = budget.like(promised(settings.oversample, budget.wanted))
    written = fill_written(pool, name, make)
    vectors = writer.embed([str(row.messages[0]["content"]) for row in pool.rows], settings.batch_tokens)
    budget.fill(pool.rows[i] for i in spread_out(vectors, settings.clusters, writer.seed))
    written.spare = len(pool.rows) - len(budget.rows)
    return written


def spread_out(vectors: np.ndarray, clusters: int, seed: int) -> list[int]:
    """Row numbers of `vectors` (rows, width): from each k-means cluster in turn, those nearest to its middle first."""
    from sklearn.cluster import KMeans  # type: ignore[import-untyped]

    clusters = min(clusters, len(np.unique(vectors, axis=0)))
    found = KMeans(clusters, n_init=4, random_state=seed).fit(vectors)
    distances = np.linalg.norm(vectors - found.cluster_centers_[found.labels_], axis=1)
    queues: list[list[int]] = [[] for _ in range(clusters)]
    for row in np.argsort(distances, kind="stable").tolist():
        queues[found.labels_[row]].append(row)
    turns = itertools.zip_longest(*queues)
    return [row for turn in turns for row in turn if row is not None]
