"""Exact decoding: the dense head's own tokens, however few clusters are probed."""

from __future__ import annotations

import importlib
import itertools
from contextlib import contextmanager

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import small_models
from mlx_flashhead.convert import convert
from mlx_lm.models import cache as caches
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from small_heads import make_head, random_states
from test_candidates import p_value
from versions import OLD_MLX_LM

from mlx_flashhead import flash_heads, load, patch_decoding, unpatch
from mlx_flashhead.integration import exact
from mlx_flashhead.integration.exact import ExactDecoder, verification
from mlx_flashhead.integration.locate import slot_of
from mlx_flashhead.integration.samplers import read_sampler
from mlx_flashhead.sampling import Settings, coupled, draw

PROMPT = "The quick brown fox jumps over the lazy dog"

SAMPLERS = [
    {"temp": 0.0},
    {"temp": 0.8},
    {"temp": 0.7, "top_p": 0.9},
    {"temp": 1.0, "min_p": 0.05, "min_tokens_to_keep": 2},
    {"temp": 0.9, "top_k": 20},
    {"temp": 1.1, "xtc_probability": 0.5, "xtc_threshold": 0.02},
    {"temp": 0.8, "top_p": 0.95, "min_p": 0.01, "top_k": 40},
    {
        "temp": 1.0,
        "top_p": 0.99,
        "xtc_probability": 1.0,
        "xtc_threshold": 0.01,
        "xtc_special_tokens": [5, 6],
    },
]


# ---- the draw ----------------------------------------------------------------------


def stock_probabilities(sampler, logits: np.ndarray) -> np.ndarray:
    """What mlx-lm's own filters leave of a distribution, ``[V]``; XTC's coin falls on
    dropping."""
    settings = read_sampler(sampler)
    logprobs = mx.array(logits[None], mx.float32)
    logprobs = logprobs - mx.logsumexp(logprobs)
    for method in sampler.__closure__[0].cell_contents:
        try:
            logprobs = method(logprobs)
        except TypeError:
            if not OLD_MLX_LM:
                raise
            pytest.skip("min-p of mlx-lm before 0.32 fails with min_tokens_to_keep")
    return np.array(mx.softmax(logprobs / settings.temp, axis=-1))[0].astype(np.float64)


def keys_of(n, seed=0):
    return mx.array([[seed, i] for i in range(n)], dtype=mx.uint32)


@pytest.mark.parametrize("n_filtered", [3, 1024])
@pytest.mark.parametrize("options", SAMPLERS[1:], ids=str)
def test_draws_follow_mlx_lms_dense_sampler(options, n_filtered):
    """8,000 draws; with few clusters looked at, only what is certain counts."""
    options = {k: 1.0 if k == "xtc_probability" else v for k, v in options.items()}
    head = make_head(230, 32, 8, 6).head
    x = mx.array(0.35 * random_states(1, 32, 100))
    logits = np.array(head.dense(x)[0])
    sampler = make_sampler(**options)
    wanted = stock_probabilities(sampler, logits)
    row, settings = head.clustered(x), read_sampler(sampler)
    tokens = []
    rows = mx.repeat(row, 1000, axis=0)
    for start in range(0, 8000, 1000):
        keys = keys_of(1000, seed=1 + start)
        drawn = coupled.draw(head, settings, rows, keys, n_filtered)
        certain = drawn.certain.all().item()
        if n_filtered == 1024:
            assert certain
        if certain:
            tokens.append(np.array(drawn.tokens))
    if tokens:
        assert p_value(np.concatenate(tokens), wanted) > 1e-4


def test_the_test_would_notice():
    head = make_head(230, 32, 8, 6).head
    x = mx.array(0.35 * random_states(1, 32, 100))
    wanted = stock_probabilities(make_sampler(0.8), np.array(head.dense(x)[0]))
    rows = mx.repeat(head.clustered(x), 3000, axis=0)
    drawn = coupled.draw(head, Settings(temp=1.1), rows, keys_of(3000))
    assert p_value(np.array(drawn.tokens), wanted) < 1e-4


@pytest.mark.parametrize("options", SAMPLERS, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_a_draft_that_probes_all_is_what_is_verified(options, bias):
    head = make_head(230, 32, 8, 29, bias=bias).head
    settings = read_sampler(make_sampler(**options))
    x = mx.array(0.35 * random_states(40, 32, 3))
    keys = keys_of(40)
    drawn = coupled.draw(head, settings, head.clustered(x), keys)
    drafts = [draw(head, settings, x[i : i + 1], keys[i]).tokens for i in range(40)]
    assert [d.item() for d in drafts] == drawn.tokens.tolist()


@pytest.mark.parametrize("options", SAMPLERS, ids=str)
def test_a_draft_that_probes_half_is_mostly_verified(options):
    """So it costs time and not truth; by chance one in 230 would agree."""
    head = make_head(230, 32, 8, 15).head
    settings = read_sampler(make_sampler(**options))
    x = mx.array(0.35 * random_states(60, 32, 3))
    keys = keys_of(60)
    drawn = coupled.draw(head, settings, head.clustered(x), keys).tokens.tolist()
    drafts = [
        draw(head, settings, x[i : i + 1], keys[i]).tokens.item() for i in range(60)
    ]
    assert sum(a == b for a, b in zip(drafts, drawn)) > 10


def test_in_sixteen_bits_ties_go_to_the_lowest_token():
    head = make_head(230, 32, 8, 29, dtype=mx.bfloat16, bits=32).head
    x = mx.array(0.02 * random_states(50, 32, 3)).astype(mx.bfloat16)
    logits = head.dense(x)
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    wanted = mx.argmax(logprobs, axis=-1).tolist()
    ties = (logprobs == logprobs.max(axis=-1, keepdims=True)).sum(axis=-1)
    assert (ties > 1).sum().item() > 5
    drawn = coupled.draw(head, Settings(), head.clustered(x), keys_of(50))
    assert drawn.tokens.tolist() == wanted


# ---- whole texts -------------------------------------------------------------------


@pytest.fixture(scope="module", params=["untied_folder", "tied_folder"])
def folder(request):
    return request.getfixturevalue(request.param)


def text(model, tokenizer, n=40, seed=3, prompt=PROMPT, **options):
    mx.random.seed(seed)
    return [
        (r.token, r.logprobs)
        for r in mlx_lm.stream_generate(
            model, tokenizer, prompt, max_tokens=n, **options
        )
    ]


def tokens(*args, **options):
    return [token for token, _ in text(*args, **options)]


def stock(folder):
    model, tokenizer = load(folder, dense=True)
    unpatch()
    return model, tokenizer


def drafting(folder, n_probes=20, verify_every=8):
    model, tokenizer = load(
        folder, exact=True, n_probes=n_probes, verify_every=verify_every
    )
    return model, tokenizer


@pytest.mark.filterwarnings("ignore:.*are probed at every step")
@pytest.mark.parametrize("verify_every", [1, 2, 8])
@pytest.mark.parametrize("n_probes", [4, 60])
def test_greedy_texts_are_those_of_stock_mlx_lm(folder, n_probes, verify_every):
    wanted = text(*stock(folder))
    patch_decoding()
    with verification() as count:
        got = text(*drafting(folder, n_probes, verify_every))
    assert [t for t, _ in got] == [t for t, _ in wanted]
    for (_, a), (_, b) in zip(got, wanted):
        assert a.shape == b.shape and mx.allclose(a, b, atol=1e-4)
    assert count.tokens >= 40 and count.steps >= count.tokens
    if verify_every > 1 and n_probes == 4:
        assert count.acceptance < 1  # so that something had to be undone
    elif verify_every > 1:
        assert count.verifications < count.tokens


@pytest.mark.parametrize("options", SAMPLERS[1:], ids=str)
def test_sampled_texts_depend_on_the_seed_alone(untied_folder, options):
    """Not on what is drafted, nor on how many at once."""
    texts = {
        tuple(
            tokens(
                *drafting(untied_folder, n_probes, verify_every),
                n=24,
                sampler=make_sampler(**options),
            )
        )
        for n_probes, verify_every in ((120, 1), (90, 4), (90, 16))
    }
    assert len(texts) == 1
    model, tokenizer = drafting(untied_folder, 90)
    other = tokens(model, tokenizer, n=24, seed=4, sampler=make_sampler(**options))
    assert tuple(other) not in texts


PROCESSORS = [
    {"repetition_penalty": 4.0},
    {"logit_bias": {5: 3.0, 7: -4.0}, "presence_penalty": 20.0},
    {"frequency_penalty": 9.0, "frequency_context_size": 7},
]


@pytest.mark.parametrize("options", PROCESSORS, ids=str)
def test_penalties_are_those_of_stock_mlx_lm(folder, options):
    def made():
        return make_logits_processors(**options)

    plain = tokens(*stock(folder))
    wanted = text(*stock(folder), logits_processors=made())
    patch_decoding()
    got = text(*drafting(folder), logits_processors=made())
    assert [t for t, _ in got] == [t for t, _ in wanted]
    for (_, a), (_, b) in zip(got, wanted):
        assert mx.allclose(a, b, atol=1e-3)
    assert [t for t, _ in wanted] != plain


def test_unknown_samplers_and_processors_get_the_dense_heads_numbers(folder):
    """Called once for each token and in order, as stock mlx-lm calls them: the same
    seed gives the same text."""

    def own():
        seen = []

        def processor(so_far, logits):
            seen.append(so_far.tolist())
            return logits - 0.1 * (mx.arange(logits.shape[-1]) % 3)

        def sampler(logprobs):
            return mx.random.categorical(logprobs * 1.2)

        return {"sampler": sampler, "logits_processors": [processor]}, seen

    options, wanted_calls = own()
    wanted = tokens(*stock(folder), **options)
    patch_decoding()
    options, calls = own()
    assert tokens(*drafting(folder), **options) == wanted
    assert calls[: len(wanted)] == wanted_calls[: len(wanted)]


@pytest.mark.parametrize("size", [1, 2, 5])
def test_prompts_in_pieces(untied_folder, size):
    """A piece of one token is no step: nothing is drawn after it."""
    prompt = mx.array([2, 5, 7, 9])

    def run(model, tokenizer):
        generate_step = importlib.import_module("mlx_lm.generate").generate_step
        contexts = []

        def processor(so_far, logits):
            contexts.append(so_far.tolist())
            return logits

        mx.random.seed(5)
        steps = generate_step(
            prompt,
            model,
            max_tokens=12,
            prefill_step_size=size,
            sampler=lambda logprobs: mx.random.categorical(logprobs),
            logits_processors=[processor],
        )
        return list(steps), contexts[:12]

    wanted, wanted_contexts = run(*stock(untied_folder))
    patch_decoding()
    got, contexts = run(*drafting(untied_folder))
    assert contexts == wanted_contexts
    for (token, row), (wanted_token, wanted_row) in zip(got, wanted, strict=True):
        assert token == wanted_token and mx.allclose(row, wanted_row, atol=1e-4)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_the_number_of_tokens_is_kept(untied_folder, n):
    assert len(tokens(*drafting(untied_folder), n=n)) == n


def test_a_text_ends_where_the_dense_heads_does(untied_folder):
    sampler = make_sampler(1.5)
    wanted = tokens(*drafting(untied_folder, 126, 1), sampler=sampler)
    at = next(i for i in range(12, 40) if wanted[i] not in wanted[:i])
    model, tokenizer = drafting(untied_folder, 126)
    tokenizer.eos_token_ids = {wanted[at]}
    slot_of(model).stop_tokens = frozenset([wanted[at]])
    with verification() as count:
        assert tokens(model, tokenizer, sampler=sampler) == wanted[: at + 1]
    # What was drafted beyond the end is little: the device is one step ahead.
    assert count.steps <= at + 4


# ---- caches ------------------------------------------------------------------------


def same_caches(got, wanted):
    for a, b in zip(got, wanted, strict=True):
        assert type(a) is type(b)
        assert getattr(a, "offset", None) == getattr(b, "offset", None)
        # Slots that hold no token may hold an undone one, as after mlx-lm's own trim.
        n = min(a.offset, a.keys.shape[2])
        for x, y in ((a.keys, b.keys), (a.values, b.values)):
            assert mx.allclose(x[..., :n, :], y[..., :n, :], atol=1e-4)


@contextmanager
def generation(model, tokenizer, cache, n):
    generate_step = importlib.import_module("mlx_lm.generate").generate_step
    prompt = mx.array(tokenizer.encode(PROMPT))
    steps = generate_step(prompt, model, prompt_cache=cache, max_tokens=n)
    try:
        yield steps
    finally:
        steps.close()


ARCHITECTURES = ["llama", "gemma3_text", "qwen3-tied"]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def converted(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exact")
    extra = {"sliding_window": 16} if request.param == "gemma3_text" else {}
    source = small_models.write(request.param, folder / "source", 603, **extra)
    target = folder / "converted"
    convert(str(source), target, cluster_size=8, n_probes=40, verbose=False)
    return target


@pytest.mark.parametrize("taken", [1, 2, 3, 7, 12, 60])
def test_a_prompt_cache_ends_as_stock_mlx_lm_leaves_it(converted, taken):
    """Also where the generation is left in the middle of a chunk."""
    ends = []
    for model, tokenizer in (stock(converted), drafting(converted, 30)):
        cache = caches.make_prompt_cache(model)
        with generation(model, tokenizer, cache, 60) as steps:
            made = [token for token, _ in itertools.islice(steps, taken)]
        ends.append((made, cache))
    assert ends[0][0] == ends[1][0]
    same_caches(ends[1][1], ends[0][1])


def test_past_the_window_of_rotating_caches(converted):
    wanted = tokens(*stock(converted), n=150)
    patch_decoding()
    with verification() as count:
        assert tokens(*drafting(converted, 30), n=150) == wanted
    assert count.verifications < 150


def test_quantized_caches(tmp_path):
    """From the start, from the middle of the text, and never."""
    source = small_models.write("llama", tmp_path / "source", 603, head_dim=32)
    folder = tmp_path / "c"
    convert(str(source), folder, cluster_size=8, n_probes=40, verbose=False)
    for start in (0, 60, 600):
        options = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": start}
        wanted = tokens(*stock(folder), n=40, **options)
        patch_decoding()
        with verification() as count:
            assert tokens(*drafting(folder), n=40, **options) == wanted
        assert count.verifications < count.steps


def test_a_cache_that_cannot_be_rolled_back_is_decoded_densely(
    untied_folder, monkeypatch
):
    wanted = tokens(*stock(untied_folder), n=20)
    patch_decoding()
    monkeypatch.setattr(exact, "supported", lambda cache: False)
    with verification() as count:
        assert tokens(*drafting(untied_folder), n=20) == wanted
    assert count.verifications == count.steps == count.tokens


def test_an_interruption_leaves_the_cache_at_what_was_yielded(
    untied_folder, monkeypatch
):
    model, tokenizer = drafting(untied_folder)
    cache = caches.make_prompt_cache(model)
    length = len(tokenizer.encode(PROMPT))
    clustered = type(next(flash_heads(model))).clustered
    calls = []

    def interrupted(head, x):
        calls.append(len(x))
        if len(calls) == 4:  # the prompt's is the first
            raise KeyboardInterrupt
        return clustered(head, x)

    monkeypatch.setattr(type(next(flash_heads(model))), "clustered", interrupted)
    made = []
    with (
        pytest.raises(KeyboardInterrupt),
        generation(model, tokenizer, cache, 60) as steps,
    ):
        for token, _ in steps:
            made.append(token)
    assert made and cache[0].offset == length + len(made)
    monkeypatch.undo()
    patch_decoding()
    assert len(tokens(model, tokenizer, n=5)) == 5


# ---- what would be wrong -----------------------------------------------------------


def test_a_verification_that_accepts_everything_is_caught(untied_folder, monkeypatch):
    wanted = tokens(*stock(untied_folder))
    patch_decoding()
    model, tokenizer = drafting(untied_folder, 90)
    next(flash_heads(model)).n_probes = 4

    def careless(self, logits, drafts, context, masks):
        last = coupled.draw(self.head, Settings(), logits[-1:], keys_of(1)).tokens
        tokens = [t.item() for t in drafts[1:]] + last.tolist()
        return [exact.Verified(t, row) for t, row in zip(tokens, logits)]

    monkeypatch.setattr(ExactDecoder, "_choose_together", careless)
    assert tokens(model, tokenizer) != wanted


def test_a_roll_back_by_one_too_few_is_caught(untied_folder, monkeypatch):
    wanted = tokens(*stock(untied_folder))
    patch_decoding()
    model, tokenizer = drafting(untied_folder, 90)
    next(flash_heads(model)).n_probes = 4
    to = exact.Rollback.to
    monkeypatch.setattr(
        exact.Rollback, "to", lambda self, n: to(self, min(n + 1, self.steps))
    )
    assert tokens(model, tokenizer) != wanted


def test_continuations_of_a_tiny_vocabulary_are_as_likely_as_they_should_be(tmp_path):
    """All sequences of three tokens, against the product of the dense head's own
    probabilities."""
    source = small_models.write("llama", tmp_path / "source", 300)
    convert(str(source), tmp_path / "c", cluster_size=4, n_probes=30, verbose=False)
    model, tokenizer = load(tmp_path / "c", exact=True, verify_every=3)
    prompt = tokenizer.encode("ab")
    options = {"temp": 0.6, "top_k": 4}
    sampler = make_sampler(**options)

    def step(sequence):
        logits = np.array(model(mx.array([prompt + sequence]))[0, -1])
        return stock_probabilities(sampler, logits)

    wanted = {}
    for a in np.nonzero(p1 := step([]))[0]:
        for b in np.nonzero(p2 := step([int(a)]))[0]:
            for c in np.nonzero(p3 := step([int(a), int(b)]))[0]:
                wanted[int(a), int(b), int(c)] = p1[a] * p2[b] * p3[c]
    assert len(wanted) == 64 and sum(wanted.values()) == pytest.approx(1)
    order = {sequence: i for i, sequence in enumerate(wanted)}
    drawn = [
        order[
            tuple(tokens(model, tokenizer, n=3, seed=i, prompt=prompt, sampler=sampler))
        ]
        for i in range(300)
    ]
    assert p_value(np.array(drawn), np.array(list(wanted.values()))) > 1e-4
