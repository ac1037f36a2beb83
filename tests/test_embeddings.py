"""Prompts given as embeddings, as mlx-lm gives images, and what follows them."""

from __future__ import annotations

import importlib

import mlx.core as mx
import pytest
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from mlx_flashhead import load, unpatch, verification
from mlx_flashhead.integration import masking

generate = importlib.import_module("mlx_lm.generate")
PROMPT = mx.array([84, 104, 101, 32, 113, 117, 105, 99, 107])
N = 24


def written(model, *, prompt=PROMPT, seed=3, **options):
    """Tokens after embeddings that no tokens have."""
    mx.random.seed(seed)
    embeddings = 0.3 * mx.random.normal((len(PROMPT), 64), key=mx.random.key(5))
    steps = generate.generate_step(
        prompt, model, max_tokens=N, input_embeddings=embeddings, **options
    )
    return [token for token, _ in steps]


@pytest.fixture(scope="module")
def dense(untied_folder):
    model, _ = load(untied_folder, dense=True)
    unpatch()
    return model


OPTIONS = [
    {},
    {"prefill_step_size": 1},
    {"prefill_step_size": 4, "prompt": mx.array([], mx.uint32)},
    {"logits_processors": make_logits_processors(repetition_penalty=4.0)},
    {
        "logits_processors": make_logits_processors(logit_bias={7: 3.0}),
        "prompt": mx.array([], mx.uint32),
    },
]


@pytest.mark.parametrize("options", OPTIONS, ids=range(len(OPTIONS)))
def test_exact_texts_are_those_of_stock_mlx_lm(untied_folder, dense, options):
    wanted = written(dense, **options)
    model, _ = load(untied_folder, n_probes=90, verify_every=8)
    with verification() as count:
        assert written(model, **options) == wanted
    assert count.verifications < count.tokens  # it was drafted
    plain = generate.generate_step(PROMPT, dense, max_tokens=N)
    assert wanted != [token for token, _ in plain]


def test_sampled_texts_depend_on_the_seed_alone(untied_folder):
    options = {"sampler": make_sampler(1.0, top_p=0.95)}
    texts = set()
    for verify_every in (1, 8):
        model, _ = load(untied_folder, n_probes=90, verify_every=verify_every)
        texts.add(tuple(written(model, **options)))
    assert len(texts) == 1
    assert tuple(written(model, seed=4, **options)) not in texts


@pytest.mark.parametrize("options", OPTIONS, ids=range(len(OPTIONS)))
def test_approximate_texts_are_drawn_among_candidates(
    untied_folder, monkeypatch, options
):
    drawn, draw = [], masking.draw

    def counting(head, settings, h, *rest):
        drawn.append(len(h))
        return draw(head, settings, h, *rest)

    monkeypatch.setattr(masking, "draw", counting)
    model, _ = load(untied_folder, n_probes=90, exact=False)
    text = written(model, **options)
    assert len(drawn) >= N and set(drawn) == {1}
    # Of the same head, by the logits of the whole vocabulary.
    unpatch()
    assert written(model, **options) == text


def test_a_model_that_takes_none_is_refused_by_mlx_lm(untied_folder):
    for exact in (False, True):
        model, _ = load(untied_folder, exact=exact)

        class Deaf(type(model)):
            def __call__(self, inputs, cache=None):
                return super().__call__(inputs, cache)

        model.__class__ = Deaf
        with pytest.raises(ValueError, match="does not support input embeddings"):
            written(model)
