"""What a model answers in calibration, against the same texts read at once."""

from __future__ import annotations

import copy
from dataclasses import replace

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import small_models
from mlx_flashhead.convert import answers, collect
from mlx_flashhead.convert.recipes import FULL
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_flashhead.evaluation.states import StatesError, batch_states
from mlx_flashhead.integration.locate import find_head

DOCUMENTS = [f"Document {i} tells of {i * i} things. " * 3 for i in range(9)]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module", params=["llama", "gemma3_text"])
def case(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("answers") / "source"
    small_models.write(request.param, folder)
    model, tokenizer = mlx_lm.load(str(folder))
    return model, tokenizer, find_head(model)


@pytest.fixture
def chat(case):
    """Gives the tokenizer a chat template, or none."""

    def give(template: str | None) -> TokenizerWrapper:
        inner = copy.deepcopy(case[1]._tokenizer)
        inner.chat_template = template
        return TokenizerWrapper(inner)

    return give


@pytest.fixture
def drawn(monkeypatch):
    """The tokens drawn, ``[B]`` each time."""
    tokens = []
    draw = answers.draw

    def note(*args):
        tokens.append(draw(*args))
        return tokens[-1]

    monkeypatch.setattr(answers, "draw", note)
    return tokens


@pytest.mark.parametrize(
    "template",
    [None, "{{ raise_exception('no') }}", "{{ nothing }}", "{% bad", "{{1/0}}"],
)
def test_without_a_template_that_shows_a_users_words_there_are_none(chat, template):
    assert answers.prompts(chat(template), DOCUMENTS) is None


def test_prompts_are_beginnings_of_documents_as_a_users_words(chat):
    tokenizer = chat(TEMPLATE)
    prompts = answers.prompts(tokenizer, ["too short", *DOCUMENTS])
    assert answers.prompts(tokenizer, ["too short", ""]) is None
    for ids, document in zip(prompts.tolist(), DOCUMENTS, strict=True):
        words = tokenizer.encode(document, add_special_tokens=False)
        shown = tokenizer.decode(words[: answers.N_GIVEN])
        wanted = tokenizer.apply_chat_template(
            [{"role": "user", "content": shown}],
            tokenize=False,
            add_generation_prompt=True,
        )
        assert "[user]" in wanted and wanted.endswith("[assistant]")
        assert tokenizer.decode(ids) == wanted


def test_many_documents_are_answered_in_all_their_parts(chat):
    tokenizer = chat(TEMPLATE)
    documents = [f"{i:03d} " + DOCUMENTS[0] for i in range(1000)]
    prompts = answers.prompts(tokenizer, documents)
    assert len(prompts) == FULL.n_answers
    shown = [tokenizer.decode(ids) for ids in prompts.tolist()]
    numbers = [int(text.split("[user]")[1][:3]) for text in shown]
    assert numbers == sorted(set(numbers))
    assert numbers[0] < 20 and numbers[-1] > 980


@pytest.mark.parametrize("n_given", [20, 1])
def test_states_are_those_of_the_texts_read_at_once(case, drawn, n_given):
    model, tokenizer, path = case
    prompts = answers.prompts(tokenizer, DOCUMENTS)[:, :n_given]
    found = answers.states(model, path, prompts, [], n_tokens=12)
    texts = mx.concatenate([prompts, mx.array(np.stack(drawn, axis=1))], axis=1)
    assert texts.shape == (len(DOCUMENTS), n_given + 12)
    found = found.reshape(12, len(DOCUMENTS), -1).swapaxes(0, 1)
    # What is read at once begins with the state after the second token.
    wanted = batch_states(model, path, texts.tolist())[:, n_given - 1 : -1]
    np.testing.assert_allclose(found[:, 1:], wanted, atol=2e-4)


def test_the_same_prompts_give_the_same_states(case):
    model, tokenizer, path = case
    prompts = answers.prompts(tokenizer, DOCUMENTS)
    once, again = (
        answers.states(model, path, prompts, [], n_tokens=5) for _ in range(2)
    )
    assert np.array_equal(once, again)
    assert len(np.unique(once, axis=0)) == 5 * len(DOCUMENTS)


def test_an_answer_ends_with_a_stop_token(case, drawn):
    model, tokenizer, path = case
    prompts = answers.prompts(tokenizer, DOCUMENTS)
    whole = answers.states(model, path, prompts, [], n_tokens=12)
    tokens = np.stack(drawn)  # [12, B]
    stop = int(tokens[3, 2])
    stopped = answers.states(model, path, prompts, [stop], n_tokens=12)
    before = np.cumsum(tokens == stop, axis=0) - (tokens == stop)
    assert 0 < (before > 0).sum() < before.size
    assert np.array_equal(stopped, whole[(before == 0).reshape(-1)])


def test_it_ends_when_all_answers_have(case, drawn):
    model, tokenizer, path = case
    steps = []
    prompts = answers.prompts(tokenizer, DOCUMENTS)
    states = answers.states(
        model, path, prompts, range(small_models.VOCAB), step=lambda: steps.append(1)
    )
    assert len(states) == len(DOCUMENTS) and len(drawn) == 1
    assert len(steps) == FULL.n_answered


def test_answers_that_are_written_side_by_side_are_the_same(case, monkeypatch):
    model, tokenizer, path = case
    prompts = answers.prompts(tokenizer, DOCUMENTS)
    whole = answers.states(model, path, prompts, [], n_tokens=5)
    monkeypatch.setattr(answers, "GROUP", 4)
    parts = answers.states(model, path, prompts, [], n_tokens=5)
    np.testing.assert_allclose(whole, parts, atol=1e-4)


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_tokens_are_drawn_by_their_probabilities(monkeypatch, device):
    monkeypatch.setattr(answers, "on_gpu", lambda: device == "gpu")
    logits = np.random.default_rng(0).standard_normal((1, 37)).astype(np.float32) * 2
    p = np.exp(logits[0].astype(np.float64))
    p /= p.sum()
    n = 50_000
    chances = (np.arange(n) + 0.5) / n
    found = answers.draw(mx.array(np.repeat(logits, n, 0)), chances)
    shares = np.bincount(found, minlength=37) / n
    np.testing.assert_allclose(shares, p, atol=2e-4)


def test_states_that_are_no_numbers_are_an_error(case, monkeypatch):
    model, tokenizer, path = case
    prompts = answers.prompts(tokenizer, DOCUMENTS)
    norm = next(m for n, m in model.named_modules() if n.endswith("model.norm"))
    monkeypatch.setitem(norm, "weight", norm.weight * float("nan"))
    with pytest.raises(StatesError, match="not finite"):
        answers.states(model, path, prompts, [], n_tokens=2)


def test_they_are_added_to_what_is_fitted(case, chat):
    model, tokenizer, path = case
    text, both = (
        collect.collect(model, tokens, path, DOCUMENTS, replace(FULL, n_answered=6))
        for tokens in (chat(None), tokenizer)
    )
    assert np.array_equal(both.held_out, text.held_out)
    assert np.array_equal(both.fit[: len(text.fit)], text.fit)
    # One document of nine is held out, and not answered either.
    fitted = DOCUMENTS[:4] + DOCUMENTS[5:]
    prompts = answers.prompts(tokenizer, fitted)
    stops = list(tokenizer.eos_token_ids)
    own = answers.states(model, path, prompts, stops, n_tokens=6)
    assert np.array_equal(both.fit[len(text.fit) :], own)
