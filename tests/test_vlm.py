"""mlx-vlm: models that see, with an image in the prompt, beside their own decoding."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from types import SimpleNamespace

import mlx.core as mx
import mlx_vlm
import numpy as np
import pytest
import small_vlms
from mlx.utils import tree_flatten
from mlx_flashhead.convert import convert
from small_models import EOS
from test_server import environment, run, serving

from mlx_flashhead import (
    FlashHead,
    attach,
    detach,
    flash_heads,
    load,
    patch,
    unpatch,
)
from mlx_flashhead.integration.exact import verification
from mlx_flashhead.integration.locate import (
    find_head,
    flash_slots,
    resolve_path,
    slot_of,
)
from mlx_flashhead.integration.tuner import Tuner, tuner_of
from mlx_flashhead.run import run as run_here
from mlx_flashhead.sampling import Settings, Tempered, coupled
from mlx_flashhead.tuning import Cell

# The package has functions of some of these names.
ar = importlib.import_module("mlx_vlm.generate.ar")
common = importlib.import_module("mlx_vlm.generate.common")
dispatch = importlib.import_module("mlx_vlm.generate.dispatch")
sample_utils = importlib.import_module("mlx_vlm.sample_utils")
utils = importlib.import_module("mlx_vlm.utils")

CLUSTERS = 126
HEADS = {
    "gemma3": "language_model.lm_head",
    "qwen3_vl": "language_model.model.embed_tokens",
    "lfm2-vl": "language_model.model.embed_tokens",
    "qwen3_5": "language_model.lm_head",
}
FULL_ONLY = {"qwen3_5"}


class Folders(dict):
    """Source and converted folder of each, made when they are asked for."""

    def __init__(self, factory):
        self.factory = factory

    def __missing__(self, name):
        folder = self.factory.mktemp(name)
        source = small_vlms.write(name, folder / "source")
        sizes = {"cluster_size": 8, "n_probes": 30}
        convert(str(source), folder / "flash", verbose=False, **sizes)
        return self.setdefault(name, (source, folder / "flash"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return Folders(tmp_path_factory)


def models(quick):
    """Parameters: those that only the full suite has are marked."""
    mark = pytest.mark.full
    return [n if n in quick else pytest.param(n, marks=mark) for n in HEADS]


@pytest.fixture(scope="module", params=models(HEADS.keys() - FULL_ONLY))
def vlm(request, folders):
    """Name, plain model and converted folder."""
    source, folder = folders[request.param]
    return request.param, utils.load_model(source), folder


def each(*quick):
    """All models in the full suite, in the quick one only these."""
    return pytest.mark.parametrize("vlm", models(quick), indirect=True)


def load_flash(folder, **options):
    patch(**options)
    return utils.load_model(folder)


def tokens(model, name, n=40, which=0, **options):
    """What ``generate_step`` gives after a prompt with an image."""
    given = small_vlms.prompt(name, which)
    ids, pixels, mask = (given.pop(k) for k in ("input_ids", "pixel_values", "mask"))
    options = {"max_tokens": n, "temperature": 0.0} | given | options
    return [t for t, _ in dispatch.generate_step(ids, model, pixels, mask, **options)]


# ---------------------------------------------------------------------------
# Folders
# ---------------------------------------------------------------------------


def test_the_head_is_found_and_the_rest_untouched(vlm):
    name, plain, folder = vlm
    assert find_head(plain) == HEADS[name]
    for path in ("language_model.model.embed_tokens", "model.embed_tokens"):
        assert resolve_path(plain, path) == HEADS[name]
    model = load_flash(folder)
    (head,) = {id(head): head for head in flash_heads(model)}.values()
    # One table for embeddings and head, as in mlx-lm.
    table = plain.language_model.model.embed_tokens
    ids = mx.array([[0, 5, 1002]])
    assert (model.language_model.model.embed_tokens(ids) == table(ids)).all()
    assert mx.allclose(head.dense(table.weight[:1]), table.as_linear(table.weight[:1]))
    own = dict(tree_flatten(plain.parameters()))
    left = dict(tree_flatten(model.parameters()))
    seen = [k for k in own if not k.startswith("language_model")]
    assert len(seen) > 20 and all((own[k] == left[k]).all() for k in seen)


def test_converting_keeps_the_files(folders):
    source, folder = folders["qwen3_vl"]
    for file in ("model.safetensors", "preprocessor_config.json", "tokenizer.json"):
        assert (source / file).read_bytes() == (folder / file).read_bytes()
    config = json.loads((folder / "config.json").read_text())
    assert "flashhead" in config and "vision_config" in config
    # Stock mlx-vlm has the plain model of it, mlx-lm its text.
    stock = utils.load_model(folder)
    assert not list(flash_heads(stock))
    given = mx.array([[5, 6, 7]])
    text, _ = load(folder, dense=True)
    assert mx.allclose(text(given), stock(given).logits, atol=1e-4)


@pytest.mark.full
def test_with_other_bits_the_folder_is_the_text_model(folders, tmp_path):
    source, _ = folders["gemma3"]
    convert(str(source), tmp_path / "q", quantize=True, n_probes=10, verbose=False)
    assert (
        "vision_tower" not in (tmp_path / "q/model.safetensors.index.json").read_text()
    )
    model, _ = load(tmp_path / "q")
    assert list(flash_slots(model))


def test_a_changed_folder_is_refused(folders, tmp_path):
    source, folder = folders["qwen3_vl"]
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    other = dict(mx.load(str(source / "model.safetensors")))
    other["language_model.model.norm.weight"] = mx.zeros(64)
    mx.save_safetensors(str(tmp_path / "model.safetensors"), other)
    with pytest.raises(ValueError, match="model.safetensors is not what was converted"):
        load_flash(tmp_path)


@each("gemma3")
def test_a_sidecar_and_attach(vlm, folders, tmp_path):
    """With a model that stays as it is."""
    name, plain, _ = vlm
    source, _ = folders[name]
    sizes = {"cluster_size": 8, "n_probes": 30, "verbose": False}
    convert(str(source), sidecar=tmp_path / "a.safetensors", **sizes)
    patch(flashhead=tmp_path / "a.safetensors")
    model = utils.load_model(source)
    with verification() as count:
        assert tokens(model, name) == tokens(plain, name)
    assert count.accepted > 20
    unpatch()
    model = utils.load_model(source)
    attach(model, tmp_path / "a.safetensors", exact=True)
    assert tokens(model, name, 12) == tokens(plain, name, 12)
    patch()
    with verification() as count:
        assert tokens(model, name) == tokens(plain, name)
    assert count.accepted > 20
    detach(model)
    unpatch()
    own = dict(tree_flatten(plain.parameters()))
    again = dict(tree_flatten(model.parameters()))
    assert own.keys() == again.keys() and all((own[k] == again[k]).all() for k in own)


# ---------------------------------------------------------------------------
# One sequence
# ---------------------------------------------------------------------------


def test_exact_tokens_are_the_dense_head_s(vlm):
    name, plain, folder = vlm
    model = load_flash(folder)
    with verification() as count:
        # Beyond Gemma's window of 24 tokens, in pieces and at once.
        assert tokens(model, name, 50) == tokens(plain, name, 50)
        whole = {"which": 1, "prefill_step_size": None}
        assert tokens(model, name, 30, **whole) == tokens(plain, name, 30, which=1)
    assert count.accepted > 50 and count.waste < 0.6
    biased = {"repetition_penalty": 1.4, "logit_bias": {7: 4.0, 9: -3.0}}
    assert tokens(model, name, **biased) == tokens(plain, name, **biased)


@each("lfm2-vl")
def test_exact_tokens_are_those_of_other_samplers(vlm):
    """Settings of mlx-vlm's that have no candidates, and one of the user's own."""
    name, plain, folder = vlm
    model = load_flash(folder)
    for options in (
        {"temperature": 0.8, "p_less": True},
        {"sampler": lambda x: mx.random.categorical(x * 1.2)},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 5},
    ):
        mx.random.seed(4)
        found = tokens(model, name, **options)
        mx.random.seed(4)
        assert found == tokens(plain, name, **options)


@each("qwen3_vl")
def test_what_is_left_to_mlx_vlm(vlm):
    name, plain, folder = vlm
    model = load_flash(folder)
    quantized = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 30}
    if name == "qwen3_vl":  # mlx-vlm does not quantize the others' caches
        with pytest.MonkeyPatch.context() as context, verification() as count:
            # Heads of 16 numbers are too narrow for it.
            context.setattr(common.cache.KVCache, "to_quantized", lambda c, **_: c)
            assert tokens(model, name, **quantized) == tokens(plain, name, **quantized)
        assert count.steps == 0

    class Budget:
        def __init__(self):
            self.n = 0

        def pop_forced_token_id(self):
            self.n += 1
            return 65 if self.n in (5, 6, 17) else None

    with verification() as count:
        found = tokens(model, name, thinking_budget_criteria=Budget())
    assert found == tokens(plain, name, thinking_budget_criteria=Budget())
    assert found.count(65) >= 3 and count.steps == 0


@each("gemma3")
def test_seeds_draw_the_same_for_any_draft(vlm):
    name, _, folder = vlm
    found = []
    for draft in ({}, {"n_probes": 90, "verify_every": 5}):
        model = load_flash(folder, **draft)
        options = [{"seed": 3}, {"seed": 4}, {"seed": 3, "top_p": 0.8}]
        found.append([tokens(model, name, 24, temperature=0.8, **o) for o in options])
        mx.random.seed(1)
        found[-1].append(tokens(model, name, 24, temperature=0.8, top_p=0.9))
    assert found[0] == found[1]
    assert len(set(map(tuple, found[0]))) == 4


@each("lfm2-vl")
def test_approximate(vlm):
    name, plain, folder = vlm
    # All clusters but one, and on a CPU the dense product for all, in 8 bits.
    some = load_flash(folder, exact=False, n_probes=CLUSTERS - 1)
    every = load_flash(folder, exact=False, n_probes=CLUSTERS)
    for options in ({}, {"repetition_penalty": 1.4}):
        assert tokens(some, name, 24, **options) == tokens(every, name, 24, **options)
    model = load_flash(folder, exact=False, n_probes=30)
    few = tokens(model, name)
    assert len(few) == 40 and few != tokens(plain, name)
    drawn = [tokens(model, name, temperature=0.8, seed=seed) for seed in (3, 3, 4)]
    assert drawn[0] == drawn[1] != drawn[2]
    # Its filters are another's: whole-vocabulary logits.
    options = {"temperature": 0.8, "seed": 3, "top_p": 0.8}
    assert len(tokens(model, name, **options)) == 40


def test_dense_and_switched_off(folders, monkeypatch):
    source, folder = folders["gemma3"]
    wanted = tokens(utils.load_model(source), "gemma3")
    for options in ({"dense": True}, {}):
        if not options:
            monkeypatch.setenv("MLX_FLASHHEAD", "0")
        model = load_flash(folder, **options)
        assert not list(flash_heads(model))
        assert tokens(model, "gemma3") == wanted


def test_leaving_early_leaves_the_cache_of_the_steps_taken(vlm):
    name, plain, folder = vlm
    model = load_flash(folder, n_probes=100)
    ends = []
    for one in (plain, model):
        cache = one.language_model.make_cache() if name != "qwen3_vl" else None
        cache = cache or common.cache.make_prompt_cache(one.language_model)
        given = small_vlms.prompt(name)
        ids, pixels, mask = (
            given.pop(k) for k in ("input_ids", "pixel_values", "mask")
        )
        steps = dispatch.generate_step(
            ids, one, pixels, mask, temperature=0.0, prompt_cache=cache, **given
        )
        served = [token for token, _ in islice(steps, 11)]
        steps.close()
        ends.append((served, cache))
    (wanted, before), (found, after) = ends
    assert found == wanted
    for one, other in zip(before, after, strict=True):
        assert type(one) is type(other)
        assert getattr(one, "offset", 0) == getattr(other, "offset", 0)
        states = zip(tree_flatten(one.state), tree_flatten(other.state), strict=True)
        for (_, a), (_, b) in states:
            assert a.shape == b.shape and mx.allclose(a, b, atol=1e-4)


# ---------------------------------------------------------------------------
# Samplers
# ---------------------------------------------------------------------------


def test_filters_at_the_temperature(tied_folder):
    """The distribution is that of mlx-vlm's sampler with a seed."""
    model, _ = load(tied_folder)
    head, n = next(flash_heads(model)), 6000
    logits = mx.random.normal((1, head.vocab_size)) * 1.5
    keys = mx.stack([mx.full((n,), 3), mx.arange(n)], axis=1).astype(mx.uint32)
    ids = head.token_ids.reshape(-1)[: head.vocab_size]
    rows = mx.broadcast_to(logits[:, ids], (n, head.vocab_size))
    drawn = coupled.draw(head, Tempered(0.5, top_p=0.8), rows, keys, head.n_clusters)
    found = np.bincount(np.array(drawn.tokens), minlength=head.vocab_size) / n
    tempered = logits / 0.5
    tempered = tempered - mx.logsumexp(tempered, axis=-1, keepdims=True)
    kept = sample_utils.apply_top_p(tempered, 0.8)
    wanted = np.array(mx.softmax(kept, axis=-1))[0]
    assert 5 < (wanted > 0).sum() < 500 and found[wanted == 0].sum() == 0
    assert np.abs(found - wanted).sum() / 2 < 0.07
    # At temperature 1 it would be another.
    plain = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    other = mx.softmax(sample_utils.apply_top_p(plain, 0.8) / 0.5, axis=-1)
    assert np.abs(np.array(other)[0] - wanted).sum() / 2 > 0.08


# ---------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------


def batch(model, name, requests, sampler=None, apart=3, **options):
    """Tokens and their log-probabilities of several requests, lengths and logits
    processors, that join ``apart`` steps after one another."""
    stop = utils.StoppingCriteria([EOS], None)
    generator = ar.BatchGenerator(
        model.language_model,
        SimpleNamespace(stopping_criteria=stop),
        sampler=sampler,
        **options,
    )
    waiting, made = list(enumerate(requests)), {}
    for i in range(10_000):
        if waiting and i % apart == 0:
            seed, (n, processors) = waiting.pop(0)
            given = small_vlms.prompt(name, seed, n=8 + 3 * seed)
            ids, pixels, mask = (
                given.pop(k) for k in ("input_ids", "pixel_values", "mask")
            )
            seen = model.get_input_embeddings(ids, pixels, mask=mask, **given)
            given |= {k: v for k, v in seen.to_dict().items() if v is not None}
            (uid,) = generator.insert(
                [ids[0].tolist()],
                n,
                prompt_kwargs=[given],
                logits_processors=[processors],
            )
            made[uid] = []
        for response in generator.next()[1]:
            made[response.uid].append(response)
        if not waiting and not generator.has_work:
            break
    generator.close()
    values = list(made.values())
    return [[r.token for r in one] for one in values], values


REQUESTS = [(24, []), (7, []), (15, []), (5, [])]


def test_exact_batches(vlm):
    name, plain, folder = vlm
    model = load_flash(folder)
    penalty = ar.make_logits_processors(repetition_penalty=1.4)
    for requests in (REQUESTS, REQUESTS[:1], [(10, []), (16, penalty)]):
        with verification() as count:
            found, responses = batch(model, name, requests, top_logprobs_k=3)
        wanted, others = batch(plain, name, requests, top_logprobs_k=3)
        assert found == wanted and count.accepted > 1
        for ours, theirs in zip(chain(*responses), chain(*others), strict=True):
            assert ours.token_logprob == pytest.approx(theirs.token_logprob, abs=1e-4)
            assert (ours.top_logprobs is None) == (theirs.top_logprobs is None)
            for one, other in zip(ours.top_logprobs or (), theirs.top_logprobs or ()):
                assert one[0] == other[0] and one[1] == pytest.approx(
                    other[1], abs=1e-4
                )


@each()
def test_sampled_batches(vlm):
    name, plain, folder = vlm

    def sampler(**options):
        options = {"temperature": 0.8, "top_p": 1.0, "seed": 7} | options
        return ar._PositionedTargetSampler(**options)

    model = load_flash(folder)
    # Each for itself, or in company, and with filters at the temperature.
    for options in ({}, {"top_p": 0.8}):
        together, _ = batch(model, name, REQUESTS, sampler(**options))
        alone, _ = batch(model, name, REQUESTS[:1], sampler(**options))
        assert together[0] == alone[0] != batch(plain, name, REQUESTS[:1])[0][0]
    # What cannot be read, or draws in another order, is asked itself.
    own = sampler(top_p=0.8, top_k=30)
    assert batch(model, name, REQUESTS, own)[0] == batch(plain, name, REQUESTS, own)[0]
    model = load_flash(folder, exact=False)
    found = [batch(model, name, REQUESTS, sampler(), top_logprobs_k=2) for _ in "ab"]
    assert found[0][0] == found[1][0]
    assert [len(one) for one in found[0][0]] == [n for n, _ in REQUESTS]
    assert all(r.token_logprob <= 0 for one in found[0][1] for r in one)
    assert batch(model, name, REQUESTS)[0] == batch(model, name, REQUESTS)[0]


# ---------------------------------------------------------------------------
# As fast as it gets
# ---------------------------------------------------------------------------


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    """As users have it."""
    monkeypatch.setenv("MLX_FLASHHEAD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MLX_FLASHHEAD_TUNE")


def test_measuring_changes_no_token(vlm, tuned, capsys):
    """In batches that are at work when it happens, too."""
    name, plain, folder = vlm
    model = load_flash(folder)
    assert tokens(model, name, 24) == tokens(plain, name, 24)
    assert "measured greedy decoding on this device" in capsys.readouterr().err
    tuner, text = tuner_of(slot_of(model)), model.language_model
    assert {"stock", "dense", "draft", "verify"} == {
        c.what for c in tuner.times["greedy"]
    }
    # Some keep the positions of a prompt with images.
    before = {**vars(text), **text}
    tuner.times.clear()
    assert tuner.exact(slot_of(model), text, Settings())
    assert tuner.batches(slot_of(model), text, Settings(), None, [2])
    after = {**vars(text), **text}
    assert before.keys() == after.keys()
    assert all(after[key] is value for key, value in before.items())
    tuner.times.clear()
    assert batch(model, name, REQUESTS)[0] == batch(plain, name, REQUESTS)[0]
    assert tuner.times["greedy"]


@each("qwen3_vl")
def test_exact_tokens_do_not_depend_on_times(vlm, tuned, monkeypatch):
    name, plain, folder = vlm
    wanted, alone = tokens(plain, name, 30), batch(plain, name, REQUESTS[:1])[0]
    monkeypatch.setattr(Tuner, "_measure", lambda *_: None)
    drafted = []
    for dense in (0.01, 1.0):
        model = load_flash(folder)
        draft = slot_of(model).origin.draft
        cells = Cell("draft", draft.n_probes), Cell("verify", draft.verify_every)
        times = dict.fromkeys(
            (Cell("stock", 1), Cell("dense", 1)), dense
        ) | dict.fromkeys(cells, 0.1)
        tuner_of(slot_of(model)).times["greedy"] = times
        with verification() as count:
            assert tokens(model, name, 30) == wanted
            assert batch(model, name, REQUESTS[:1])[0] == alone
        drafted.append(count.drafted)
    assert drafted[0] == 0 < drafted[1]


@pytest.mark.parametrize("wins", [True, False])
@each("gemma3")
def test_approximate_decoding_goes_dense_where_that_is_faster(
    vlm, tuned, monkeypatch, wins
):
    name, _, folder = vlm
    densely = load_flash(folder, exact=False)
    for slot in flash_slots(densely):
        slot.decoding = "dense"
    wanted = tokens(densely, name, 12), batch(densely, name, REQUESTS)[0]
    monkeypatch.setattr(Tuner, "_measure", lambda *_: None)
    model = load_flash(folder, exact=False, n_probes=40)
    times = {Cell("stock", n): 0.1 for n in (1, 2, 4)}
    times |= {Cell("approximate", n): 0.2 if wins else 0.05 for n in (1, 2, 4)}
    for group in ("greedy, p 40", "head-only logits, p 40"):  # those for prompts' ends
        tuner_of(slot_of(model)).times[group] = times
    probed, select = [], FlashHead.select
    monkeypatch.setattr(
        FlashHead, "select", lambda s, *args: probed.append(1) or select(s, *args)
    )
    found = tokens(model, name, 12), batch(model, name, REQUESTS)[0]
    assert bool(probed) != wins
    if wins:
        assert found == wanted


# ---------------------------------------------------------------------------
# Whole programs
# ---------------------------------------------------------------------------

QUESTION = "What is it?"


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("picture") / "a.png"
    small_vlms.picture(path)
    return str(path)


def test_generate_stream_and_go_on(folders, picture):
    made = []
    for folder in folders["qwen3_vl"]:
        patch()
        model, processor = mlx_vlm.load(str(folder))
        prompt = mlx_vlm.apply_chat_template(
            processor, model.config, QUESTION, num_images=1
        )
        whole = mlx_vlm.generate(model, processor, prompt, image=picture, max_tokens=24)
        # Until a token that ends the text; then another turn with the same cache.
        state, texts = common.PromptCacheState(), []
        stop = {"prompt_cache_state": state}
        processor.tokenizer.stopping_criteria.add_eos_token_ids(whole.token_ids[9])
        for more in ("", " And then?"):
            pieces = mlx_vlm.stream_generate(
                model, processor, prompt + more, image=picture, max_tokens=24, **stop
            )
            results = list(pieces)
            texts.append("".join(r.text for r in results))
            texts.append((results[-1].finish_reason, results[-1].cached_tokens))
        both = mlx_vlm.batch_generate(
            model,
            processor,
            images=[picture, picture],
            prompts=[QUESTION, "Why?"],
            max_tokens=16,
        )
        made.append((whole.token_ids, whole.finish_reason, texts, both.texts))
        assert bool(list(flash_heads(model))) == (len(made) == 2)
    assert made[0] == made[1]
    assert made[0][2][1][0] == "stop" and made[0][2][3][1] > 30


def test_the_command(folders, picture):
    source, folder = folders["qwen3_vl"]
    words = ("--prompt", QUESTION, "--image", picture, "--max-tokens", "12")
    done = run("mlx_flashhead.run", "mlx_vlm.generate", "--model", str(folder), *words)
    plain, processor = mlx_vlm.load(str(source))
    prompt = mlx_vlm.apply_chat_template(
        processor, plain.config, QUESTION, num_images=1
    )
    wanted = mlx_vlm.generate(plain, processor, prompt, image=picture, max_tokens=12)
    assert done.stdout.strip() == wanted.text.strip()
    with pytest.raises(ValueError, match="mlx_vlm.nothing is no command of mlx-lm or"):
        run_here("mlx_vlm.nothing", [])


def test_the_server(folders, picture, tmp_path):
    source, folder = (str(path) for path in folders["qwen3_vl"])
    words = ("mlx_flashhead.run", "mlx_vlm.server", "--model", folder)

    def ask(client, model, text=QUESTION, **options):
        image = {"type": "image_url", "image_url": {"url": picture}}
        content = [{"type": "text", "text": text}, image]
        options = {"temperature": 0.0, "max_tokens": 16} | options
        return client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": content}], **options
        )

    def said(answer):
        return answer.choices[0].message.content

    with serving(*words, log=tmp_path / "log") as client:
        alone = said(ask(client, folder))
        pieces = ask(client, folder, stream=True)
        streamed = "".join(
            c.choices[0].delta.content or "" for c in pieces if c.choices
        )
        assert streamed == alone
        seeded = [said(ask(client, folder, temperature=0.8, seed=s)) for s in (1, 1, 2)]
        assert seeded[0] == seeded[1] != seeded[2]
        answer = ask(client, folder, logprobs=True, top_logprobs=2)
        assert len(answer.choices[0].logprobs.content) == 16
        with ThreadPoolExecutor(3) as pool:
            texts = [QUESTION, "Why?", "Who?"]
            together = list(pool.map(lambda t: said(ask(client, folder, t)), texts))
        assert together[0] == alone
        # The same program has the plain model, too.
        assert [said(ask(client, source, t)) for t in texts] == together


def test_the_order_of_imports_does_not_matter(folders, picture):
    """And whoever has mlx-vlm installed does not pay for it."""
    _, folder = folders["gemma3"]
    code = f"""
import importlib, sys
import mlx_flashhead
mlx_flashhead.patch()
assert importlib.util.find_spec("mlx_vlm") and "mlx_vlm" not in sys.modules
from pathlib import Path
from mlx_vlm.utils import load_model
from mlx_vlm.generate.dispatch import generate_step
assert list(mlx_flashhead.flash_heads(load_model(Path({str(folder)!r}))))
# Who has it by its name has the stock one again.
mlx_flashhead.unpatch()
assert not list(mlx_flashhead.flash_heads(load_model(Path({str(folder)!r}))))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_another_version_is_left_alone(monkeypatch, folders):
    stock = utils.load_model
    patch()
    assert utils.load_model is not stock
    unpatch()
    assert utils.load_model is stock and ar.generate_step is dispatch.generate_step

    def other(temperature):
        pass

    monkeypatch.setattr(ar, "make_sampler", other)
    with pytest.warns(
        UserWarning, match="mlx-vlm .* ar.make_sampler has changed; it is"
    ):
        patch()
    assert utils.load_model is stock
    unpatch()
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patch()
