"""The base LLM as a writer of conversations: it samples turns, answers them, and never does the same work twice.

In: starts of conversations as token ids, and chats to answer. Out: `Turn`s.
Every turn goes to a journal as it comes: a stage that was killed reads it again instead of writing it again. Each turn is drawn from a seed of its own number, so that what comes
after a kill is what would have come without it.
"""

from __future__ import annotations

import contextlib
import functools
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from speech_llm.errors import UserError
from speech_llm.files import JsonlAppender

_USER, _ANSWER, _NEXT = "Question8461", "Answer8461", "Next8461"


@dataclass(frozen=True)
class Turn:
    """A turn that was written: its text, how many tokens it took, and whether it came to its end by itself."""

    text: str
    tokens: int
    ended: bool


@dataclass(frozen=True)
class Frame:
    """What a chat template puts around the turns: `opening` before the first user's text, `between` it and the answer.

    `user_head`: what opens a user's turn, without the system turn that a template may put first. `closing`: what follows an
    answer.
    """

    opening: str
    between: str
    user_head: str
    closing: str

    @classmethod
    def of(cls, tokenizer: Any, reference: str = "the LLM") -> Frame:
        """Read off from the template. Raises `UserError` where there is none, or it changes what users say."""
        if not tokenizer.chat_template:
            raise UserError(
                f"mixture: the tokenizer of {reference} has no chat template to sample from; use an instruction-tuned LLM"
            )

        def written(turns: Sequence[tuple[str, str]], prompt: bool) -> str:
            messages = [{"role": role, "content": text} for role, text in turns]
            return str(
                tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=prompt, enable_thinking=False
                )
            )

        one = written([("user", _USER)], True)
        whole = [("user", _USER), ("assistant", _ANSWER)]
        answered, two = written(whole, False), written([*whole, ("user", _NEXT)], False)
        tail = answered.partition(_ANSWER)[2]
        gap = two.partition(_ANSWER)[2].partition(_NEXT)[0]
        if _USER not in one or not gap.startswith(tail):
            raise UserError(
                f"mixture: the chat template of {reference} does not keep a conversation's text in order, so no turn can "
                "be sampled from it"
            )
        opening, _, between = one.partition(_USER)
        # A template without a system turn opens the first turn as all others.
        head = gap[len(tail) :]
        return cls(opening, between, head if head and opening.endswith(head) else opening, tail)


class Writer:
    """Writes turns with one LLM, loaded when it is first needed.

    `load()` gives the LLM and its tokenizer; `tokens` and `seconds` are of the turns written by this process.
    """

    def __init__(
        self,
        load: Callable[[], tuple[Any, Any]],
        journal: Path,
        *,
        reference: str,
        seed: int = 0,
        progress: bool = True,
    ) -> None:
        self.reference, self.seed, self.progress = reference, seed, progress
        self._load = load
        self._loaded: tuple[Any, Any] | None = None
        self._journal = JsonlAppender(journal)
        self._known = {(row["source"], row["part"], row["number"]): row for row in self._journal.rows}
        self.tokens, self.seconds = 0, 0.0

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._journal.close()

    @property
    def llm(self) -> Any:
        return self._parts()[0]

    @property
    def tokenizer(self) -> Any:
        return self._parts()[1]

    def _parts(self) -> tuple[Any, Any]:
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded

    @functools.cached_property
    def frame(self) -> Frame:
        """What the LLM's chat template puts around turns."""
        return Frame.of(self.tokenizer, self.reference)

    @functools.cached_property
    def turn_end(self) -> str:
        """The token that ends a user's turn, as text."""
        from speech_llm.generation import end_of_turn_ids

        stop = end_of_turn_ids(self.tokenizer, self.llm)
        ids = self.tokenizer(self.frame.between, add_special_tokens=False)["input_ids"]
        return str(self.tokenizer.decode([next((token for token in ids if token in stop), stop[0])]))

    def tokens_of(self, text: str) -> list[int]:
        """Token ids of a text in which special tokens are written out."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def sample(
        self,
        source: str,
        part: str,
        starts: Sequence[tuple[int, Callable[[], list[int]]]],
        *,
        max_new_tokens: int,
        batch_tokens: int,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        stop_ids: Sequence[int] | None = None,
        special: bool = False,
    ) -> list[Turn]:
        """Continue each start (number, its token ids when they are needed) by one sampled turn, in order.

        `source` and `part` name the work in the journal. `special`: keep special tokens in the text.
        """
        from speech_llm.generation import Prompt, end_of_turn_ids, generate

        new = [(number, ids) for number, ids in starts if (source, part, number) not in self._known]
        if new:
            stop = end_of_turn_ids(self.tokenizer, self.llm) if stop_ids is None else list(stop_ids)
            with self._working(f"{source}, {part}", len(new)) as bar:

                def done(place: int, ids: list[int]) -> None:
                    text = self.tokenizer.decode(ids, skip_special_tokens=not special)
                    # The token that ends a turn is no part of it, and counts as one that was written.
                    self._note(
                        source, part, new[place][0], Turn(text, len(ids) + 1, len(ids) < max_new_tokens)
                    )
                    bar.update()

                generate(
                    self.llm,
                    [Prompt(ids()) for _, ids in new],
                    stop_ids=stop,
                    max_new_tokens=max_new_tokens,
                    temperature=temperature,
                    top_p=top_p,
                    top_k=top_k,
                    seed=[seed_of(self.seed, source, part, number) for number, _ in new],
                    batch_tokens=batch_tokens,
                    on_done=done,
                )
        return [self._turn(source, part, number) for number, _ in starts]

    def answer(
        self,
        source: str,
        chats: Sequence[tuple[int, list[dict[str, Any]]]],
        *,
        max_new_tokens: int,
        batch_tokens: int,
    ) -> list[Turn]:
        """Greedy answers to chats (number, messages), in order; no two chats may be the same."""
        from speech_llm.generation import answer_chats

        part = "answer"
        new = [(number, chat) for number, chat in chats if (source, part, number) not in self._known]
        if new:
            with self._working(f"{source}, answers", len(new)) as bar:

                def done(place: int, text: str, tokens: int) -> None:
                    self._note(source, part, new[place][0], Turn(text, tokens, tokens <= max_new_tokens))
                    bar.update()

                answer_chats(
                    self.llm,
                    self.tokenizer,
                    [chat for _, chat in new],
                    max_new_tokens=max_new_tokens,
                    batch_tokens=batch_tokens,
                    on_answer=done,
                )
        return [self._turn(source, part, number) for number, _ in chats]

    def embed(self, texts: Sequence[str], batch_tokens: int) -> np.ndarray:
        """(texts, width) float32: the mean of the LLM's last hidden states over each text."""
        import torch

        rows = [self.tokens_of(text) or self.tokens_of(" ") for text in texts]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        device = self.llm.get_input_embeddings().weight.device
        out: dict[int, np.ndarray] = {}
        while order:
            batch = [order.pop()]  # the longest that is left, so that the rest of its batch is no longer
            while order and (len(batch) + 1) * len(rows[batch[0]]) <= batch_tokens:
                batch.append(order.pop())
            ids = torch.zeros(len(batch), len(rows[batch[0]]), dtype=torch.long)
            mask = torch.zeros_like(ids)
            for place, number in enumerate(batch):
                ids[place, : len(rows[number])] = torch.tensor(rows[number])
                mask[place, : len(rows[number])] = 1
            ids, mask = ids.to(device), mask.to(device)
            with torch.inference_mode():
                states = self.llm.base_model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
            means = (states * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
            out.update(zip(batch, means.cpu().numpy(), strict=True))
        return np.stack([out[number] for number in range(len(rows))])

    @contextlib.contextmanager
    def _working(self, what: str, count: int) -> Iterator[tqdm[Any]]:
        """A progress bar whose time counts as the writer's."""
        started = time.perf_counter()
        try:
            with tqdm(total=count, desc=what, unit="turn", disable=not self.progress) as bar:
                yield bar
        finally:
            self.seconds += time.perf_counter() - started

    def _note(self, source: str, part: str, number: int, turn: Turn) -> None:
        row = {
            "source": source, "part": part, "number": number,
            "text": turn.text, "tokens": turn.tokens, "ended": turn.ended,
        }  # fmt: skip
        self._journal.append(row)
        self._known[source, part, number] = row
        self.tokens += turn.tokens

    def _turn(self, source: str, part: str, number: int) -> Turn:
        row = self._known[source, part, number]
        return Turn(row["text"], row["tokens"], row["ended"])


def seed_of(seed: int, *names: Any) -> int:
    """A seed for one turn, from the run's and the turn's name."""
    return zlib.crc32("/".join(map(str, (seed, *names))).encode())
