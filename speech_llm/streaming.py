"""One answer, told while it is being written: what a page shows as it grows.

In: a prompt, how to draw, and a function that is told the text so far. Out: the whole answer. The tokens are those of `generation`, so
that a greedy answer here is the one that `respond` gives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from speech_llm.errors import UserError
from speech_llm.generation import Prompt, end_of_turn_ids, generate

# What a piece of a letter decodes to, until the rest of it has come.
_INCOMPLETE = "\ufffd"
# Told the answer so far; what it raises ends the generation.
OnText = Callable[[str], None]


@dataclass(frozen=True)
class Drawing:
    """How one answer is drawn: the likeliest words at `temperature` 0, else by nucleus sampling from `seed`."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 0.95
    seed: int = 0


@dataclass(frozen=True)
class Streamed:
    """A whole answer; `cut`: it met the bound on its length before it ended by itself."""

    text: str
    cut: bool = False


def stream_prompt(
    llm: Any,
    tokenizer: Any,
    prompt: Prompt,
    drawing: Drawing,
    on_text: OnText,
    audio_token_id: int | None = None,
) -> Streamed:
    """Answer one prompt, telling the text whenever a token has changed it.

    Raises `UserError` for a conversation that, with its answer, is longer than the LLM takes.
    """
    check_length(llm, len(prompt.ids), drawing.max_new_tokens)
    told = ""

    def grown(_: int, ids: list[int]) -> None:
        nonlocal told
        text = tokenizer.decode(ids, skip_special_tokens=True).strip()
        if text != told and not text.endswith(_INCOMPLETE):
            told = text
            on_text(text)

    ids = generate(
        llm,
        [prompt],
        stop_ids=end_of_turn_ids(tokenizer, llm),
        max_new_tokens=drawing.max_new_tokens,
        temperature=drawing.temperature,
        top_p=drawing.top_p,
        seed=[drawing.seed],
        audio_token_id=audio_token_id,
        on_token=grown,
    )[0]
    text = tokenizer.decode(ids, skip_special_tokens=True).strip()
    return Streamed(text, len(ids) == drawing.max_new_tokens)


def stream_chat(
    llm: Any, tokenizer: Any, chat: list[dict[str, Any]], drawing: Drawing, on_text: OnText
) -> Streamed:
    """Answer a chat of plain text, as a text LLM."""
    ids = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, enable_thinking=False
    )["input_ids"]
    return stream_prompt(llm, tokenizer, Prompt(ids), drawing, on_text)


def check_length(llm: Any, prompt_tokens: int, new_tokens: int) -> None:
    """Raise `UserError` where prompt and answer together are more than the LLM takes."""
    longest = getattr(llm.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and prompt_tokens + new_tokens > longest:
        raise UserError(
            f"the conversation has {prompt_tokens:,} tokens, which with an answer of up to {new_tokens:,} is more than the "
            f"{longest:,} that this LLM takes; start a new conversation, or allow a shorter answer"
        )
