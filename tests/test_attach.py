"""Finding, watching and replacing the head of mlx-lm's models."""

from __future__ import annotations

import os

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import small_models
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model
from small_heads import make_head
from small_models import ARCHITECTURES

from mlx_flashhead import FlashHead, flash_heads
from mlx_flashhead.compute.table import Table
from mlx_flashhead.integration.locate import (
    HeadNotFound,
    find_head,
    get_module,
    head_table,
    is_tied,
    place,
    watching,
)
from mlx_flashhead.integration.slots import FlashEmbedding, FlashLinear

TOKENS = mx.array([[5, 7, 11, 300]])


def snapshot(model: nn.Module) -> tuple[dict, dict]:
    """Its modules, by identity, and copies of its weights."""
    modules = {path: id(module) for path, module in model.named_modules()}
    weights = {k: np.array(v) for k, v in tree_flatten(model.parameters())}
    return modules, weights


def assert_untouched(model: nn.Module, before: tuple[dict, dict]) -> None:
    modules, weights = snapshot(model)
    assert modules == before[0]
    assert weights.keys() == before[1].keys()
    for name, value in weights.items():
        assert np.array_equal(value, before[1][name]), name


def identity_head(table: Table, cluster_size: int = 8) -> FlashHead:
    """A head of a table's own rows in their own order, all of them probed."""
    rows = table.dequantize(mx.float32)
    c = -(-len(rows) // cluster_size)
    ids = mx.minimum(mx.arange(c * cluster_size), len(rows)).astype(mx.uint32)
    packed = rows[mx.minimum(ids, len(rows) - 1)].reshape(c, cluster_size, -1)
    return FlashHead(
        Table(packed, bits=32),
        Table(packed.mean(1), bits=32),
        ids.reshape(c, cluster_size),
        len(rows),
        spread=mx.zeros(c),
        excess=mx.zeros((1, c)),
        n_probes=c,
    )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_find_head(name):
    model, _ = small_models.build(name)
    before = snapshot(model)
    logits = model(TOKENS)
    path = find_head(model)
    assert path == ARCHITECTURES[name][2]
    assert is_tied(model, path) is not path.endswith("lm_head")
    assert_untouched(model, before)
    assert mx.array_equal(model(TOKENS), logits)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma3", "phi", "granite"])
def test_find_a_quantized_head(name, bits):
    model, _ = small_models.build(name)
    nn.quantize(model, 32, bits)
    before = snapshot(model)
    path = find_head(model)
    assert path == ARCHITECTURES[name][2]
    assert head_table(get_module(model, path)).bits == bits
    assert_untouched(model, before)


def test_a_16_bit_head_is_found():
    model, _ = small_models.build("gemma2", dtype="float16")
    assert find_head(model) == "model.embed_tokens"


def test_a_layer_as_wide_as_the_vocabulary_is_not_the_head():
    width = small_models.VOCAB
    model, _ = small_models.build("llama-tied", intermediate_size=width)
    assert find_head(model) == "model.embed_tokens"
    model, _ = small_models.build("llama", intermediate_size=width)
    assert find_head(model) == "lm_head"


def test_finding_reads_no_weights(tmp_path):
    folder = small_models.write("llama-tied", tmp_path / "model")
    model, _ = load_model(folder, lazy=True)
    # All that is left to read is the header.
    os.truncate(folder / "model.safetensors", 4096)
    assert find_head(model) == "model.embed_tokens"


class Unusual(nn.Module):
    """Makes logits in a way of its own."""

    def __init__(self, make, **modules):
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.make = make
        for name, module in modules.items():
            self[name] = module

    def __call__(self, tokens, cache=None):
        return self.make(self, self.embed(tokens))


def reversed_logits(model, h):
    return model.head(h)[..., ::-1]


def two_heads(model, h):
    return model.head(h) + model.other(h)


def array_head(model, h):
    return h @ model.table


def squared_logits(model, h):
    return (model.head(h) - 0.5) ** 2


@pytest.mark.parametrize(
    "make, modules",
    [
        (reversed_logits, {"head": nn.Linear(16, 50)}),
        (squared_logits, {"head": nn.Linear(16, 50)}),
        (two_heads, {"head": nn.Linear(16, 50), "other": nn.Linear(16, 50)}),
        (array_head, {"table": mx.ones((16, 50))}),
    ],
)
def test_a_head_that_cannot_be_replaced(make, modules):
    model = Unusual(make, **modules)
    before = snapshot(model)
    with pytest.raises(HeadNotFound) as error:
        find_head(model)
    message = str(error.value)
    assert "\n" not in message
    assert "50" in message
    looked_at = [n for n, m in modules.items() if isinstance(m, nn.Linear)] or ["embed"]
    for name in looked_at:
        assert name in message
    assert_untouched(model, before)


@pytest.mark.parametrize("mode", [None, "affine", "mxfp4"])
def test_a_product_with_the_weight_of_the_embedding(mode):
    """As Seed-OSS and Llama 4 have it; with packed rows stock mlx-lm cannot."""
    model = Unusual(lambda model, h: model.act(h @ model.embed.weight.T), act=nn.Tanh())
    model.embed = nn.Embedding(50, 32)
    tokens, atol = mx.array([[1, 2]]), 1e-4
    rows, wanted = model.embed.weight, model(tokens)
    if mode:
        model.embed = model.embed.to_quantized(32, 4, mode)
        with pytest.raises(ValueError, match="matmul"):
            model(tokens)
        atol = 0.02 if mode == "mxfp4" else atol  # its embeddings have 16 bits
        table = head_table(model.embed)
        rows = table.dequantize(mx.float32)
        wanted = mx.tanh(model.embed(tokens) @ rows.T)
    assert find_head(model) == "embed"
    with watching(model, "embed") as states:
        assert mx.allclose(model(tokens), wanted, atol=atol)
    assert len(states) == 1 and mx.allclose(states[0], model.embed(tokens))
    place(model, "embed", identity_head(head_table(model.embed)))
    assert mx.allclose(model(tokens), wanted, atol=atol)
    assert mx.allclose(model.embed.weight, rows, atol=atol)


def test_what_is_done_to_logits_one_by_one_is_allowed():
    def after(model, h):
        return mx.log(mx.sigmoid(3 * model.head(h) - 1))

    assert find_head(Unusual(after, head=nn.Linear(16, 50))) == "head"


def test_a_model_that_fails_is_named_and_left_as_it_was():
    def fails(model, h):
        model.head(h)
        raise RuntimeError("no such\nthing")

    model = Unusual(fails, head=nn.Linear(16, 50))
    before = snapshot(model)
    with pytest.raises(HeadNotFound, match="RuntimeError: no such thing"):
        find_head(model)
    assert_untouched(model, before)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma3", "cohere", "gpt2"])
def test_watching_sees_what_the_head_is_given(name):
    model, _ = small_models.build(name)
    path = ARCHITECTURES[name][2]
    before = snapshot(model)
    plain = model(TOKENS)
    with watching(model, path) as states:
        logits = model(TOKENS)
        model(TOKENS[:, :2])
    assert mx.array_equal(logits, plain)
    assert [s.shape for s in states] == [(1, 4, 64), (1, 2, 64)]
    module = get_module(model, path)
    made = module.as_linear if is_tied(model, path) else module
    product = made(states[0])
    if name == "cohere":
        product = product * 0.0625
    assert mx.allclose(product, plain, atol=1e-5)
    assert_untouched(model, before)


def test_watching_ends_where_the_model_fails():
    model, _ = small_models.build("llama")
    before = snapshot(model)
    with pytest.raises(KeyError), watching(model, "lm_head"):
        raise KeyError
    assert_untouched(model, before)


@pytest.mark.parametrize("name", [n for n in ARCHITECTURES if n not in ("phi", "gptj")])
def test_a_head_of_the_same_rows_gives_the_same_logits(name):
    """What models do before and after the head stays as it was."""
    model, _ = small_models.build(name)
    plain, step = model(TOKENS), model(TOKENS[:, :1])
    path = find_head(model)
    head = identity_head(head_table(get_module(model, path)))
    assert place(model, path, head) is model
    assert list(flash_heads(model)) == [head]
    kind = FlashLinear if path.endswith("lm_head") else FlashEmbedding
    assert type(get_module(model, path)) is kind
    assert is_tied(model, path) is (kind is FlashEmbedding)
    assert mx.allclose(model(TOKENS), plain, atol=1e-4)
    assert mx.allclose(model(TOKENS[:, :1]), step, atol=1e-4)
    head.n_probes = 2
    sparse = model(TOKENS[:, :1])
    assert sparse.shape == step.shape
    assert mx.isfinite(sparse).all().item()
    assert not mx.allclose(sparse, step, atol=1e-2)


def test_paths_that_do_not_exist():
    model, _ = small_models.build("llama")
    for path in ("head", "model.layers.9.mlp", "lm_head.weight"):
        with pytest.raises(HeadNotFound, match="no module"):
            get_module(model, path)
    with pytest.raises(HeadNotFound):
        place(model, "head", make_head().head)


def test_head_tables_hold_the_rows():
    for bits in (4, 8):
        for module in (nn.Linear(64, 90, bias=False), nn.Embedding(90, 64)):
            rows = module.weight
            table = head_table(module)
            assert not table.quantized and mx.array_equal(table.weight, rows)
            table = head_table(module.to_quantized(32, bits))
            assert (table.bits, table.group_size, table.mode) == (bits, 32, "affine")
            packed = mx.quantize(rows, 32, bits)
            assert mx.array_equal(
                table.dequantize(), mx.dequantize(*packed, group_size=32, bits=bits)
            )
