"""Decoding that measures itself where mlx-lm did not load the model, or does not run
it: attached heads, loops of one's own, and drafts of speculative decoding."""

from __future__ import annotations

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm import utils
from mlx_lm.sample_utils import make_sampler

from mlx_flashhead import (
    Decoder,
    FlashHead,
    Settings,
    acceptance,
    attach,
    detach,
    flash_heads,
    load,
    patch_decoding,
    sample,
    verification,
)
from mlx_flashhead.integration import masking
from mlx_flashhead.integration.locate import slot_of
from mlx_flashhead.integration.tuner import Tuner, tuner_of
from mlx_flashhead.tuning import Cell

PROMPT = [84, 104, 101, 32, 113, 117, 105, 99, 107]
TOP_P = {"temp": 0.8, "top_p": 0.9}
WINS = pytest.mark.parametrize("wins", [True, False], ids=["dense", "flash"])


@pytest.fixture(autouse=True)
def tuned(tmp_path, monkeypatch):
    """As users have it."""
    monkeypatch.setenv("MLX_FLASHHEAD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MLX_FLASHHEAD_TUNE")
    return tmp_path / "cache/measured"


@pytest.fixture
def plain(untied_source):
    return utils.load_model(untied_source)[0]


@pytest.fixture
def probed(monkeypatch):
    """The states whose clusters were probed, by their number."""
    sizes, select = [], FlashHead.select
    monkeypatch.setattr(
        FlashHead, "select", lambda s, x, *n: sizes.append(len(x)) or select(s, x, *n)
    )
    return sizes


def on_a_machine(monkeypatch, model, group, *both):
    """Let a model's steps take these times: of n sequences, dense and approximate."""
    monkeypatch.setattr(Tuner, "_measure", lambda *_: None)
    times = {Cell("stock", n): dense for n, dense, _ in both}
    times |= {Cell("approximate", n): other for n, _, other in both}
    tuner_of(slot_of(model)).times[f"{group}, p {head_of(model).n_probes}"] = times


def head_of(model):
    return next(flash_heads(model))


# ---- attached ----------------------------------------------------------------------


@WINS
def test_logits_are_dense_where_that_is_faster(
    plain, untied_folder, monkeypatch, wins, probed, capsys
):
    tokens = mx.array([[5], [7], [11]])
    plain.set_dtype(mx.float32)
    wanted = plain(tokens)
    attach(plain, untied_folder, n_probes=60)
    both = [(2, 0.1, 0.2 if wins else 0.05), (4, 0.1, 0.3 if wins else 0.06)]
    on_a_machine(monkeypatch, plain, "head-only logits", *both)
    for _ in range(2):
        found = plain(tokens)
    assert bool(probed) != wins
    assert mx.allclose(found, wanted, atol=1e-4).item() == wins
    said = capsys.readouterr().err.splitlines()
    assert len(said) == wins
    for line in said:
        assert "head-only logits decoding of 3 sequences is faster dense" in line
    # A prompt asks nobody.
    probed.clear()
    plain(tokens.T)
    assert not probed


def test_an_attached_head_measures_itself_once(plain, untied_folder, tuned, capsys):
    attach(plain, untied_folder)
    for _ in range(3):
        plain(mx.array([[5]]))
    (said,) = (
        line for line in capsys.readouterr().err.splitlines() if "measured" in line
    )
    assert "measured head-only logits decoding on this device, which is done" in said
    times = tuner_of(slot_of(plain)).times
    assert all(0 < s < 1 for s in times["head-only logits, p 90"].values())
    # Loaded, the head has other rows, and times of its own.
    (file,) = tuned.iterdir()
    assert file.name.startswith(slot_of(plain).origin.sha256[:16])
    loaded, _ = load(untied_folder, exact=False)
    assert tuner_of(slot_of(loaded)).times == {}
    # Detached and attached again, it is known.
    attach(detach(plain), untied_folder)
    assert tuner_of(slot_of(plain)).times == times
    plain(mx.array([[5]]))
    assert "measured" not in capsys.readouterr().err


def test_attached_it_can_be_turned_off(
    plain, untied_folder, tuned, monkeypatch, capsys
):
    attach(plain, untied_folder, tune=False)
    plain(mx.array([[5]]))
    Decoder(plain).step(PROMPT)
    attach(detach(plain), untied_folder)
    monkeypatch.setenv("MLX_FLASHHEAD_TUNE", "0")
    plain(mx.array([[5]]))
    assert capsys.readouterr().err == "" and not tuned.exists()


def test_mlx_lm_drafts_for_an_attached_model_as_is_fastest(
    plain, untied_source, untied_folder, monkeypatch
):
    _, tokenizer = mlx_lm.load(str(untied_source))
    plain.set_dtype(mx.float32)
    wanted = [
        r.token for r in mlx_lm.stream_generate(plain, tokenizer, PROMPT, max_tokens=24)
    ]
    attach(plain, untied_folder, exact=True)
    patch_decoding()
    slot, counts = slot_of(plain), []
    draft = slot.origin.draft
    p, k = draft.n_probes, draft.verify_every
    for times in (None, {"dense": 0.01}, {"dense": 1.0}):
        if times is not None:
            cells = {Cell("draft", p): 0.1, Cell("verify", k): 0.1}
            both = Cell("stock", 1), Cell("dense", 1)
            cells |= dict.fromkeys(both, times["dense"])
            tuner_of(slot).times["greedy"] = cells
            monkeypatch.setattr(Tuner, "_measure", lambda *_: None)
        with verification() as count:
            stream = mlx_lm.stream_generate(plain, tokenizer, PROMPT, max_tokens=24)
            assert [r.token for r in stream] == wanted
        counts.append(count.drafted)
    assert counts[1] == 0 < counts[2]


# ---- loops of one's own ------------------------------------------------------------


def own_loop(model, n=12, **options):
    mx.random.seed(3)
    decoder, tokens, found = Decoder(model, **options), PROMPT, []
    for _ in range(n):
        tokens, _ = decoder.step(tokens)
        found.append(tokens.item())
    decoder.close()
    return found


@WINS
@pytest.mark.parametrize("options", [{}, TOP_P], ids=str)
def test_a_decoder_goes_dense_where_that_is_faster(
    untied_folder, monkeypatch, wins, options, probed
):
    sampler = make_sampler(**options)
    densely, _ = load(untied_folder, exact=False, tune=False)
    slot_of(densely).decoding = "dense"
    wanted = own_loop(densely, sampler=sampler)
    model, _ = load(untied_folder, exact=False)
    group = "sorted" if options else "greedy"
    on_a_machine(monkeypatch, model, group, (1, 0.1, 0.2 if wins else 0.05))
    found = own_loop(model, sampler=sampler)
    assert bool(probed) != wins
    if wins:
        assert found == wanted


def test_a_decoder_measures_a_step(untied_folder, capsys):
    """Exact, too; and what it writes does not depend on it."""
    wanted = own_loop(load(untied_folder, tune=False)[0])
    for exact in (True, False):
        model, _ = load(untied_folder, exact=exact)
        found = own_loop(model)
        assert found == wanted or not exact
        assert "measured greedy decoding" in capsys.readouterr().err


@WINS
@pytest.mark.parametrize("settings", [Settings(), Settings(**TOP_P)], ids=str)
def test_tokens_of_states_are_drawn_densely_where_that_is_faster(
    untied_folder, monkeypatch, wins, settings, probed
):
    model, _ = load(untied_folder, exact=False)
    head = head_of(model)
    h = mx.random.normal((3, head.hidden_size), key=mx.random.key(1))
    keys = mx.random.split(mx.random.key(2), 3)
    every = sample(head, h, settings, keys, exact=True)
    kind = "sorted" if settings.sorts else "greedy"
    both = [(n, 0.1, 0.2 if wins else 0.05) for n in (2, 4)]
    on_a_machine(monkeypatch, model, f"head-only {kind}", *both)
    found = sample(head, h, settings, keys)
    assert bool(probed) != wins
    if wins:
        assert found.tokens.tolist() == every.tokens.tolist()
        np.testing.assert_array_equal(found.logprobs, every.logprobs)


def test_tokens_of_states_are_measured_once(untied_folder, capsys):
    model, _ = load(untied_folder, exact=False)
    head = head_of(model)
    h = mx.random.normal((4, head.hidden_size), key=mx.random.key(1))
    for _ in range(3):
        sample(head, h, Settings(**TOP_P))
    lines = [
        line for line in capsys.readouterr().err.splitlines() if "measured" in line
    ]
    assert len(lines) == 1 and "head-only sorted decoding of 4 sequences" in lines[0]
    cells = tuner_of(slot_of(model)).times["head-only sorted, p 90"]
    assert cells.keys() == {Cell("stock", 4), Cell("approximate", 4)}
    # Measuring draws nothing from MLX's generator.
    mx.random.seed(5)
    known = sample(head, h, Settings(temp=1.0)).tokens.tolist()
    mx.random.seed(5)
    assert sample(head, h, Settings(temp=1.0)).tokens.tolist() == known


# ---- drafts of speculative decoding ------------------------------------------------


@WINS
@pytest.mark.parametrize("exact", [True, False])
def test_a_draft_model_goes_dense_where_that_is_faster(
    untied_source, untied_folder, monkeypatch, wins, exact
):
    target, tokenizer = mlx_lm.load(str(untied_source))
    wanted = [
        r.token
        for r in mlx_lm.stream_generate(target, tokenizer, PROMPT, max_tokens=20)
    ]
    draft, _ = load(untied_folder, exact=exact)
    both = [(n, 0.1, 0.2 if wins else 0.05) for n in (1, 2)]
    on_a_machine(monkeypatch, draft, "greedy", *both)
    sizes, draw = [], masking.draw
    monkeypatch.setattr(
        masking,
        "draw",
        lambda head, s, h, *a: sizes.append(len(h)) or draw(head, s, h, *a),
    )
    with acceptance() as drafts:
        stream = mlx_lm.stream_generate(
            target, tokenizer, PROMPT, max_tokens=20, draft_model=draft
        )
        assert [r.token for r in stream] == wanted
    assert bool(sizes) != wins and drafts.rate > 0.3


def test_a_draft_model_measures_itself(untied_source, untied_folder, capsys):
    target, tokenizer = mlx_lm.load(str(untied_source))
    draft, _ = load(untied_folder)
    stream = mlx_lm.stream_generate(
        target, tokenizer, PROMPT, max_tokens=8, draft_model=draft
    )
    assert len(list(stream)) == 8
    assert "measured greedy decoding on this device" in capsys.readouterr().err
    times = tuner_of(slot_of(draft)).times["greedy, p 90"]
    assert {Cell("stock", 1), Cell("approximate", 1)} <= times.keys()
