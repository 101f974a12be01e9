"""New tokens are words of their own: no other text is tokenised otherwise because of them."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch

import coneslab
from coneslab.diffusion import encode_prompts, load
from coneslab.edits import applied as applied_in_steps
from coneslab.edits.tokens import TokenEdit, vocabulary_fingerprint, with_tokens
from coneslab.errors import ConeslabError, ConeslabWarning
from coneslab.world import SUBJECTS, WORDS, sample, subject

PIECES = ("rob", "ros", "rin", "car2", "dogg", "beac", "zeb")  # new to the tokenizer, and parts of words
TEXTS = ("a robot", "a rose in the spring", "a rob ot", "Robotics", "a cathouse", "robs", "problem", "ro b", "x2y")


@pytest.mark.parametrize("token", PIECES)
def test_a_token_that_is_part_of_other_words_leaves_them_alone(tiny, token):
    prompts = [prompt for name in SUBJECTS for prompt in subject(name).prompts]
    grown = [f"{token}{word} {word}{token}" for word in WORDS]
    texts = [*WORDS, *prompts, *sample(50, seed=0).captions, *TEXTS, *grown]
    texts = [text for text in dict.fromkeys(texts) if token not in text.lower().split()]
    tokenizer, (number,) = with_tokens(tiny.tokenizer, [token])
    assert tokenizer(texts).input_ids == tiny.tokenizer(texts).input_ids
    assert number == len(tiny.tokenizer) and len(tokenizer) == number + 1
    around = f"a {token} cat, ({token})"
    assert tokenizer(around, add_special_tokens=False).input_ids.count(number) == 2
    assert tokenizer(around.upper(), add_special_tokens=False).input_ids.count(number) == 2


@pytest.mark.parametrize("token", ["<cat*>", "<x>", "v*", "ça", "x-ray"])
def test_tokens_with_signs_are_recognised_beside_others(tiny, token):
    tokenizer, (number,) = with_tokens(tiny.tokenizer, [token])
    for text in (f"a {token}", f"a {token}, {token}.", f"“{token}”"):
        assert tokenizer(text).input_ids.count(number) == text.count(token)
    assert tokenizer("a cat, a dog.").input_ids == tiny.tokenizer("a cat, a dog.").input_ids


def test_an_edit_changes_no_prompt_without_its_token(tiny):
    width = tiny.text_encoder.config.hidden_size
    edit = TokenEdit(("rob", "ros"), torch.ones(2, width), vocabulary_fingerprint(tiny))
    prompts = ["a robot on the beach", "a rose in a room", "a rocket"]
    before = encode_prompts(tiny, [*prompts, "a rob rose"])
    with edit.applied(tiny):
        inside = encode_prompts(tiny, [*prompts, "a rob rose"])
    assert torch.equal(inside[:3], before[:3]) and not torch.equal(inside[3], before[3])


def test_of_two_edits_of_a_token_the_later_one_counts_and_says_so(tiny):
    first, second = (
        TokenEdit((token,), torch.full((1, tiny.text_encoder.config.hidden_size), value), vocabulary_fingerprint(tiny))
        for token, value in (("<new>", 1.0), ("<new>", 2.0))
    )
    with first.applied(tiny), pytest.warns(ConeslabWarning, match="<new> has the vector of another edit"):
        with second.applied(tiny):
            both = encode_prompts(tiny, "a <new>")
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConeslabWarning)
        with second.applied(tiny):
            assert torch.equal(encode_prompts(tiny, "a <new>"), both)
        with second.applied(tiny, dose=0.0), second.applied(tiny), second.applied(tiny):
            assert torch.equal(encode_prompts(tiny, "a <new>"), both)
        with applied_in_steps(second, tiny, steps=(0.0, 0.5)):  # which has it at dose 0 elsewhere
            coneslab.generate(tiny, "a <new>", sampler_steps=2)
        other = replace(first, tokens=("<other>",))
        with second.applied(tiny), other.applied(tiny):
            assert torch.equal(encode_prompts(tiny, "a <new>"), both)


@pytest.mark.slow
def test_a_pipeline_saved_with_a_token_can_be_loaded(v_pipe, tmp_path):
    words = v_pipe.text_encoder.config.vocab_size
    edit = TokenEdit(("<new>",), torch.ones(1, 24), vocabulary_fingerprint(v_pipe))
    with edit.applied(v_pipe):
        v_pipe.save_pretrained(tmp_path / "model")
        expected = encode_prompts(v_pipe, "a <new> cat")
    assert v_pipe.text_encoder.config.vocab_size == words and edit.in_weights
    assert torch.equal(encode_prompts(load(tmp_path / "model", device="cpu"), "a <new> cat"), expected)


@pytest.mark.parametrize("token", ["st", "tt", "ST"])
def test_a_piece_that_other_words_are_made_of_is_refused(tiny, token):
    """The tokenizer has it already, though not as a word: its vector is theirs as well."""
    assert token.lower() in tiny.tokenizer.get_vocab()
    assert len(tiny.tokenizer(token, add_special_tokens=False).input_ids) > 1
    with pytest.raises(ConeslabError, match=f"{token} as a piece of longer words.*for example <{token}>"):
        with_tokens(tiny.tokenizer, ["<new>", token])


def applied(pipe, edit):
    with edit.applied(pipe, check_model=False):
        pass


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda pipe: with_tokens(pipe.tokenizer, ["my cat"]), "words without spaces"),
        (lambda pipe: with_tokens(pipe.tokenizer, [" rob"]), "words without spaces"),
        (lambda pipe: with_tokens(pipe.tokenizer, ["SKS", "cat", "sks"]), "SKS and sks are one token"),
        (lambda pipe: with_tokens(pipe.tokenizer, ["<A*>", "<a*>"]), r"<A\*> and <a\*> are one token"),
        (lambda pipe: applied(pipe, TokenEdit(("SKS", "sks"), torch.ones(2, 24), "ab")), "SKS and sks are one token"),
        (lambda pipe: TokenEdit(("a", "b"), torch.ones(2, 24), "ab", initial=("cat",)), "1 initial words for 2 tokens"),
    ],
)
def test_what_are_no_words_or_too_few_is_refused(v_pipe, make, reason):
    with pytest.raises(ConeslabError, match=reason):
        make(v_pipe)
