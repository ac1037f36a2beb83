"""Decoder and sample: what programs with a loop of their own call."""

from __future__ import annotations

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from small_heads import make_head

from mlx_flashhead import (
    Decoder,
    FlashHead,
    Settings,
    hidden_states,
    load,
    sample,
    unpatch,
    verification,
)
from mlx_flashhead.head import Transform
from mlx_flashhead.sampling import draw, logprobs

PROMPT = [84, 104, 101, 32, 113, 117, 105, 99, 107]
N = 20


def own_loop(model, seed=3, n=N, **options) -> tuple[list[int], list[float]]:
    mx.random.seed(seed)
    decoder = Decoder(model, **options)
    tokens, written, numbers = PROMPT, [], []
    for _ in range(n):
        tokens, found = decoder.step(tokens)
        written.append(tokens.item())
        numbers.append(found.item())
    decoder.close()
    return written, numbers


def mlx_lms(model, tokenizer, seed=3, n=N, **options) -> tuple[list[int], list[float]]:
    mx.random.seed(seed)
    stream = mlx_lm.stream_generate(model, tokenizer, PROMPT, max_tokens=n, **options)
    pairs = [(r.token, r.logprobs[r.token].item()) for r in stream]
    return [token for token, _ in pairs], [number for _, number in pairs]


def own_sampler(logprobs):
    return mx.random.categorical(logprobs * 1.2)


OPTIONS = [
    {},
    {"sampler": make_sampler(0.9, top_p=0.9)},
    {"logits_processors": make_logits_processors({5: 3.0}, 3.0)},
    {"sampler": own_sampler},
    {"logits_processors": [lambda tokens, logits: logits - (tokens[-1] % 5)]},
]


@pytest.mark.parametrize("kind", ["exact", "approximate", "dense"])
@pytest.mark.parametrize("options", OPTIONS, ids=range(len(OPTIONS)))
def test_a_loop_of_ones_own_writes_what_mlx_lms_does(untied_folder, kind, options):
    """With the same seed: from the same draws, for the same model."""
    model, tokenizer = load(untied_folder, exact=kind == "exact", verify_every=8)
    model.lm_head.decoding = kind
    with verification() as count:
        written, numbers = own_loop(model, **options)
    assert (count.verifications > 0) == (kind == "exact")
    assert kind != "exact" or count.verifications < N
    wanted, wanted_numbers = mlx_lms(model, tokenizer, **options)
    assert written == wanted
    np.testing.assert_allclose(numbers, wanted_numbers, atol=2e-3)


def test_exact_is_the_plain_models_text(untied_folder):
    plain, tokenizer = load(untied_folder, dense=True)
    unpatch()
    wanted, numbers = mlx_lms(plain, tokenizer)
    found = own_loop(load(untied_folder)[0])
    assert found[0] == wanted
    np.testing.assert_allclose(found[1], numbers, atol=1e-4)


def state(cache):
    return [(c.offset, np.array(c.keys[..., : c.offset, :])) for c in cache]


@pytest.mark.parametrize("n", [1, 5, 6, 13])
def test_a_closed_cache_has_what_was_given_and_goes_on(untied_folder, n):
    model, _ = load(untied_folder, verify_every=8)
    wanted = own_loop(model)[0]
    cache = make_prompt_cache(model)
    decoder = Decoder(model, cache)
    tokens, written = PROMPT, []
    for _ in range(n):
        tokens, _ = decoder.step(tokens)
        written.append(tokens.item())
    decoder.close()
    given = [*PROMPT, *written[:-1]]
    plain = make_prompt_cache(model)
    model(mx.array([given]), cache=plain)
    for (offset, keys), (other, wanted_keys) in zip(state(cache), state(plain)):
        assert offset == other == len(given)
        np.testing.assert_allclose(keys, wanted_keys, atol=1e-4)
    while len(written) < N:
        tokens, _ = decoder.step(tokens)
        written.append(tokens.item())
    assert written == wanted


@pytest.mark.parametrize("exact", [False, True])
def test_another_token_than_the_one_that_was_given(untied_folder, exact):
    """A program may put in what it likes: a forced token, or the next question."""
    model, _ = load(untied_folder, exact=exact, verify_every=8)
    decoder = Decoder(model)
    tokens, _ = decoder.step(PROMPT)
    given = [*PROMPT]
    for forced in (None, None, [7], None, [1, 2, 3], None, None, [8], None):
        tokens = forced or tokens.tolist()
        given += tokens
        tokens, number = decoder.step(tokens)
        fresh, wanted = Decoder(model).step(given)
        assert tokens.item() == fresh.item()
        assert abs(number.item() - wanted.item()) < 1e-3


def test_prompts_longer_than_what_is_given_at_once(untied_folder, monkeypatch):
    model, _ = load(untied_folder)
    wanted = own_loop(model)
    monkeypatch.setattr("mlx_flashhead.integration.decoder._AT_ONCE", 3)
    found = own_loop(model)
    assert found[0] == wanted[0]


def test_refusals(untied_folder):
    plain, _ = load(untied_folder, dense=True)
    for call in (Decoder, lambda model: hidden_states(model, mx.array([PROMPT]))):
        with pytest.raises(ValueError, match="no FlashHead: put one in"):
            call(plain)
    model, _ = load(untied_folder)
    with pytest.raises(ValueError, match="at least one token"):
        Decoder(model).step([])
    head = model.lm_head.head
    with pytest.raises(ValueError, match=r"are \[B, 64\], not \(1, 1, 64\)"):
        sample(head, mx.zeros((1, 1, 64)))
    with pytest.raises(ValueError, match="cannot be drawn with Settings"):
        sample(head, mx.zeros((1, 64)), Settings(temp=1.0, top_k=5000))


# ---- sample ------------------------------------------------------------------------


SETTINGS = [
    Settings(),
    Settings(temp=1.0),
    Settings(temp=0.7, top_p=0.9),
    Settings(temp=1.2, min_p=0.02, top_k=30),
]


def heads() -> list[FlashHead]:
    capped = make_head(vocab_size=123).head
    capped.transform = Transform(0.5, 30.0)
    return [make_head().head, capped]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("which", [0, 1])
def test_log_probabilities_are_those_of_the_whole_vocabulary(settings, which):
    head = heads()[which]
    h = mx.random.normal((40, head.hidden_size), key=mx.random.key(1))
    key = mx.random.key(2)
    tokens, numbers = sample(head, h, settings, key)
    drawn = draw(head, settings, h, key)
    assert tokens.tolist() == drawn.tokens.tolist()
    every = mx.take_along_axis(logprobs(head, drawn), tokens[:, None], axis=1)
    np.testing.assert_allclose(numbers, every[:, 0], atol=1e-4)
    tokens, numbers = sample(head, h, settings, key, exact=True)
    dense = head.transform(head.dense(h))
    dense = dense - mx.logsumexp(dense, axis=1, keepdims=True)
    every = mx.take_along_axis(dense, tokens[:, None], axis=1)
    np.testing.assert_allclose(numbers, every[:, 0], atol=1e-4)
    if settings.greedy:
        assert tokens.tolist() == mx.argmax(dense, axis=1).tolist()


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_drafts_are_verified_with_their_keys(settings):
    """Drawn one after another and verified at once; where all is probed, all stand."""
    head = make_head().head
    head.n_probes = head.n_clusters
    h = mx.random.normal((12, head.hidden_size), key=mx.random.key(1))
    keys = mx.random.split(mx.random.key(2), 12)
    drafts = [sample(head, h[i : i + 1], settings, keys[i])[0] for i in range(12)]
    verified, _ = sample(head, h, settings, keys, exact=True)
    assert mx.concatenate(drafts).tolist() == verified.tolist()
    assert sample(head, h, settings, keys).tokens.tolist() == verified.tolist()


def test_seeds_reproduce_draws():
    head = make_head().head
    h = mx.random.normal((30, head.hidden_size))
    texts = []
    for seed in (1, 1, 2):
        mx.random.seed(seed)
        texts.append(sample(head, h, Settings(temp=1.5)).tokens.tolist())
    assert texts[0] == texts[1] != texts[2]


def test_an_unknown_transform_is_refused():
    head = make_head().head
    head.transform = None
    with pytest.raises(ValueError, match="cannot be drawn"):
        sample(head, mx.zeros((1, head.hidden_size)))
