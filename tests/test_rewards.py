"""Wrong answers made from labels, and the worth of sampled answers by rule."""

from __future__ import annotations

from speech_llm.examples import Example
from speech_llm.training.pairs import wrong_answer
from speech_llm.training.rewards import make_verifier

OPTIONS = {"gender": ["female", "male"], "accent": ["American", "Irish", "Scottish"]}
CLIP = {"gender": "female", "accent": "American", "transcript": "Open the door"}


def test_a_wrong_answer_keeps_the_wording() -> None:
    only = {"gender": OPTIONS["gender"]}
    assert wrong_answer("This is a woman.", CLIP, only) == "This is a man."
    assert wrong_answer("Female", CLIP, only) == "Male"
    assert wrong_answer('{"answer": "female"}', CLIP, only) == '{"answer": "male"}'
    accents = {"accent": ["American", "Scottish"]}
    assert wrong_answer("An American accent, I think.", CLIP, accents) == "A Scottish accent, I think."
    assert wrong_answer("It is an American.", CLIP, accents) == "It is a Scottish."


def test_one_attribute_of_several_is_changed_and_the_seed_decides_which() -> None:
    answers = {wrong_answer("An American woman.", CLIP, OPTIONS, seed=str(i)) for i in range(40)}
    assert answers == {"An American man.", "An Irish woman.", "A Scottish woman."}
    assert wrong_answer("An American woman.", CLIP, OPTIONS, "7") == wrong_answer(
        "An American woman.", CLIP, OPTIONS, "7"
    )


def test_an_answer_that_names_nothing_or_something_wrong_has_no_wrong_version() -> None:
    assert wrong_answer("A voice.", CLIP, OPTIONS) is None
    assert wrong_answer("A man.", CLIP, {"gender": OPTIONS["gender"]}) is None
    assert wrong_answer("A woman.", {}, OPTIONS) is None


def example(answer: str) -> Example:
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
    return Example(id="x", messages=turns, attributes=CLIP)


def test_an_answer_is_right_when_it_names_what_the_known_one_names() -> None:
    verifier = make_verifier(example("An American woman speaks."), OPTIONS)
    assert verifier is not None
    assert verifier.right("She is a female with a US accent.")
    assert not verifier.right("A woman.")
    assert not verifier.right("An American man.")
    assert not verifier.right("A woman or a man, American.")
    assert verifier.in_form("anything", ended=True)
    assert not verifier.in_form("anything", ended=False)
    assert not verifier.in_form(" ", ended=True)
    assert make_verifier(example("Something."), OPTIONS) is None


def test_json_is_asked_for_where_the_known_answer_is_json() -> None:
    verifier = make_verifier(example('{"gender": "female"}'), OPTIONS)
    assert verifier is not None
    assert verifier.right('{"gender": "woman"}')
    assert verifier.in_form('{"gender": "male"}', ended=True)
    assert not verifier.right("female")
    assert not verifier.in_form('Sure: {"gender": "female"}', ended=True)
    assert verifier.right('Sure: {"gender": "female"}')
    assert not verifier.in_form('{"answer": "female"}', ended=True)


def test_words_are_asked_for_where_the_known_answer_says_them() -> None:
    verifier = make_verifier(example('They say "Open the door."'), {})
    assert verifier is not None
    assert verifier.right("open the door!")
    assert not verifier.right("open a door")
