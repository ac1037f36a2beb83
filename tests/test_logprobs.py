"""Log-probabilities that are made only as far as somebody looks at them."""

from __future__ import annotations

import copy
import importlib
import io
import pickle
from types import SimpleNamespace

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from small_heads import make_head, random_states

from mlx_flashhead import load, patch_decoding, patched
from mlx_flashhead.head import Transform
from mlx_flashhead.integration.decode import _Unread, top_logprobs
from mlx_flashhead.integration.samplers import read_processors
from mlx_flashhead.sampling import (
    LogProbs,
    Settings,
    dense_logprobs,
    draw,
    drawn_logprobs,
)
from mlx_flashhead.sampling.draw import logprobs

V, D = 230, 32
PROMPT = "The quick brown fox jumps over the lazy dog"
TRANSFORMS = [Transform(), Transform(0.5, 4.0)]


def head_of(**options):
    head = make_head(V, D, 8, options.pop("n_probes", 6), **options).head
    return head


def drawn_of(head, n=1, processors=(), context=None, temp=1.0, seed=3):
    x = mx.array(0.35 * random_states(n, D, seed))
    read = read_processors(processors, V)
    key = mx.array([0, seed], mx.uint32)
    return draw(head, Settings(temp=temp), x, key, read, context)


def pending(array) -> str:
    sink = io.StringIO()
    mx.export_to_dot(sink, array)
    return sink.getvalue()


@pytest.mark.parametrize("n_probes", [1, 6, 29])
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_one_number_is_that_of_all(transform, bias, n_probes):
    """For probed tokens, the drawn one and others, and for estimates."""
    head = head_of(bias=bias, n_probes=n_probes)
    head.transform = transform
    # Hot, so that some are drawn in clusters that were not probed.
    drawn = drawn_of(head, 24, temp=4.0)
    wanted = np.array(logprobs(head, drawn))
    lazy = drawn_logprobs(head, drawn)
    for row, one in zip(wanted, lazy, strict=True):
        for token in range(0, V, 7):
            assert one[token].item() == pytest.approx(row[token], abs=2e-5)
    for b, token in enumerate(drawn.tokens.tolist()):
        assert lazy[b][token].item() == pytest.approx(wanted[b, token], abs=2e-5)
        assert "LogSumExp" in pending(lazy[b])  # all of them have not been made
    away = (drawn.retrieved.probes == (head.positions[drawn.tokens] // 8)[:, None]).any(
        axis=1
    )
    assert n_probes == 29 or not away.all().item()


@pytest.mark.parametrize(
    "given",
    [
        {"logit_bias": {3: 4.0, 100: -3.0, 229: 100.0}},
        {"repetition_penalty": 1.5, "repetition_context_size": 12},
        {
            "logit_bias": {7: 1.0, 8: -np.inf},
            "repetition_penalty": 1.2,
            "presence_penalty": 0.5,
            "frequency_penalty": 0.3,
        },
    ],
    ids=str,
)
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_one_number_after_logits_processors(given, transform):
    head = head_of()
    head.transform = transform
    context = mx.array([7, 7, 100, 3, 9, 11, 7, 215, 229], mx.uint32)
    for seed in range(6):
        processors = make_logits_processors(**given)
        drawn = drawn_of(head, 1, processors, context, seed=seed)
        wanted = np.array(logprobs(head, drawn))[0]
        (one,) = drawn_logprobs(head, drawn)
        got = [one[token].item() for token in range(V)]
        np.testing.assert_allclose(got, wanted, atol=2e-5)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_the_likeliest_are_exact(transform):
    """In the order of the dense head wherever their clusters are worth a look."""
    head = head_of(n_probes=3)
    head.transform = transform
    drawn = drawn_of(head, 20)
    dense = transform(head.dense(drawn.states))
    for b, one in enumerate(drawn_logprobs(head, drawn)):
        for n in (1, 5, 11):
            ids, values = one.top(n)
            assert len(set(ids.tolist())) == n and (values[1:] <= values[:-1]).all()
            logits = dense[b, ids]
            np.testing.assert_allclose(
                np.array(values - values[0]), np.array(logits - logits[0]), atol=2e-5
            )
        whole = np.array(one)
        # None of what was scored is likelier than what is named.
        scored = head.token_ids[drawn.retrieved.probes[b]].reshape(-1)
        rest = np.setdiff1d(np.array(scored), [*ids.tolist(), V])
        assert whole[rest].max() <= values[-1].item() + 2e-5


def test_the_servers_likeliest_are_those():
    asked = SimpleNamespace(convert_ids_to_tokens=lambda ids: [f"t{i}" for i in ids])
    format = top_logprobs(lambda *_: "stock")
    (one,) = drawn_logprobs(*(head := head_of(), drawn_of(head)))
    entries = format(one, 4, asked)
    assert [e["token"] for e in entries] == [f"t{e['id']}" for e in entries]
    assert [e["logprob"] for e in entries] == one.top(4)[1].tolist()
    assert format(one, 0, asked) == format(one + 0, 4, asked) == "stock"
    assert format(dense_logprobs(head, mx.zeros((1, V)))[0], 4, asked) == "stock"


def test_the_server_is_patched_once_it_is_there(untied_folder):
    server = importlib.import_module("mlx_lm.server")
    stock = server._format_top_logprobs
    for exact in (True, False):
        with patched(exact=exact):
            model, tokenizer = mlx_lm.load(str(untied_folder))
            assert server._format_top_logprobs is not stock
            steps = mlx_lm.stream_generate(model, tokenizer, PROMPT, 3)
            for lazy in (r.logprobs for r in steps):
                found = server._format_top_logprobs(lazy, 5, tokenizer)
                wanted = stock(lazy, 5, tokenizer)
                assert found[0].keys() == wanted[0].keys() and len(found) == 5
                if exact:
                    assert found == wanted
        assert server._format_top_logprobs is stock


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_of_all_logits(dtype):
    head = head_of()
    logits = mx.array(3 * random_states(4, V, 5)).astype(dtype)
    logits_by_id = logits[:, head.positions]
    wanted = logits_by_id - mx.logsumexp(logits_by_id, axis=-1, keepdims=True)
    for row, one in zip(wanted, dense_logprobs(head, logits), strict=True):
        got = mx.stack([one[token] for token in range(V)])
        assert got.dtype == one.dtype == dtype
        assert mx.array_equal(got, one).item()
        np.testing.assert_allclose(
            np.array(got.astype(mx.float32)),
            np.array(row.astype(mx.float32)),
            atol=1e-5 if dtype == mx.float32 else 0.04,
        )


def both():
    drawn = drawn_of(head := head_of())
    return drawn_logprobs(head, drawn)[0], logprobs(head, drawn)[0]


@pytest.mark.parametrize(
    "use",
    [
        lambda a: a.shape,
        lambda a: a.dtype,
        lambda a: len(a),
        mx.exp,
        lambda a: -a,
        lambda a: 2 * a + a,
        lambda a: a > -3,
        mx.argmax,
        lambda a: mx.argpartition(-a, kth=3)[:4],
        lambda a: mx.softmax(a, axis=-1),
        lambda a: mx.stack([a, a]),
        lambda a: a[[3, 4]],
        lambda a: a[mx.array(3)],
        lambda a: a[-1],
        lambda a: a[2:9],
        lambda a: a[None],
        lambda a: a.tolist(),
        lambda a: np.array(a),
        lambda a: np.exp(np.array(a, copy=False)),
        lambda a: a.astype(mx.float16),
        lambda a: list(a)[3],
        lambda a: mx.array(a)[3],
        lambda a: copy.deepcopy(a),
        lambda a: pickle.loads(pickle.dumps(a)),
        lambda a: mx.compile(lambda b: b * 2)(a),
        lambda a: mx.vmap(lambda b: b + 1)(a),
        lambda a: (mx.eval([a]), a)[1],
        lambda a: (mx.async_eval({"a": a}), a)[1],
    ],
)
def test_they_are_an_array(use):
    lazy, plain = both()
    assert isinstance(lazy, mx.array)
    got, wanted = use(lazy), use(plain)
    if isinstance(wanted, (mx.array, np.ndarray)):
        got, wanted = np.array(got), np.array(wanted)
        assert got.dtype == wanted.dtype
        np.testing.assert_array_equal(got, wanted)
    else:
        assert got == wanted


def assign(a):
    a[5] = 1.0


def add(a):
    a += 3


def divide(a):
    a /= 2


@pytest.mark.parametrize("change", [assign, add, divide])
def test_what_is_changed_is_known_no_longer(change):
    lazy, plain = both()
    for a in (lazy, plain):
        change(a)
    assert type(lazy) is LogProbs and lazy.top(3) is None
    assert lazy[5].item() == plain[5].item()
    np.testing.assert_array_equal(np.array(lazy), np.array(plain))


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("temp", [0.0, 1.0])
def test_generations_have_them(untied_folder, exact, temp):
    """Streams, batches, and speculative decoding."""
    model, tokenizer = load(untied_folder, exact=exact)
    patch_decoding()
    prompt = tokenizer.encode(PROMPT)
    sampler = make_sampler(temp)
    responses = [*mlx_lm.stream_generate(model, tokenizer, prompt, 9, sampler=sampler)]
    if not exact:
        drafting = {"draft_model": model, "num_draft_tokens": 3, "sampler": sampler}
        responses += mlx_lm.stream_generate(model, tokenizer, prompt, 9, **drafting)
    batch = mlx_lm.generate.__globals__["BatchGenerator"](model)
    batch.insert([prompt, prompt[:7]], [5, 9], samplers=[sampler, make_sampler(0.7)])
    while made := batch.next_generated():
        responses += made
    batch.close()
    assert len(responses) == (32 if not exact else 23)
    for r in responses:
        assert type(r.logprobs) is LogProbs
        one = r.logprobs[r.token].item()
        assert "LogSumExp" in pending(r.logprobs) or "Gather" in pending(r.logprobs)
        assert one == pytest.approx(np.array(r.logprobs)[r.token], abs=2e-5)


def test_the_stand_ins_logits_cost_nothing():
    """What mlx-lm does to logits makes no array that has to be computed."""
    stood = _Unread()
    logits = stood[:, -1, :]
    found = logits - mx.logsumexp(logits, keepdims=True)
    assert found.squeeze(0) is stood and "->" not in pending(found)
