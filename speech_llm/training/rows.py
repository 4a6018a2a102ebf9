"""Examples -> rows of tokens -> packs, as each style of training needs them.

In: Examples. Out: a `TrainingSet`: packs ready to be batched, and for every row what the base LLM reads in its place. Rows that
cannot be used are left out with a reason, never cut.

    sft         each assistant turn is learned
    pretrain    the plain text is learned, all of it; of a clip, its transcript right after the sound
    preference  a pack holds a right and a wrong answer to the same prompt
    rollout     a pack holds a prompt and the answer that tells what is right
A plain-text row is plain text in every style that learns tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from speech_llm.data.features import FeatureStore
from speech_llm.data.packing import (
    TEXT_PACK_TOKENS,
    Pack,
    Row,
    constant_prefix,
    pack_group,
    pack_rows,
)
from speech_llm.errors import UserError
from speech_llm.examples import Example, Message, audio_parts
from speech_llm.model.masks import attention_window
from speech_llm.targets.questions import Question
from speech_llm.targets.verify import closed_options
from speech_llm.training.pairs import wrong_answer

NO_CONTEXT = "there is no 'context' for the base LLM to read in place of the sound"


class Unusable(Exception):
    """Why an Example cannot be trained on."""


@dataclass
class TrainingSet:
    """Packs ready to be batched, and what was left out on the way.

    `rows`: by id, every row of the packs. `teacher`: for each row what the base LLM reads and the same answer; empty when it is
    not needed. `examples`: for each row the Example it was made of.
    """

    packs: list[Pack]
    prefix: list[int]
    rejects: list[dict[str, Any]]
    rows: dict[str, Row]
    teacher: dict[str, Row] = field(default_factory=dict)
    examples: dict[str, Example] = field(default_factory=dict)


def teacher_messages(example: Example) -> list[Message] | None:
    """The chat as the base LLM reads it: `context` in place of the first sound, the worked example before it.

    None when there is a sound and no context. A worked example is `source["example"]`, as (context, answer).
    """
    turns: list[Message] = []
    told = False
    for message in example.messages:
        content = message["content"]
        if isinstance(content, str) or message["role"] != "user":
            turns.append(message)
            continue
        text = "\n".join(part["text"] for part in content if part["type"] == "text")
        if told or not any(part["type"] == "audio" for part in content):
            turns.append({**message, "content": text})
            continue
        if not example.context:
            return None
        shown = example.source.get("example")
        question = Question(example.context, text, tuple(shown) if shown else None)
        turns += [{**turn, "train": False} for turn in question.messages()]
        told = True
    return turns


def build_training_set(
    examples: list[Example],
    processor: Any,
    features: FeatureStore,
    max_tokens: int,
    use_prefix: bool,
    progress: bool,
    style: str = "sft",
    needs_context: bool = False,
    text_tokens: int = TEXT_PACK_TOKENS,
) -> TrainingSet:
    """Render every Example as its style asks and pack the rows of each clip.

    `needs_context`: the base LLM scores the rows too, so one without `context` is left out. `use_prefix`: the tokens with which
    all rows begin are run once, which needs a frozen LLM. `text_tokens`: the longest pack of rows without sound.
    """
    window = attention_window(processor.config.get_text_config())
    most = max_tokens if window is None else min(max_tokens, window)
    features.fill((part["path"] for e in examples for part in e.audio_parts()), progress=progress)
    options = closed_options([example.attributes for example in examples])
    rejects: list[dict[str, Any]] = []
    groups: list[list[Row]] = []
    heard: set[tuple[tuple[str, ...], tuple[int, ...]]] = set()
    data = TrainingSet([], [], rejects, {})
    for example in examples:
        bad = next((p["path"] for p in example.audio_parts() if p["path"] in features.rejects), None)
        if bad is not None:
            rejects.append({"id": example.id, "audio": bad, "reason": features.rejects[bad]})
            continue
        try:
            variants = [example]
            if style == "preference":
                variants.append(_rejected(example, options))
            rows = [render_row(variant, processor, features, style) for variant in variants]
            told = (
                [teacher_row(*pair, processor) for pair in zip(variants, rows, strict=True)]
                if needs_context
                else []
            )
            for row in (*rows, *told):
                if len(row.ids) > most:
                    why = "" if most == max_tokens else ", which is how far back all layers of the LLM look,"
                    raise Unusable(f"{len(row.ids)} tokens; over {most}{why} is left out, never cut")
        except Unusable as error:
            rejects.append({"id": example.id, "reason": str(error)})
            continue
        if style == "pretrain":
            key = (tuple(rows[0].clips), tuple(rows[0].ids))
            if rows[0].clips and key in heard:
                continue  # several prompts about a clip give its words once
            heard.add(key)
        for number, row in enumerate(rows):
            row.id = _unique(row.id, data.rows)
            data.rows[row.id], data.examples[row.id] = row, variants[number]
            if told:
                data.teacher[row.id] = told[number]
        groups.append(rows)
    data.prefix = constant_prefix(list(data.rows.values()), processor.audio_token_id) if use_prefix else []
    if style in ("preference", "rollout"):
        data.packs = [pack_group(group, len(data.prefix)) for group in groups]
    else:
        room = max_tokens if window is None else min(max_tokens, window - len(data.prefix))
        data.packs = pack_rows(
            list(data.rows.values()),
            len(data.prefix),
            room,
            text_tokens=min(room, text_tokens),
            audio_token_id=processor.audio_token_id,
        )
    return data


def _unique(name: str, taken: dict[str, Row]) -> str:
    """Ids of several files may collide; what is known of a row is looked up by its id."""
    number = 2
    unique = name
    while unique in taken:
        unique, number = f"{name}#{number}", number + 1
    return unique


def _rejected(example: Example, options: dict[str, list[str]]) -> Example:
    """The same Example with the wrong answer: the given one, else the right one with another value of an attribute."""
    if not example.messages or example.messages[-1]["role"] != "assistant":
        raise Unusable("there is no answer at its end to set a wrong one against")
    right = example.messages[-1]["content"]
    wrong = example.rejected
    if wrong is None:
        wrong = wrong_answer(str(right), example.attributes, options, seed=example.id)
    if wrong is None:
        raise Unusable(
            "there is no 'rejected' answer, and its answer names no attribute that could be another"
        )
    if wrong.strip() == str(right).strip():
        raise Unusable("its 'rejected' answer is the right one")
    turn = {**example.messages[-1], "content": wrong}
    return Example(
        id=f"{example.id}#rejected",
        messages=[*example.messages[:-1], turn],
        context=example.context,
        attributes=example.attributes,
        source=example.source,
    )


def render_row(example: Example, processor: Any, features: FeatureStore, style: str) -> Row:
    """The tokens of an Example and which of them are learned."""
    messages = list(example.messages)
    while messages and not (messages[-1]["role"] == "assistant" and messages[-1].get("train", True)):
        messages.pop()  # nothing is learned after the last answer
    clips = [part["path"] for part in audio_parts(messages or example.messages)]
    counts = [features.frame_count(clip) for clip in clips]
    if example.text is not None or style == "pretrain":
        if style in ("preference", "rollout"):
            raise Unusable(f"it is plain text, and style {style} learns from answers")
        return _plain_row(example, processor, clips, counts)
    if style in ("preference", "rollout"):  # only the last answer is compared
        messages = [{**turn, "train": False} for turn in messages[:-1]] + messages[-1:]
    if not messages:
        raise Unusable("no assistant turn to learn")
    try:
        rendered = processor.render(messages, frame_counts=counts)
    except UserError as error:
        if not processor.tokenizer.chat_template:
            raise
        raise Unusable(str(error)) from None  # a template that refuses turns in this order
    if not rendered.answer_spans:
        raise Unusable("no assistant turn to learn")
    return Row(example.id, list(rendered.input_ids), list(rendered.answer_spans), clips)


def _plain_row(example: Example, processor: Any, clips: list[str], counts: list[int]) -> Row:
    """Plain text and the token that ends it, all of it learned; of a clip, its transcript after the sound."""
    tokenizer = processor.tokenizer
    text = example.text
    if text is None:
        words = next((part["transcript"] for part in example.audio_parts() if part.get("transcript")), None)
        text = words or example.attributes.get("transcript")
        if not clips or len(clips) > 1 or not text:
            raise Unusable(
                "style pretrain learns plain text or the transcript of one clip, and it has neither"
            )
    start = [] if tokenizer.bos_token_id is None or not _adds_bos(tokenizer) else [tokenizer.bos_token_id]
    for count in counts:
        start += [processor.audio_token_id] * processor.num_vectors(count)
    words_ids = tokenizer(str(text).strip(), add_special_tokens=False)["input_ids"]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = [*start, *words_ids, *end]
    first = max(1, len(start))  # nothing comes before the very first token that could predict it
    if len(ids) <= first:
        raise Unusable("it has no token to learn")
    return Row(example.id, ids, [(first, len(ids))], clips)


def _adds_bos(tokenizer: Any) -> bool:
    return tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def teacher_row(example: Example, row: Row, processor: Any) -> Row:
    """What the base LLM reads in place of a row: the same answer after a text instead of the sound."""
    if example.text is not None:
        return row
    messages = teacher_messages(example)
    if messages is None:
        raise Unusable(NO_CONTEXT)
    learned = [turn.get("train", True) for turn in example.messages if turn["role"] == "assistant"]
    if len(row.spans) < sum(learned):  # a style that learns the last answer only
        messages = [{**turn, "train": False} for turn in messages[:-1]] + messages[-1:]
    rendered = processor.render(messages)
    told = Row(row.id, list(rendered.input_ids), list(rendered.answer_spans), [])
    if answer_ids(told) != answer_ids(row):
        raise Unusable("its answer becomes other tokens after the context than after the sound")
    return told


def answer_ids(row: Row) -> list[int]:
    """The tokens of a row that are learned."""
    return [token for start, end in row.spans for token in row.ids[start:end]]
