"""attach and detach: FlashHeads in models that are loaded already."""

from __future__ import annotations

import gc
from dataclasses import replace
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
import small_models
from mlx.utils import tree_flatten
from mlx_flashhead.convert import convert
from mlx_lm import utils
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache

from mlx_flashhead import (
    Decoder,
    FlashHead,
    attach,
    detach,
    flash_heads,
    hidden_states,
    load,
    patch_decoding,
    verification,
)
from mlx_flashhead.folder.format import load_head, save_head
from mlx_flashhead.folder.section import HEAD_FILE, read_section
from mlx_flashhead.integration import loading

TOKENS = mx.array([[72, 101, 108, 108, 111]])
KINDS = ["tied", "untied", "packed"]


@pytest.fixture(scope="module")
def packed_source(tmp_path_factory):
    """A tied model in 4 bits, its embedding too."""
    folder = tmp_path_factory.mktemp("packed") / "source"
    quantize = {"group_size": 32, "bits": 4}
    return small_models.write(
        "llama-tied", folder, 1003, dtype="float16", quantize=quantize
    )


@pytest.fixture(scope="module")
def packed_folder(packed_source):
    folder = packed_source.parent / "converted"
    convert(str(packed_source), folder, cluster_size=8, n_probes=90, verbose=False)
    return folder


@pytest.fixture(params=KINDS)
def pair(request):
    """A model that mlx-lm has loaded, and its converted folder."""
    source, folder = (
        request.getfixturevalue(f"{request.param}_{what}")
        for what in ("source", "folder")
    )
    return utils.load_model(source)[0], folder


def snapshot(model: nn.Module) -> tuple[dict, dict]:
    """Its modules, by identity, and the bits of its weights."""
    modules = {path: id(module) for path, module in model.named_modules()}
    weights = {
        name: (str(a.dtype), np.array(mx.contiguous(a).view(mx.uint8)))
        for name, a in tree_flatten(model.parameters())
    }
    return modules, weights


def assert_same(model: nn.Module, before: tuple[dict, dict]) -> None:
    modules, weights = snapshot(model)
    assert modules == before[0]
    assert weights.keys() == before[1].keys()
    for name, (dtype, bits) in weights.items():
        assert dtype == before[1][name][0], name
        assert np.array_equal(bits, before[1][name][1]), name


def test_a_step_reads_a_fraction_of_the_rows_and_a_prompt_all(pair, monkeypatch):
    model, folder = pair
    before = snapshot(model)
    model.set_dtype(mx.float32)
    dense = model(TOKENS)
    model = utils.load_model(folder)[0]
    assert attach(model, folder, n_probes=60) is model
    (head,) = flash_heads(model)
    assert head.n_probes == 60
    assert mx.allclose(model(TOKENS), dense, atol=1e-4)
    probed, score = [], FlashHead.score
    monkeypatch.setattr(
        FlashHead, "score", lambda s, x, p: probed.append(p.shape) or score(s, x, p)
    )
    step = model(TOKENS[:, :1])
    assert probed == [(1, 60)] and step.shape == (1, 1, 1003)
    found, wanted = (np.array(x[0, -1]) for x in (step, dense[:, :1]))
    probes = head.candidates(hidden_states(model, TOKENS[:, :1])[:, -1])[0].reshape(-1)
    ids = np.array(probes)[np.array(probes) < 1003]
    np.testing.assert_allclose(found[ids], wanted[ids], atol=1e-3)
    assert detach(model) is model
    assert {k: d for k, (d, _) in snapshot(model)[1].items()} == {
        k: d for k, (d, _) in before[1].items()
    }


@pytest.mark.parametrize("exact", [False, True])
def test_detached_models_are_as_before(pair, exact):
    model, folder = pair
    before, logits = snapshot(model), model(TOKENS)
    for _ in range(2):
        attach(model, folder, exact=exact)
        assert snapshot(model)[0] != before[0]
        detach(model)
        assert_same(model, before)
    assert mx.array_equal(model(TOKENS), logits)


def test_nothing_is_in_memory_twice(pair):
    model, folder = pair
    model.set_dtype(mx.float32)  # as a CPU computes, so that nothing is cast
    mx.eval(model.parameters())
    plain = sum(a.nbytes for _, a in tree_flatten(model.parameters()))
    gc.collect()
    before = mx.get_active_memory()
    attach(model, folder)
    gc.collect()
    (head,) = flash_heads(model)
    derived = sum(
        a.nbytes
        for name, a in [*tree_flatten(head.parameters()), ("", head.positions)]
        if not name.startswith("rows.")
    )
    rows = sum(a.nbytes for a in head.rows.arrays if a is not None)
    extra = mx.get_active_memory() - before
    assert extra < derived + 0.5 * rows and rows < plain
    detach(model)


def test_exact_texts_are_the_models_own(pair):
    model, folder = pair
    _, tokenizer = load(folder)
    model.set_dtype(mx.float32)
    wanted = mlx_lm.generate(model, tokenizer, "The quick", max_tokens=20)
    attach(model, folder, exact=True)
    assert mlx_lm.generate(model, tokenizer, "The quick", max_tokens=20) == wanted
    patch_decoding()
    assert mlx_lm.generate(model, tokenizer, "The quick", max_tokens=20) == wanted
    # By itself, the model gives the dense head's logits.
    step = model(TOKENS[:, :1])
    detach(model)
    assert mx.allclose(model(TOKENS[:, :1]), step, atol=1e-5)


class Outer(nn.Module):
    """As mlx-vlm's models are: the text model within, and objects that have logits."""

    def __init__(self, language_model):
        super().__init__()
        self.language_model = language_model

    def __call__(self, tokens, cache=None):
        return SimpleNamespace(logits=self.language_model(tokens, cache=cache))


def test_a_model_within_another_that_returns_objects(tied_source, tied_folder):
    model = Outer(utils.load_model(tied_source)[0])
    before = snapshot(model)
    attach(model, tied_folder, n_probes=70)
    assert next(flash_heads(model)).n_probes == 70
    assert model(TOKENS[:, :1]).logits.shape == (1, 1, 1003)
    detach(model)
    assert_same(model, before)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("stored", [False, True])
def test_a_sidecar(tied_source, tied_folder, tmp_path, stored, exact):
    """A file by itself; here that of a folder, and one without rows."""
    model = utils.load_model(tied_source)[0]
    before = snapshot(model)
    file = tied_folder / HEAD_FILE
    if not stored:
        head = load_head(file, read_section(file))
        section = replace(read_section(file), stored_rows=False)
        file = tmp_path / "small.safetensors"
        save_head(file, head, section)
        assert file.stat().st_size < 0.6 * (tied_folder / HEAD_FILE).stat().st_size
    for whole in (model, Outer(model)):
        attach(whole, file, exact=exact)
        found = whole(TOKENS[:, :1])
        detach(whole)
        attach(whole, tied_folder, exact=exact)
        wanted = whole(TOKENS[:, :1])
        detach(whole)
        found, wanted = (getattr(x, "logits", x) for x in (found, wanted))
        assert mx.array_equal(found, wanted)
    assert_same(model, before)


def test_a_module_that_stands_twice(tied_source, tied_folder):
    model = utils.load_model(tied_source)[0]
    model.also = model.model.embed_tokens
    before = snapshot(model)
    attach(model, tied_folder)
    assert model.also is model.model.embed_tokens
    assert Decoder(model).step([1, 2]).tokens.shape == (1,)
    detach(model)
    assert_same(model, before)


def other(model, kind):
    if kind == "rows":
        table = model.model.embed_tokens
        table.weight = mx.where(mx.arange(1003)[:, None] == 5, 1, table.weight)
    elif kind == "vocabulary":
        return small_models.build("llama-tied", 900, dtype="bfloat16")[0]
    elif kind == "size":
        return small_models.build("llama-tied", 1003, hidden_size=96)[0]
    elif kind == "no head":
        return nn.Sequential(nn.Linear(4, 4))
    return model


@pytest.mark.parametrize("kind", ["rows", "vocabulary", "size", "no head"])
def test_other_models_are_refused_and_left_alone(tied_source, tied_folder, kind):
    model = other(utils.load_model(tied_source)[0], kind)
    before = snapshot(model)
    with pytest.raises(ValueError) as error:
        attach(model, tied_folder)
    message = str(error.value)
    assert str(tied_folder) in message and "\n" not in message and "convert" in message
    assert_same(model, before)


def test_refusals(tied_source, tied_folder, tmp_path):
    model = utils.load_model(tied_source)[0]
    before = snapshot(model)
    with pytest.raises(ValueError, match="has no flashhead.safetensors; make one"):
        attach(model, tied_source)
    with pytest.raises(ValueError, match="missing: no such file or folder"):
        attach(model, tmp_path / "missing")
    with pytest.raises(ValueError, match="n_probes must be an integer from 1 to 126"):
        attach(model, tied_folder, n_probes=127)
    with pytest.raises(ValueError, match="no FlashHead that mlx_flashhead.attach"):
        detach(model)
    assert_same(model, before)
    attach(model, tied_folder)
    with pytest.raises(ValueError, match="has a FlashHead already: take it out"):
        attach(model, tied_folder)
    detach(model)
    model, _ = load(tied_folder)
    with pytest.raises(ValueError, match="has a FlashHead already"):
        attach(model, tied_folder)
    with pytest.raises(ValueError, match="no FlashHead that mlx_flashhead.attach"):
        detach(model)


def test_mlx_lm_is_not_looked_at(untied_source, untied_folder, monkeypatch):
    model = utils.load_model(untied_source)[0]
    monkeypatch.setattr(mlx_lm, "__version__", "99")
    for name in ("load_model", "load_tokenizer", "save_model", "_download"):
        monkeypatch.delattr(utils, name)
    attach(model, untied_folder)
    assert model(TOKENS).shape == (1, 5, 1003)
    assert loading.utils is utils


@pytest.mark.full
@pytest.mark.parametrize("name", ["gemma", "smollm"])
def test_real_models(request, name):
    """Of mlx-lm's own loading: its text, drafted, and its weights again afterwards."""
    folder = request.getfixturevalue(name).folder
    model, tokenizer = mlx_lm.load(str(folder))
    prompt = tokenizer.encode("The steam engine was invented")
    model.set_dtype(mx.float32)
    wanted = [
        token for token, _ in generate_step(mx.array(prompt), model, max_tokens=24)
    ]
    model, _ = mlx_lm.load(str(folder))
    before = snapshot(model)
    attach(model, folder / HEAD_FILE, exact=True)
    with verification() as count:
        decoder, tokens, written = Decoder(model), prompt, []
        for _ in wanted:
            tokens, _ = decoder.step(tokens)
            written.append(tokens.item())
    assert written == wanted
    assert count.acceptance > 0.7 and count.verifications < len(wanted) / 2
    detach(model)
    assert_same(model, before)
    # Of the plain model's rows, most of the likeliest tokens are among the candidates.
    attach(model, folder)
    cache, tokens = make_prompt_cache(model), mx.array([prompt + wanted[:-1]])
    model(tokens[:, : len(prompt) - 1], cache=cache)
    steps = tokens[0, len(prompt) - 1 :]
    found = [
        model(step[None, None], cache=cache)[0, -1].argmax().item() for step in steps
    ]
    assert np.mean([a == b for a, b in zip(found, wanted, strict=True)]) > 0.8
