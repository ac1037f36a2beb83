"""mlx-lm with and without FlashHead on the same folder."""

from __future__ import annotations

import importlib
import json
import shutil
import struct
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import small_models
from mlx.utils import tree_flatten
from mlx_flashhead.convert import convert
from mlx_lm import utils
from mlx_lm.sample_utils import make_sampler
from small_heads import unpack

import mlx_flashhead
from mlx_flashhead import FlashHead, flash_heads, load, patch, patched, unpatch
from mlx_flashhead.folder.format import HEAD_FILE, seal
from mlx_flashhead.folder.section import read_section
from mlx_flashhead.integration.slots import FlashEmbedding, FlashLinear

STOCK = utils.load_model
DOWNLOAD = utils._download
TOKENS = mx.array([[72, 101, 108, 108, 111]])
PROMPT = "The quick brown fox"


def n_heads(model) -> int:
    return len(list(flash_heads(model)))


def is_stock() -> bool:
    return (
        utils.load_model is STOCK
        and utils._download is DOWNLOAD
        and HEAD_FILE not in getattr(utils, "DEFAULT_ALLOW_PATTERNS", ())
    )


def logits(model, tokens=TOKENS) -> np.ndarray:
    return np.array(model(tokens).astype(mx.float32))


def greedy(model, tokenizer, n: int = 12, **options) -> list[int]:
    stream = mlx_lm.stream_generate(model, tokenizer, PROMPT, max_tokens=n, **options)
    return [response.token for response in stream]


# ---------------------------------------------------------------------------
# Stock mlx-lm
# ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_stock_mlx_lm_gives_the_dense_logits_of_the_source(request, kind):
    source, folder = (
        request.getfixturevalue(f"{kind}_{what}") for what in ("source", "folder")
    )
    assert is_stock()
    wanted, _ = mlx_lm.load(str(source))
    found, tokenizer = mlx_lm.load(str(folder))
    assert n_heads(found) == 0
    assert np.array_equal(logits(found), logits(wanted))
    assert tokenizer.encode("héllo") == list("héllo".encode())
    assert greedy(found, tokenizer) == greedy(wanted, tokenizer)


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_prompts_get_the_dense_logits_of_the_stored_rows(request, kind):
    folder = request.getfixturevalue(f"{kind}_folder")
    dense, _ = load(folder, dense=True)
    flash, _ = load(folder)
    head = next(flash_heads(flash))
    rows = unpack(head.rows).reshape(-1, head.hidden_size)
    order = np.array(head.token_ids).reshape(-1)[: head.vocab_size]
    hidden = np.array(flash.model(TOKENS).astype(mx.float32)).astype(np.float64)
    wanted = np.empty((1, 5, head.vocab_size))
    wanted[..., order] = hidden @ rows[: head.vocab_size].T
    np.testing.assert_allclose(logits(flash), wanted, atol=1e-3)
    # Eight bits are close to the source's rows.
    assert np.abs(logits(flash) - logits(dense)).max() < 0.3
    assert np.corrcoef(logits(flash).ravel(), logits(dense).ravel())[0, 1] > 0.999


# ---------------------------------------------------------------------------
# load
# ---------------------------------------------------------------------------


def test_load_puts_the_head_in_place(untied_folder, tied_folder):
    model, tokenizer = load(untied_folder)
    assert type(model.lm_head) is FlashLinear
    assert tokenizer.decode(tokenizer.encode("abc")) == "abc"
    model, _ = load(str(tied_folder))
    assert type(model.model.embed_tokens) is FlashEmbedding
    assert n_heads(model) == 1
    assert is_stock()


def test_load_options(untied_folder):
    model, _ = load(untied_folder, n_probes=3)
    assert model.lm_head.head.n_probes == 3
    assert load(untied_folder)[0].lm_head.head.n_probes == 90
    assert n_heads(load(untied_folder, dense=True)[0]) == 0
    *_, config = load(untied_folder, lazy=True, return_config=True)
    assert config["flashhead"]["n_probes"] == 90
    for n in (0, 127, -4):
        with pytest.raises(ValueError, match="n_probes must be an integer from 1 to"):
            load(untied_folder, n_probes=n)
    assert is_stock()


def test_load_of_a_model_without_a_flash_head(untied_source):
    model, _ = load(untied_source)
    wanted, _ = mlx_lm.load(str(untied_source))
    assert np.array_equal(logits(model), logits(wanted))


def test_load_of_nothing(tmp_path):
    tmp_path.joinpath("empty").mkdir()
    for name in ("empty", "missing"):
        with pytest.raises((OSError, ValueError)):
            load(tmp_path / name)
    assert is_stock()


def test_everything_is_float32_on_a_cpu(tied_folder):
    if mx.default_device() != mx.Device(mx.cpu):
        return
    for dense in (False, True):
        model, _ = load(tied_folder, dense=dense)
        kinds = {v.dtype for _, v in tree_flatten(model.parameters())}
        assert kinds <= {mx.float32, mx.uint32}
        assert model(TOKENS).dtype == mx.float32


def test_a_tied_model_has_one_table_in_memory(tied_folder):
    model, _ = load(tied_folder, exact=False)
    parameters = dict(tree_flatten(model.parameters()))
    vocabulary = [k for k, v in parameters.items() if 1003 in v.shape]
    assert vocabulary == []
    dense, _ = load(tied_folder, dense=True)
    table = sum(a.nbytes for a in model.model.embed_tokens.head.rows.arrays)
    assert table < 0.4 * dense.model.embed_tokens.weight.nbytes
    flash_bytes = sum(v.nbytes for v in parameters.values())
    dense_bytes = sum(v.nbytes for _, v in tree_flatten(dense.parameters()))
    assert flash_bytes < dense_bytes


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_the_dense_head_is_not_read(request, tmp_path, kind):
    """It may even be nothing but NaN."""
    folder = request.getfixturevalue(f"{kind}_folder")
    wanted = logits(load(folder, exact=False)[0])
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    name = "model.embed_tokens.weight" if kind == "tied" else "lm_head.weight"
    file = copy / "model.safetensors"
    data = bytearray(file.read_bytes())
    (length,) = struct.unpack("<Q", data[:8])
    start, end = json.loads(data[8 : 8 + length])[name]["data_offsets"]
    data[8 + length + start : 8 + length + end] = b"\xff" * (end - start)
    file.write_bytes(data)
    seal(copy, read_section(copy), [file])
    assert np.isnan(logits(mlx_lm.load(str(copy))[0])).any()
    assert np.array_equal(logits(load(copy, exact=False)[0]), wanted)


# ---------------------------------------------------------------------------
# patch
# ---------------------------------------------------------------------------


def test_patch_and_unpatch(untied_folder):
    patch()
    assert not is_stock()
    # So that the hub sends it.
    assert utils._download is not DOWNLOAD or HEAD_FILE in utils.DEFAULT_ALLOW_PATTERNS
    assert n_heads(mlx_lm.load(str(untied_folder))[0]) == 1
    unpatch()
    assert is_stock()
    assert n_heads(mlx_lm.load(str(untied_folder))[0]) == 0


def test_patching_twice_is_patching_once(untied_folder):
    patch()
    patch(n_probes=5)
    model, _ = mlx_lm.load(str(untied_folder))
    assert model.lm_head.head.n_probes == 5
    assert getattr(utils, "DEFAULT_ALLOW_PATTERNS", [HEAD_FILE]).count(HEAD_FILE) == 1
    unpatch()
    assert is_stock()
    unpatch()
    assert is_stock()


def test_patched_nests(untied_folder):
    def probes():
        model, _ = mlx_lm.load(str(untied_folder))
        return [head.n_probes for head in flash_heads(model)]

    with patched(n_probes=7):
        assert probes() == [7]
        with patched(dense=True):
            assert probes() == []
            with patched():
                assert probes() == [90]
            assert probes() == []
        assert probes() == [7]
    assert probes() == []
    assert is_stock()
    patch(n_probes=4)
    with patched(n_probes=7):
        assert probes() == [7]
    assert probes() == [4]
    unpatch()
    assert is_stock()


def test_patched_ends_with_an_error():
    with pytest.raises(KeyError), patched():
        raise KeyError
    assert is_stock()


@pytest.mark.parametrize("value", ["0", "OFF"])
def test_switched_off_by_the_environment(untied_folder, monkeypatch, value):
    monkeypatch.setenv("MLX_FLASHHEAD", value)
    assert n_heads(load(untied_folder)[0]) == 0
    patch()
    assert n_heads(mlx_lm.load(str(untied_folder))[0]) == 0
    monkeypatch.setenv("MLX_FLASHHEAD", "1")
    assert n_heads(mlx_lm.load(str(untied_folder))[0]) == 1


@pytest.mark.parametrize("missing", [False, True])
def test_an_unknown_loader_is_left(monkeypatch, missing):
    def load_model(folder, eager=True):
        pass

    if missing:
        monkeypatch.delattr(utils, "load_model")
    else:
        monkeypatch.setattr(utils, "load_model", load_model)
    with pytest.warns(UserWarning) as warned:
        patch()
    (message,) = [str(w.message) for w in warned]
    assert mlx_lm.__version__ in message and "\n" not in message
    assert "load_model" in message and "mlx_flashhead.attach" in message
    assert getattr(utils, "load_model", load_model) is load_model
    unpatch()
    assert HEAD_FILE not in getattr(utils, "DEFAULT_ALLOW_PATTERNS", ())


@pytest.mark.parametrize("exact", [False, True])
def test_an_unknown_mlx_lm_decodes_by_itself(untied_folder, monkeypatch, exact):
    """On logits of the whole vocabulary; the dense head's, where decoding is exact."""
    model, tokenizer = load(untied_folder, exact=exact)
    wanted = greedy(model, tokenizer)
    unpatch()
    generate = importlib.import_module("mlx_lm.generate")
    stock = generate.generate_step

    def generate_step(prompt, net, *args, **options):
        yield from stock(prompt, net, *args, **options)

    monkeypatch.setattr(generate, "generate_step", generate_step)
    with pytest.warns(UserWarning, match="generate_step has changed"):
        patch(exact=exact)
    model, tokenizer = mlx_lm.load(str(untied_folder))
    assert n_heads(model) == 1 and model.lm_head.exact is exact
    with monkeypatch.context() as watched:
        drafted = []
        watched.setattr(FlashHead, "retrieve", lambda *_: drafted.append(1))
        if exact:
            assert greedy(model, tokenizer) == wanted and not drafted
    assert greedy(model, tokenizer) == wanted
    with pytest.warns(UserWarning, match="generate_step has changed"):
        load(untied_folder)


def test_other_models_load_as_before(untied_source):
    wanted = logits(mlx_lm.load(str(untied_source))[0])
    patch()
    assert np.array_equal(logits(mlx_lm.load(str(untied_source))[0]), wanted)


# ---------------------------------------------------------------------------
# Generation
# ---------------------------------------------------------------------------


def test_probing_everything_writes_what_the_dense_head_of_the_rows_writes(
    untied_folder,
):
    patch(n_probes=126)
    model, tokenizer = mlx_lm.load(str(untied_folder))
    head = next(flash_heads(model))
    assert head.n_probes == head.n_clusters == 126
    written = greedy(model, tokenizer)
    text = mlx_lm.generate(model, tokenizer, PROMPT, max_tokens=12)
    # The reference: the whole text through the model again, without a cache.
    rows = np.empty((1003, 64))
    order = np.array(head.token_ids).reshape(-1)[:1003]
    rows[order] = unpack(head.rows).reshape(-1, 64)[:1003]
    tokens = tokenizer.encode(PROMPT)
    for token in written:
        hidden = np.array(model.model(mx.array([tokens])))[0, -1].astype(np.float64)
        assert token == (rows @ hidden).argmax()
        tokens.append(token)
    assert text == tokenizer.decode(written)


def test_a_decode_step_uses_the_head_and_a_prompt_does_not(untied_folder, monkeypatch):
    selected, drawn = [], []
    select, dense = FlashHead.select, FlashHead.dense
    monkeypatch.setattr(
        FlashHead, "select", lambda self, m: selected.append(len(m)) or select(self, m)
    )
    monkeypatch.setattr(
        FlashHead, "dense", lambda self, x: drawn.append(x.shape[-2]) or dense(self, x)
    )
    model, tokenizer = load(untied_folder, exact=False)
    greedy(model, tokenizer, 5)
    assert set(selected) == {1} and len(selected) >= 5
    assert len(drawn) == 1 and drawn[0] > 1  # the prompt's graph, never evaluated


def test_sampling_is_reproducible_and_spreads(untied_folder):
    model, tokenizer = load(untied_folder)
    texts = []
    for seed in (1, 1, 2):
        mx.random.seed(seed)
        texts.append(greedy(model, tokenizer, sampler=make_sampler(1.0, top_p=0.95)))
    assert texts[0] == texts[1] != texts[2]


def test_batches_and_single_texts_agree(untied_folder):
    model, tokenizer = load(untied_folder, n_probes=30)
    prompts = [tokenizer.encode(text) for text in ("A cat", "Three dogs", "1, 2,")]
    together = mlx_lm.batch_generate(model, tokenizer, prompts, max_tokens=6)
    alone = [
        mlx_lm.generate(model, tokenizer, prompt, max_tokens=6) for prompt in prompts
    ]
    assert together.texts == alone


def test_speculative_decoding(untied_folder):
    """Drafts are checked several at once, so by exact logits."""
    model, tokenizer = load(untied_folder, n_probes=126)
    draft, _ = load(untied_folder, n_probes=90)
    assert greedy(model, tokenizer, draft_model=draft) == greedy(model, tokenizer)


@pytest.mark.parametrize("name", ["gemma3", "gemma2", "cohere", "gpt2", "phi"])
def test_every_architecture_writes(tmp_path, name):
    source = small_models.write(name, tmp_path / "source")
    convert(str(source), tmp_path / "made", cluster_size=8, n_probes=60, verbose=False)
    dense, tokenizer = mlx_lm.load(str(source))
    flash, _ = load(tmp_path / "made")
    assert n_heads(flash) == 1
    written = greedy(flash, tokenizer, 6)
    assert len(written) == 6
    flash_logits = logits(flash, TOKENS[:, :1])[0, -1]
    dense_logits = logits(dense, TOKENS[:, :1])[0, -1]
    assert np.isfinite(flash_logits).all()
    # Tokens that were probed have the dense logit, to the precision of 8 bits.
    close = np.abs(flash_logits - dense_logits) < 0.02 * np.ptp(dense_logits)
    assert close.mean() > 0.7


def test_public_names():
    for name in mlx_flashhead.__all__:
        assert getattr(mlx_flashhead, name).__doc__
    assert mlx_flashhead.__version__
