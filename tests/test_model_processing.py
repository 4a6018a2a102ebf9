"""Rendering: what the LLM reads besides the sound is, token for token, what it would read without it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tiny_models import VOCABULARY, tiny_model, tiny_tokenizer

from speech_llm.errors import UserError
from speech_llm.model import SpeechLLMProcessor

AUDIO = VOCABULARY

# As Llama 3's: turns are trimmed.
TRIMMING = (
    "{{ '<|endoftext|>' }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n\n' + m['content'] | trim + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)
# As Gemma's: no system turn, another name for the assistant, turns must alternate, trimmed.
ALTERNATING = (
    "{{ '<|endoftext|>' }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{{ '<|im_start|>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + m['content'] | trim + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}"
)
# As Qwen 3's: the last answer opens with an empty thought, and so does the prompt when thinking is off.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' and loop.last %}"
    "{{ '<think>\n\n</think>\n\n' + m['content'].lstrip('\n') }}{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% if enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
# As SmolLM2's when None. A space in front of the end of an answer, as in Llama 2's.
SPACED = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + ' <|im_end|>' }}{% endfor %}"
TEMPLATES = {
    "system": None,
    "trimming": TRIMMING,
    "alternating": ALTERNATING,
    "thinking": THINKING,
    "spaced": SPACED,
}


def processor(
    template: str | None = None, merges: tuple[tuple[str, str], ...] = (), **settings: Any
) -> SpeechLLMProcessor:
    _, made = tiny_model(**settings)
    made.tokenizer = tiny_tokenizer(**({"template": template} if template else {}), merges=merges)
    return made


def sound(transcript: str | None = None) -> dict[str, Any]:
    return {
        "type": "audio",
        "path": "a.wav",
        **({"transcript": transcript} if transcript is not None else {}),
    }


def say(*parts: dict[str, Any] | str) -> dict[str, Any]:
    return {
        "role": "user",
        "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts],
    }


def answer(text: str, **extra: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **extra}


def base_ids(made: SpeechLLMProcessor, messages: list[dict[str, Any]], **settings: Any) -> list[int]:
    """What the LLM's own tokenizer and template make of plain messages."""
    return made.tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, enable_thinking=False, **settings
    )["input_ids"]


def decoded(made: SpeechLLMProcessor, rendered: Any) -> list[str]:
    return [made.tokenizer.decode(rendered.input_ids[start:end]) for start, end in rendered.answer_spans]


CONVERSATIONS = {
    "one question": [say(sound(), "What can you hear?")],
    "one answer": [say(sound(), "What can you hear?"), answer("A woman.")],
    "sound last": [say("Listen:", sound()), answer("A dog.")],
    "two sounds": [say(sound(), "and then", sound(), "Which is louder?"), answer("The second.")],
    "two turns": [say(sound(), "Who?"), answer("A man."), say("Sure?", sound()), answer("Yes, a man.")],
    "neighbours": [say(sound(), sound(), "Same voice?"), answer("No.")],
    "text only": [{"role": "user", "content": "Hello"}, answer("Hi.")],
}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_without_placeholders_the_tokens_are_the_base_llms(name: str, template: str) -> None:
    made = processor(TEMPLATES[template])
    messages = CONVERSATIONS[name]
    plain = [
        {
            "role": m["role"],
            "content": m["content"]
            if isinstance(m["content"], str)
            else "\n".join(p["text"] for p in m["content"] if p["type"] == "text"),
        }
        for m in messages
    ]
    sounds = sum(
        isinstance(m["content"], list) and sum(p["type"] == "audio" for p in m["content"]) for m in messages
    )
    for prompt in (False, True):
        if prompt and messages[-1]["role"] == "assistant" and template == "alternating":
            continue
        rendered = made.render(messages, add_generation_prompt=prompt, frame_counts=[9] * sounds)
        assert [i for i in rendered.input_ids if i != AUDIO] == base_ids(
            made, plain, add_generation_prompt=prompt
        )
        assert rendered.input_ids.count(AUDIO) == 3 * sounds == 3 * len(rendered.audio_spans)
        for start, end in rendered.audio_spans:
            assert rendered.input_ids[start:end] == [AUDIO] * 3


def test_the_default_system_prompt_is_rendered_once_and_is_the_constant_prefix() -> None:
    made = processor()
    rendered = made.render([say(sound(), "What?")], add_generation_prompt=True, frame_counts=[9])
    text = made.tokenizer.decode([i for i in rendered.input_ids if i != AUDIO])
    assert text.count("You are a helpful assistant") == 1
    prefix = made.tokenizer.decode(rendered.input_ids[: rendered.constant_prefix])
    assert prefix == "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n<|im_start|>user\n"
    assert rendered.input_ids[rendered.constant_prefix] == AUDIO
    plain = made.render([{"role": "user", "content": "Hi"}])
    assert plain.constant_prefix == len(plain.input_ids)


@pytest.mark.parametrize("template", TEMPLATES)
def test_answer_spans_hold_the_answers_and_the_token_that_ends_them(template: str) -> None:
    made = processor(TEMPLATES[template])
    messages = [say(sound(), "Who?"), answer("A man."), say("Sure?"), answer("Yes,\na man.")]
    rendered = made.render(messages, frame_counts=[9])
    space = " " if template == "spaced" else ""
    assert decoded(made, rendered) == [f"A man.{space}<|im_end|>", f"Yes,\na man.{space}<|im_end|>"]


def test_only_turns_to_be_learned_have_spans() -> None:
    made = processor()
    messages = [say(sound(), "Who?"), answer("A man.", train=False), say("Sure?"), answer("Yes.")]
    assert decoded(made, made.render(messages, frame_counts=[9])) == ["Yes.<|im_end|>"]


@pytest.mark.parametrize(
    "template", [name for name in TEMPLATES if name != "spaced"]
)  # that one writes no prompt
def test_the_prompt_to_answer_is_what_stands_before_the_answer_in_training(template: str) -> None:
    """What is learned at a position is asked for at that position."""
    made = processor(TEMPLATES[template])
    question = [say(sound(), "Who?")]
    trained = made.render([*question, answer("A man.")], frame_counts=[9])
    asked = made.render(question, add_generation_prompt=True, frame_counts=[9])
    assert trained.input_ids[: trained.answer_spans[0][0]] == asked.input_ids


def test_the_transcript_follows_the_sound_only_where_the_config_says_so() -> None:
    messages = [say(sound("Good morning."), "Who?")]
    with_it, without = processor(use_transcript=True), processor()
    rendered = with_it.render(messages, frame_counts=[9])
    assert [i for i in rendered.input_ids if i != AUDIO] == base_ids(
        with_it, [{"role": "user", "content": '"Good morning."\nWho?'}]
    )
    after = rendered.audio_spans[0][1]
    assert with_it.tokenizer.decode(rendered.input_ids[after : after + 15]) == '"Good morning."'
    plain = without.render(messages, frame_counts=[9])
    assert [i for i in plain.input_ids if i != AUDIO] == base_ids(
        without, [{"role": "user", "content": "Who?"}]
    )
    for nothing in ("", "  ", None):
        assert with_it.render([say(sound(nothing), "Who?")], frame_counts=[9]) == without.render(
            [say(sound(), "Who?")], frame_counts=[9]
        )


def test_each_sound_takes_its_own_number_of_placeholders() -> None:
    made = processor(connector={"type": "stack", "stack": 4})
    rendered = made.render([say(sound(), "then", sound(), "Which?")], frame_counts=[9, 17])
    assert [end - start for start, end in rendered.audio_spans] == [3, 5]
    with pytest.raises(ValueError, match="2 sounds, but 1 frame counts"):
        made.render([say(sound(), sound())], frame_counts=[9])


@pytest.mark.parametrize("kind", ["qformer", "stack"])
def test_rendered_placeholders_match_the_models_vectors(kind: str) -> None:
    model, made = tiny_model(connector={"type": kind, "stack": 7, "queries": 4, "heads": 2})
    rng = np.random.default_rng(0)
    sounds = [(0.1 * rng.standard_normal(n)).astype(np.float32) for n in (1_600, 7_777, 16_000)]
    batch = made([[say(sound(), "A?")], [say(sound(), sound(), "B?")]], sounds=sounds)
    logits = model(**batch).logits
    assert logits.shape[:2] == batch["input_ids"].shape


def test_a_token_that_reaches_across_the_sound_is_cut_there() -> None:
    """With this merge "\\nW" is one token; a sound between the two cannot stand inside it."""
    made = processor(merges=(("Ċ", "W"), ("o", "?")))
    rendered = made.render([say(sound(), "Who?"), answer("o?")], frame_counts=[9])
    assert rendered.input_ids.count(AUDIO) == 3
    assert made.tokenizer.decode([i for i in rendered.input_ids if i != AUDIO]).endswith(
        "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\no?<|im_end|>\n"
    )
    start, end = rendered.audio_spans[0]
    assert made.tokenizer.decode(rendered.input_ids[start - 1]) == "\n"
    assert made.tokenizer.decode(rendered.input_ids[end]) == "W"
    assert decoded(made, rendered) == ["o?<|im_end|>"]
    # Without a sound the merged token is left as the base LLM has it.
    plain = made.render([{"role": "user", "content": "Who?"}])
    assert plain.input_ids == base_ids(made, [{"role": "user", "content": "Who?"}])


def test_text_beyond_ascii_keeps_its_places() -> None:
    made = processor(use_transcript=True)
    messages = [say("Ça va? 你好", sound("Grüße – naïve 🎧"), "Qué?"), answer("Très bien 🎵.")]
    rendered = made.render(messages, frame_counts=[9])
    assert decoded(made, rendered) == ["Très bien 🎵.<|im_end|>"]
    start, end = rendered.audio_spans[0]
    assert made.tokenizer.decode(rendered.input_ids[:start]).endswith("Ça va? 你好\n")
    assert made.tokenizer.decode(rendered.input_ids[end:]).startswith('"Grüße – naïve 🎧"\nQué?')


def test_turns_that_the_template_trims_are_trimmed() -> None:
    made = processor(TRIMMING)
    rendered = made.render([say(sound(), "  Who? \n"), answer(" A man.\n")], frame_counts=[9])
    plain = base_ids(made, [{"role": "user", "content": "Who?"}, answer("A man.")])
    assert [i for i in rendered.input_ids if i != AUDIO] == plain
    assert decoded(made, rendered) == ["A man.<|im_end|>"]


def test_a_template_that_rewrites_turns_or_refuses_them_is_told_in_a_sentence() -> None:
    with pytest.raises(UserError, match="changes the text of a turn"):
        processor(
            "{% for m in messages %}{{ m['content'] | replace('a', 'b') | truncate(5) }}{% endfor %}"
        ).render([{"role": "user", "content": "banana banana"}, answer("banana banana")])
    with pytest.raises(UserError, match="refuses the conversation: System role not supported"):
        processor(ALTERNATING).render(
            [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
        )
    bare = processor()
    bare.tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        bare.render([{"role": "user", "content": "Hi"}])
    with pytest.raises(UserError, match="part of type 'image'"):
        processor().render([{"role": "user", "content": [{"type": "image"}]}])


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_are_padded_on_the_side_asked_for_and_masked(side: str) -> None:
    made = processor()
    conversations = [[say("Hi")], [say("Good morning to you")]]
    batch = made(conversations, padding_side=side)
    rows = [made.render(c, add_generation_prompt=True).input_ids for c in conversations]
    short = len(rows[0])
    mask = batch["attention_mask"][0].tolist()
    assert mask == ([1] * short + [0] * (len(rows[1]) - short))[:: -1 if side == "left" else 1]
    assert batch["input_ids"][0][batch["attention_mask"][0].bool()].tolist() == rows[0]
    assert set(batch) == {"input_ids", "attention_mask"}


def test_sounds_are_read_from_their_files_when_not_given(tmp_path: Any) -> None:
    import soundfile

    made = processor()
    samples = (0.1 * np.random.default_rng(0).standard_normal(8_000)).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", samples, 16_000, subtype="FLOAT")
    part = {"type": "audio", "path": str(tmp_path / "a.wav")}
    read = made([[say(part, "Who?")]])
    given = made([[say(part, "Who?")]], sounds=[samples])
    assert all(np.allclose(read[key], given[key], atol=1e-5) for key in given)
    with pytest.raises(ValueError, match="1 sounds, but 0 were given"):
        made([[say(part, "Who?")]], sounds=[])


def test_a_reasoning_model_is_asked_without_its_thoughts_as_it_is_trained(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import speech_llm.generation as generation

    made = processor(THINKING)
    asked: list[str] = []

    def listen(_llm: Any, prompts: list[Any], **settings: Any) -> None:
        asked.extend(made.tokenizer.decode(prompt.ids) for prompt in prompts)
        for place in range(len(prompts)):
            settings["on_done"](place, [])

    monkeypatch.setattr(generation, "generate", listen)
    monkeypatch.setattr(generation, "end_of_turn_ids", lambda *_: [])
    generation.answer_chats(None, made.tokenizer, [[{"role": "user", "content": "hi"}]], max_new_tokens=4)
    assert asked[0].endswith("<think>\n\n</think>\n\n")
