"""mlx-lm's own functions on a FlashHead that is probed as usual or wholly, against
stock mlx-lm with the dense head of the same rows."""

from __future__ import annotations

import importlib
import io
import json
import sys
import types

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import small_models
from mlx.utils import tree_flatten
from mlx_flashhead.convert import convert
from mlx_lm import perplexity, utils
from mlx_lm.models import cache as caches
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from mlx_lm.tuner.utils import linear_to_lora_layers
from versions import OLD_MLX_LM

from mlx_flashhead import (
    FlashHead,
    acceptance,
    flash_heads,
    load,
    patch,
    patched,
    unpatch,
)
from mlx_flashhead.head import flash_head
from mlx_flashhead.integration import masking, tuner
from mlx_flashhead.integration.slots import intercepted

generate = importlib.import_module("mlx_lm.generate")
STOCK = [
    generate.generate_step,
    generate.speculative_generate_step,
    generate.GenerationBatch._step,
    utils.load_model,
    utils.load_adapters,
]
EVAL_PPL = perplexity.eval_ppl
PROMPT = "The quick brown fox"
PROMPTS = ["A", "Three dogs and a cat", "1, 2, 3", "To be or not to be, that", "%"]
KINDS = ["tied_folder", "untied_folder"]


def now() -> list:
    return [
        generate.generate_step,
        generate.speculative_generate_step,
        generate.GenerationBatch._step,
        utils.load_model,
        utils.load_adapters,
    ]


@pytest.fixture
def retrieving(monkeypatch):
    """The rule for the cheaper way would take the dense head where all is probed."""
    for module in (flash_head, tuner):
        monkeypatch.setattr(module, "prefers_dense", lambda *_: False)


@pytest.fixture
def counted(monkeypatch):
    """How often candidates were drawn, and the sizes of the batches."""
    sizes, draw = [], masking.draw

    def counting(head, settings, h, *args):
        sizes.append(len(h))
        return draw(head, settings, h, *args)

    monkeypatch.setattr(masking, "draw", counting)
    return sizes


class Dense(FlashHead):
    """The rows of a FlashHead, all of them."""

    def __call__(self, x):
        return self.dense(x).astype(x.dtype)


def dense(folder):
    """The model with the dense head of the FlashHead's rows, and stock mlx-lm."""
    model, tokenizer = load(folder, exact=False)
    unpatch()
    head = next(flash_heads(model))
    head.__class__ = Dense
    return model, tokenizer


def flash(folder, n_probes=126):
    return load(folder, n_probes=n_probes, exact=False)


def tokens_of(model, tokenizer, prompt=PROMPT, n=12, **options):
    stream = mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=n, **options)
    return [response.token for response in stream]


# ---------------------------------------------------------------------------
# One text
# ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_texts_are_the_dense_heads(request, kind, retrieving, counted):
    folder = request.getfixturevalue(kind)
    model, tokenizer = dense(folder)
    wanted = tokens_of(model, tokenizer)
    text = mlx_lm.generate(model, tokenizer, PROMPT, max_tokens=12)
    model, tokenizer = flash(folder)
    assert tokens_of(model, tokenizer) == wanted and len(counted) >= 12
    assert mlx_lm.generate(model, tokenizer, PROMPT, max_tokens=12) == text
    prompt = mx.array(tokenizer.encode(PROMPT))
    steps = generate.generate_step(prompt, model, max_tokens=12)
    assert [token for token, _ in steps] == wanted
    short = generate.generate_step(prompt, model, max_tokens=12, prefill_step_size=1)
    assert [token for token, _ in short] == wanted


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory):
    """Heads of 32 numbers, which caches can be quantized by."""
    folder = tmp_path_factory.mktemp("wide")
    source = small_models.write("qwen3", folder / "source", 603, head_dim=32)
    convert(str(source), folder / "made", cluster_size=8, verbose=False)
    return folder / "made"


CACHES = [
    {"max_kv_size": 16},
    {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 0},
    {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 22},
    {"prefill_step_size": 4},
]


@pytest.mark.parametrize("options", CACHES, ids=str)
def test_caches_of_all_kinds(wide_folder, retrieving, counted, options):
    n = {"n": 24} | options
    wanted = tokens_of(*dense(wide_folder), **n)
    assert tokens_of(*flash(wide_folder, 76), **n) == wanted
    assert len(counted) >= 24


def test_a_prompt_cache_goes_on(untied_folder, retrieving):
    texts = []
    for make in (dense, flash):
        model, tokenizer = make(untied_folder)
        kept = caches.make_prompt_cache(model)
        first = tokens_of(model, tokenizer, prompt_cache=kept)
        second = tokens_of(model, tokenizer, " jumps", prompt_cache=kept)
        texts.append((first, second, kept[0].offset))
    assert texts[0] == texts[1]


PROCESSORS = [
    {"logit_bias": {5: 3.0, 700: 100.0}},
    {"logit_bias": dict.fromkeys(range(0, 1003, 3), -100.0)},
    {"repetition_penalty": 1.5},
    {"presence_penalty": 2.0, "presence_context_size": 5},
    {"frequency_penalty": 1.0},
    {"logit_bias": {65: 2.0}, "repetition_penalty": 1.2, "frequency_penalty": 0.5},
]


@pytest.mark.parametrize("given", PROCESSORS, ids=lambda g: "+".join(g))
def test_logits_processors(untied_folder, retrieving, counted, given):
    def options():
        return {"n": 24, "logits_processors": make_logits_processors(**given)}

    wanted = tokens_of(*dense(untied_folder), **options())
    assert tokens_of(*flash(untied_folder), **options()) == wanted
    assert len(counted) >= 24


@pytest.mark.parametrize("n_probes", [90, 126])
def test_a_users_sampler_and_processor_see_the_vocabulary(untied_folder, n_probes):
    seen = []

    def sampler(x):
        seen.append(x)
        return mx.argmin(x, axis=-1)

    def processor(tokens, logits):
        seen.append(logits)
        return logits.at[:, 70].add(mx.array(3.0))

    model, tokenizer = flash(untied_folder, n_probes)
    written = tokens_of(
        model, tokenizer, n=6, sampler=sampler, logits_processors=[processor]
    )
    assert {x.shape for x in seen} == {(1, 1003)}
    assert abs(mx.logsumexp(seen[-1]).item()) < 1e-4
    unpatch()
    again = tokens_of(
        model, tokenizer, n=6, sampler=sampler, logits_processors=[processor]
    )
    assert written == again and len(set(written)) > 1


def test_one_own_processor_beside_mlx_lms(untied_folder, retrieving):
    given = [lambda t, x: x - 2 * (mx.arange(1003) % 2)]
    given += make_logits_processors({5: 1.0}, repetition_penalty=1.4)
    wanted = tokens_of(*dense(untied_folder), logits_processors=given)
    assert tokens_of(*flash(untied_folder), logits_processors=given) == wanted


# ---------------------------------------------------------------------------
# Log-probabilities
# ---------------------------------------------------------------------------


@pytest.mark.parametrize("temp", [0.0, 1.0])
def test_logprobs_are_the_vocabularys(untied_folder, temp):
    model, tokenizer = flash(untied_folder, 90)
    head = next(flash_heads(model))
    prompt = tokenizer.encode(PROMPT)
    text = list(prompt)
    steps = generate.generate_step(
        mx.array(prompt), model, max_tokens=8, sampler=make_sampler(temp)
    )
    for token, found in steps:
        assert found.shape == (1003,)
        assert abs(mx.logsumexp(found).item()) < 1e-4
        h = model.model(mx.array([text]))[0, -1:]
        logits = np.array(head.dense(h))[0].astype(np.float64)
        # Both are scored: their difference is exact.
        scored = head.candidates(h)
        best = scored.ids[0, mx.argmax(scored.logits[0]).item()].item()
        difference = found[token].item() - found[best].item()
        assert difference == pytest.approx(logits[token] - logits[best], abs=1e-3)
        assert temp or token == best  # an estimate elsewhere may be larger
        text.append(token)


def pending(array) -> str:
    """The graph that is still to be computed for an array."""
    sink = io.StringIO()
    mx.export_to_dot(sink, array)
    return sink.getvalue()


def test_logprobs_that_nobody_reads_are_not_computed(untied_folder):
    model, tokenizer = flash(untied_folder, 90)
    prompt = tokenizer.encode(PROMPT)
    lazy = [
        found
        for _, found in generate.generate_step(mx.array(prompt), model, max_tokens=3)
    ]
    batch = generate.BatchGenerator(model)
    batch.insert([prompt, prompt], [3, 3], samplers=[None, make_sampler(1.0)])
    while responses := batch.next_generated():
        lazy += [r.logprobs for r in responses]
    batch.close()
    assert len(lazy) == 9
    for found in lazy:
        assert "LogSumExp" in pending(found)
        # What they follow from is there: no step of the model is kept waiting.
        assert "Softmax" not in pending(found) and "RoPE" not in pending(found)
        mx.eval(found)
        assert "LogSumExp" not in pending(found)


# ---------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------


def test_batches_with_rows_that_come_and_go(untied_folder, retrieving, counted):
    folder = untied_folder
    texts = []
    options = dict.fromkeys(("return_token_ids", "return_logprobs"), True)
    if OLD_MLX_LM:
        options = {}  # it returns the texts alone
    for make in (dense, flash):
        model, tokenizer = make(folder)
        made = mlx_lm.batch_generate(
            model,
            tokenizer,
            [tokenizer.encode(p) for p in PROMPTS],
            max_tokens=[3, 9, 1, 6, 12],
            completion_batch_size=2,
            prefill_batch_size=2,
            **options,
        )
        texts.append(made)
    assert texts[0].texts == texts[1].texts
    if options:
        assert texts[0].token_ids == texts[1].token_ids
    for a, b in zip(*(t.logprobs for t in texts if options)):
        np.testing.assert_allclose(a, b, atol=1e-3)
    assert {1, 2} <= set(counted)


@pytest.mark.parametrize("n_probes", [40, 126])
def test_a_greedy_row_beside_others_is_as_alone(untied_folder, retrieving, n_probes):
    model, tokenizer = flash(untied_folder, n_probes)
    prompts = [tokenizer.encode(p) for p in PROMPTS]
    samplers = [
        make_sampler(),
        make_sampler(1.0, top_p=0.9),
        None,
        lambda x: mx.argmax(x, axis=-1),
        make_sampler(),
    ]
    processors = [None, None, make_logits_processors({300: 100.0}), None, None]
    processors[4] = make_logits_processors(repetition_penalty=1.3)
    batch = generate.BatchGenerator(model)
    uids = batch.insert(
        prompts, [10] * 5, samplers=samplers, logits_processors=processors
    )
    made = {uid: [] for uid in uids}
    while responses := batch.next_generated():
        for r in responses:
            made[r.uid].append(r.token)
            assert r.logprobs.shape == (1003,)
            assert abs(mx.logsumexp(r.logprobs).item()) < 1e-4
    batch.close()
    for i, (sampler, given) in enumerate(zip(samplers, processors)):
        if i != 1:
            options = {"sampler": sampler, "logits_processors": given, "n": 10}
            assert made[uids[i]] == tokens_of(model, tokenizer, prompts[i], **options)
    assert set(made[uids[2]]) == {300}


def test_seeds_reproduce_batches_and_texts(untied_folder):
    model, tokenizer = flash(untied_folder, 40)
    prompts = [tokenizer.encode(p) for p in PROMPTS]
    sampler = make_sampler(1.0)
    made = []
    for seed in (1, 1, 2):
        mx.random.seed(seed)
        texts = mlx_lm.batch_generate(
            model, tokenizer, prompts, max_tokens=6, sampler=sampler
        ).texts
        made.append((texts, tokens_of(model, tokenizer, sampler=sampler)))
    assert made[0] == made[1] != made[2]
    assert len(set(made[0][0])) == 5


def test_rows_of_equal_prompts_differ(untied_folder):
    model, tokenizer = flash(untied_folder, 40)
    prompts = [tokenizer.encode(PROMPT)] * 4
    texts = mlx_lm.batch_generate(
        model, tokenizer, prompts, max_tokens=8, sampler=make_sampler(1.0)
    ).texts
    assert len(set(texts)) == 4


# ---------------------------------------------------------------------------
# Speculative decoding
# ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "where, num_draft_tokens", [("draft", 3), ("target", 1), ("both", 3)]
)
def test_drafts_change_nothing_but_speed(
    untied_folder, untied_source, retrieving, where, num_draft_tokens
):
    plain, tokenizer = mlx_lm.load(str(untied_source))
    target = flash(untied_folder)[0] if where != "draft" else plain
    draft = flash(untied_folder, 60)[0] if where != "target" else plain
    patch(exact=False)
    wanted = tokens_of(target, tokenizer, n=20)
    options = {"draft_model": draft, "num_draft_tokens": num_draft_tokens}
    with acceptance() as drafts:
        responses = list(
            mlx_lm.stream_generate(target, tokenizer, PROMPT, max_tokens=20, **options)
        )
    assert [r.token for r in responses] == wanted
    yielded = sum(r.from_draft for r in responses[:-1])
    assert yielded <= drafts.accepted <= yielded + 1
    assert 0.3 < drafts.rate <= 1 and drafts.proposed >= drafts.accepted
    for r in responses:
        assert r.logprobs.shape == (1003,)
        assert abs(mx.logsumexp(r.logprobs).item()) < 1e-4
        assert mx.argmax(r.logprobs).item() == r.token


def test_a_draft_of_itself_is_always_right(untied_folder, retrieving):
    model, tokenizer = flash(untied_folder)
    with acceptance() as drafts:
        tokens_of(model, tokenizer, draft_model=model, n=13)
    assert drafts.rate == 1
    other, _ = small_models.build("llama", 1003, seed=9, tie_word_embeddings=False)
    with acceptance() as drafts:
        tokens_of(model, tokenizer, draft_model=other, n=13)
    assert drafts.rate < 0.3


def test_drafts_with_processors_and_samplers(untied_folder, retrieving):
    model, tokenizer = flash(untied_folder)
    draft, _ = flash(untied_folder, 60)
    given = {"logits_processors": make_logits_processors({300: 4.0}, 1.3)}
    wanted = tokens_of(model, tokenizer, **given)
    assert tokens_of(model, tokenizer, draft_model=draft, **given) == wanted
    own = {"sampler": lambda x: mx.argmax(x, axis=-1)}
    wanted = tokens_of(model, tokenizer)
    assert tokens_of(model, tokenizer, draft_model=draft, **own) == wanted
    made = []
    for _ in range(2):
        mx.random.seed(3)
        sampler = make_sampler(1.0, top_p=0.9)
        made.append(tokens_of(model, tokenizer, draft_model=draft, sampler=sampler))
    assert made[0] == made[1] and len(made[0]) == 12


@pytest.mark.parametrize("stop_after", [1, 2, 4])
def test_a_draft_that_is_closed_early_rewinds_its_caches(
    untied_folder, retrieving, stop_after
):
    offsets = []
    for make in (dense, flash):
        model, tokenizer = make(untied_folder)
        kept = caches.make_prompt_cache(model) + caches.make_prompt_cache(model)
        steps = generate.speculative_generate_step(
            mx.array(tokenizer.encode(PROMPT)),
            model,
            model,
            num_draft_tokens=3,
            max_tokens=20,
            prompt_cache=kept,
        )
        for _ in range(stop_after):
            next(steps)
        steps.close()
        offsets.append([c.offset for c in kept])
    assert offsets[0] == offsets[1]


# ---------------------------------------------------------------------------
# The patch
# ---------------------------------------------------------------------------


def test_models_without_a_flash_head_are_mlx_lms(untied_source):
    model, tokenizer = mlx_lm.load(str(untied_source))
    prompts = [tokenizer.encode(p) for p in PROMPTS]

    def everything():
        made = []
        for sampler in (None, make_sampler(0.9, top_p=0.9, min_p=0.01)):
            mx.random.seed(5)
            made.append(tokens_of(model, tokenizer, sampler=sampler))
            made.append(tokens_of(model, tokenizer, sampler=sampler, draft_model=model))
            made.append(
                mlx_lm.batch_generate(
                    model, tokenizer, prompts, max_tokens=5, sampler=sampler
                ).texts
            )
        return made

    wanted = everything()
    patch(exact=False)
    assert everything() == wanted


def test_what_was_imported_before_the_patch_is_patched(untied_folder, counted):
    from mlx_lm import batch_generate, stream_generate

    patch(n_probes=40, exact=False)
    model, tokenizer = mlx_lm.load(str(untied_folder))
    list(stream_generate(model, tokenizer, PROMPT, max_tokens=3))
    n = len(counted)
    assert n >= 3
    batch_generate(model, tokenizer, [[65], [66, 67]], max_tokens=3)
    assert len(counted) > n


def test_unpatched_models_still_write(untied_folder):
    """On stock mlx-lm: the same choices, from logits over the vocabulary."""
    model, tokenizer = flash(untied_folder, 90)
    wanted = tokens_of(model, tokenizer)
    unpatch()
    assert now() == STOCK
    assert tokens_of(model, tokenizer) == wanted


def test_nesting_restores_mlx_lms_functions(untied_folder):
    with patched(exact=False):
        inside = now()
        assert all(a is not b for a, b in zip(inside, STOCK))
        with patched(dense=True):
            pass
        assert all(a is not b for a, b in zip(now(), STOCK))
    assert now() == STOCK
    load(untied_folder, exact=False)
    assert now()[:3] != STOCK[:3] and now()[3:] == STOCK[3:]
    with patched(exact=False):
        pass
    assert now()[:3] != STOCK[:3] and now()[3:] == STOCK[3:]
    unpatch()
    assert now() == STOCK


def test_the_environment_switches_it_off(untied_folder, monkeypatch, counted):
    wanted = tokens_of(*mlx_lm.load(str(untied_folder)))
    monkeypatch.setenv("MLX_FLASHHEAD", "0")
    patch(n_probes=20, exact=False)
    assert tokens_of(*mlx_lm.load(str(untied_folder))) == wanted
    assert counted == []


# ---------------------------------------------------------------------------
# Adapters
# ---------------------------------------------------------------------------


def adapter(folder, source, keys=None, kind="lora"):
    """A LoRA adapter of random weights, made by mlx-lm's tuner."""
    model, _ = mlx_lm.load(str(source))
    settings = {"rank": 4, "scale": 8.0, "dropout": 0.0}
    if keys:
        settings["keys"] = keys
    model.freeze()
    linear_to_lora_layers(model, 2, settings, use_dora=kind == "dora")
    rng = np.random.default_rng(0)
    weights = {
        name: mx.array(0.1 * rng.standard_normal(value.shape).astype(np.float32))
        for name, value in tree_flatten(model.trainable_parameters())
    }
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    config = {"fine_tune_type": kind, "num_layers": 2, "lora_parameters": settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_adapter_of_the_layers(
    untied_folder, untied_source, tmp_path, kind, retrieving
):
    path = str(adapter(tmp_path / "adapter", untied_source, kind=kind))
    model, tokenizer = load(untied_folder, adapter_path=path, exact=False)
    unpatch()
    plain = tokens_of(*dense(untied_folder))
    head = next(flash_heads(model))
    with intercepted(head, lambda x: head.dense(x)):
        wanted = tokens_of(model, tokenizer)
    patch(n_probes=126, exact=False)
    found = tokens_of(*mlx_lm.load(str(untied_folder), adapter_path=path))
    assert found == wanted != plain


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_an_adapter_of_the_head_is_refused(request, tmp_path, kind):
    source, folder = (
        request.getfixturevalue(f"{kind}_{what}") for what in ("source", "folder")
    )
    head = "lm_head" if kind == "untied" else "model.embed_tokens"
    path = str(adapter(tmp_path / "adapter", source, ["self_attn.q_proj", head]))
    with pytest.raises(ValueError, match=f"adapter.*{head}.*dense") as error:
        load(folder, adapter_path=path)
    assert "\n" not in str(error.value)
    # With the dense head it is mlx-lm's business.
    assert load(folder, adapter_path=path, dense=True)
    unpatch()
    assert now() == STOCK


def test_a_flash_head_is_not_saved_as_if_it_were_plain(untied_folder, tmp_path):
    """mlx_lm.convert and mlx_lm.fuse would write a folder that nothing can load."""
    patch(exact=False)
    with pytest.raises(ValueError, match="cannot be saved.*dense"):
        mlx_lm.convert(str(untied_folder), str(tmp_path / "made"), quantize=True)
    patch(dense=True)
    mlx_lm.convert(str(untied_folder), str(tmp_path / "dense"), quantize=True)
    unpatch()
    assert tokens_of(*mlx_lm.load(str(tmp_path / "dense")))


# ---------------------------------------------------------------------------
# Scores
# ---------------------------------------------------------------------------


@pytest.mark.parametrize("length", [2, 9])
def test_perplexity_is_the_dense_heads(untied_folder, length):
    data = mx.array(np.random.default_rng(0).integers(0, 256, (24, length)))
    wanted = perplexity.eval_ppl(dense(untied_folder)[0], data)
    patch(n_probes=60, exact=False)
    model, _ = mlx_lm.load(str(untied_folder))
    assert perplexity.eval_ppl(model, data) == pytest.approx(wanted, rel=1e-4)
    unpatch()
    assert perplexity.eval_ppl is EVAL_PPL


@pytest.fixture
def evaluate(monkeypatch):
    """mlx_lm.evaluate, which imports a package that is large."""

    class LM:
        pass

    names = {
        "lm_eval": {},
        "lm_eval.api": {},
        "lm_eval.api.model": {"LM": LM},
        "lm_eval.api.registry": {"register_model": lambda name: lambda cls: cls},
    }
    for name, content in names.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "mlx_lm.evaluate", raising=False)
    yield importlib.import_module("mlx_lm.evaluate")
    sys.modules.pop("mlx_lm.evaluate", None)


def test_evaluate_scores_with_the_dense_head(untied_folder, evaluate):
    requests = [
        types.SimpleNamespace(args=("The quick", " brown fox")),
        types.SimpleNamespace(args=("The quick", "!")),  # one token
        types.SimpleNamespace(args=("A", "bc")),  # a prompt of one
    ]
    rolling = [types.SimpleNamespace(args=(text,)) for text in ("ab", "Hello, you")]

    patch(n_probes=60, exact=False)
    model = evaluate.MLXLM(str(untied_folder), use_chat_template=False)
    head = next(flash_heads(model._model))
    found = model.loglikelihood(requests), model.loglikelihood_rolling(rolling)
    with intercepted(head, lambda x: head.dense(x)):
        wanted = model.loglikelihood(requests), model.loglikelihood_rolling(rolling)
    for (a, greedy_a), (b, greedy_b) in zip(found[0], wanted[0]):
        assert a == pytest.approx(b, abs=1e-4) and greedy_a == greedy_b
    np.testing.assert_allclose(found[1], wanted[1], atol=1e-4)
    options = {"until": ["\n"], "max_gen_toks": 5}
    (text,) = model.generate_until([types.SimpleNamespace(args=(PROMPT, options))])
    assert text
    method = evaluate.MLXLM._score_fn
    unpatch()
    assert evaluate.MLXLM._score_fn is not method


# ---------------------------------------------------------------------------
# Models that do something after their heads
# ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gemma2", "cohere", "granite-tied"])
def test_models_with_caps_and_scales(tmp_path, name, retrieving, counted):
    source = small_models.write(name, tmp_path / "source", 603)
    convert(str(source), tmp_path / "made", cluster_size=8, n_probes=60, verbose=False)
    sampler = make_sampler(1.0, top_p=0.99)
    wanted = tokens_of(*dense(tmp_path / "made"))
    model, tokenizer = flash(tmp_path / "made", 76)
    assert not next(flash_heads(model)).transform.identity
    assert tokens_of(model, tokenizer) == wanted
    steps = generate.generate_step(
        mx.array([65]), model, max_tokens=60, sampler=sampler
    )
    assert max(token for token, _ in steps) < 603 and len(counted) >= 72
