"""A draft that is rolled back leaves no trace: caches and logits are those of a run
that was never fed the undone tokens."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache as cached

import mlx.core as mx
import numpy as np
import pytest
import small_models
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from mlx_lm.models import cache as mlx_lm_caches
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache
from versions import OLD_MLX_LM

from mlx_flashhead.integration.rollback import Rollback, supported

VOCAB = 64
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "norm_eps": 1e-5,
    "rope_theta": 1000.0,
    "max_position_embeddings": 1024,
}
MAMBA = {
    "state_size": 4,
    "conv_kernel": 3,
    "time_step_rank": 2,
    "use_bias": False,
    "use_conv_bias": True,
}
QWEN3_NEXT = {
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 3,
    "full_attention_interval": 2,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "decoder_sparse_step": 1,
    "shared_expert_intermediate_size": 32,
    "mlp_only_layers": [0],
    "moe_intermediate_size": 32,
    "head_dim": 16,
    "partial_rotary_factor": 0.5,
}
FALCON_H1 = {
    "attention_in_multiplier": 1.0,
    "attention_out_multiplier": 1.0,
    "embedding_multiplier": 1.0,
    "head_dim": 8,
    "key_multiplier": 1.0,
    "lm_head_multiplier": 1.0,
    "mamba_d_conv": 4,
    "mamba_d_head": 16,
    "mamba_d_ssm": 32,
    "mamba_d_state": 4,
    "mamba_n_groups": 1,
    "mamba_n_heads": 2,
    "mamba_rms_norm": False,
    "mamba_norm_before_gate": True,
    "ssm_in_multiplier": 1.0,
    "ssm_out_multiplier": 1.0,
}
LLAMA4 = COMMON | {
    "model_type": "llama4",
    "attention_bias": False,
    "attention_chunk_size": 6,
    "head_dim": 8,
    "interleave_moe_layer_step": 2,
    "intermediate_size_mlp": 32,
    "num_experts_per_tok": 1,
    "num_hidden_layers": 4,
    "num_local_experts": 2,
    "rope_scaling": None,
    "use_qk_norm": True,
}
AFM7 = {
    "hidden_dim": 32,
    "num_layers": 3,
    "num_kv_reuse_layers": 1,
    "num_heads": 4,
    "num_kv_heads": 2,
}
LFM2 = {
    "conv_bias": False,
    "conv_L_cache": 3,
    "block_dim": 32,
    "block_ff_dim": 32,
    "block_multiple_of": 4,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": False,
    "full_attn_idxs": [1],
}
MODELS = {
    "mamba": MAMBA,
    "lfm2": LFM2,
    "qwen3_next": QWEN3_NEXT,
    "falcon_h1": FALCON_H1,
    "llama4": {"text_config": LLAMA4},
    "afm7": AFM7,
}


@cached
def model_of(name: str, **extra):
    """A small random model, of this file or of ``small_models``."""
    if name in small_models.ARCHITECTURES:
        return small_models.build(name, **extra)[0]
    mx.random.seed(1)
    module = importlib.import_module(f"mlx_lm.models.{name}")
    config = COMMON | {"model_type": name} | MODELS[name]
    model = module.Model(module.ModelArgs.from_dict(config))
    model.eval()
    mx.eval(model.parameters())
    return model


@dataclass
class Setting:
    """A model, and how the caches of a test are made from those it makes."""

    name: str
    extra: tuple = ()
    make: Callable | None = None  # a cache, instead of the model's own
    bits: int | None = None
    rows: int = 1

    @property
    def model(self):
        return model_of(self.name, **dict(self.extra))

    def prompted(self, prompt: np.ndarray) -> list:
        """Caches that were fed a prompt; rows of a batch have prompts as different in
        length as they can be."""
        caches = []
        for row in range(self.rows):
            cache = make_prompt_cache(self.model)
            if self.make:
                cache = [self.make() for _ in cache]
            mine = prompt[row, row:]
            if len(mine):
                mx.eval(self.model(mx.array(mine)[None], cache=cache))
            caches.append(cache)
        if self.rows > 1:
            return [type(same[0]).merge(same) for same in zip(*caches, strict=True)]
        if self.bits:
            return [c.to_quantized(group_size=32, bits=self.bits) for c in caches[0]]
        return caches[0]


def gemma(window: int, rows: int = 1) -> Setting:
    extra = (("sliding_window", window), ("sliding_window_pattern", 2))
    return Setting("gemma3_text", extra, rows=rows)


def rotating(max_size: int, keep: int) -> Callable:
    return lambda: RotatingKVCache(max_size, keep)


SETTINGS = {
    "KVCache": Setting("llama"),
    "QuantizedKVCache": Setting("llama", (("head_dim", 32),), bits=8),
    "RotatingKVCache": Setting("llama", make=rotating(9, keep=4)),
    "RotatingKVCache of one free slot": Setting("llama", make=rotating(5, keep=4)),
    "RotatingKVCache that grows": Setting("llama", make=rotating(264, keep=4)),
    "RotatingKVCache of gemma3": gemma(8),
    "RotatingKVCache of gemma3, wide": gemma(30),
    "ChunkedKVCache of llama4": Setting("llama4"),
    "ConcatenateKVCache": Setting("llama", make=mlx_lm_caches.ConcatenateKVCache),
    "afm7": Setting("afm7"),
    "ArraysCache of mamba": Setting("mamba"),
    "ArraysCache of lfm2": Setting("lfm2"),
    "ArraysCache of qwen3_next": Setting("qwen3_next"),
    "CacheList of falcon_h1": Setting("falcon_h1"),
    "BatchKVCache": Setting("llama", rows=2),
    "BatchRotatingKVCache": Setting("llama", make=rotating(9, keep=0), rows=2),
    "BatchRotatingKVCache that grows": Setting(
        "llama", make=rotating(264, keep=0), rows=2
    ),
    "batch of gemma3": gemma(8, rows=2),
    "batch of falcon_h1": Setting("falcon_h1", rows=3),
    "batch of qwen3_next": Setting("qwen3_next", rows=2),
}
if OLD_MLX_LM:  # it fails with chunks as small as these, and is not rolled back
    del SETTINGS["ChunkedKVCache of llama4"]


def leaves(cache) -> list:
    return [
        leaf
        for entry in cache
        for leaf in (leaves(entry.caches) if hasattr(entry, "caches") else [entry])
    ]


def in_use(leaf) -> tuple:
    """Keys and values of the slots that hold a token."""
    if hasattr(leaf, "keys_and_values"):
        return leaf.keys_and_values()
    # Before mlx-lm 0.32.
    if isinstance(leaf, mlx_lm_caches.ChunkedKVCache):
        end = leaf.offset - leaf.start_position
        return leaf.keys[..., :end, :], leaf.values[..., :end, :]
    return tuple(leaf.state[:2])


def shown(leaf) -> dict:
    """All that a cache holds or says of itself. Of buffers, the slots in use and the
    number of all slots."""
    seen = dict(vars(leaf))
    if seen.get("keys") is not None:
        del seen["keys"], seen["values"]
        seen["in use"] = in_use(leaf)
    seen |= {"size": leaf.size(), "trimmable": leaf.is_trimmable()}
    seen |= {"empty": leaf.empty()}
    if not leaf.empty():  # mlx-lm's QuantizedKVCache fails on this where it is
        seen |= {"nbytes": leaf.nbytes}
    return seen


def assert_same(a, b) -> None:
    for (name, x), (other, y) in zip(tree_flatten(a), tree_flatten(b), strict=True):
        assert name == other
        if isinstance(x, mx.array) or isinstance(y, mx.array):
            x, y = np.array(x), np.array(y)
            assert x.shape == y.shape, name
            np.testing.assert_array_equal(x, y, err_msg=name)
        else:
            assert x == y, (name, x, y)


def feed(setting: Setting, cache, tokens: np.ndarray) -> mx.array:
    return setting.model(mx.array(tokens), cache=cache)


def draft(setting, rollback, cache, tokens, keep: int, evaluate: bool) -> list:
    """Feed tokens one by one, roll back to ``keep`` of them; the kept logits."""
    rollback.mark()
    logits = []
    for i in range(tokens.shape[1]):
        rollback.step()
        logits.append(feed(setting, cache, tokens[:, i : i + 1]))
        if evaluate:
            mx.eval(logits[-1])
    assert rollback.steps == tokens.shape[1]
    rollback.to(keep)
    return logits[:keep]


chunks = st.integers(1, 8).flatmap(
    lambda k: st.tuples(st.just(k), st.integers(0, k), st.booleans())
)


@pytest.mark.parametrize("name", SETTINGS)
@settings(max_examples=12)
@given(
    prompt=st.one_of(st.integers(0, 20), st.integers(248, 262)),
    schedule=st.lists(chunks, min_size=1, max_size=5),
    again=st.integers(2, 12),
    seed=st.integers(0, 99),
)
def test_a_rolled_back_draft_leaves_no_trace(name, prompt, schedule, again, seed):
    setting = SETTINGS[name]
    rng = np.random.default_rng(seed)
    tokens = rng.integers(VOCAB, size=(setting.rows, prompt + setting.rows))
    if setting.rows == 1:
        tokens = tokens[:, :prompt]
    cache, never = setting.prompted(tokens), setting.prompted(tokens)
    objects = [id(leaf) for leaf in leaves(cache)]
    rollback = Rollback(cache)
    for k, keep, evaluate in schedule:
        tokens = rng.integers(VOCAB, size=(setting.rows, k))
        kept = draft(setting, rollback, cache, tokens, keep, evaluate)
        expected = [feed(setting, never, tokens[:, i : i + 1]) for i in range(keep)]
        assert_same(kept, expected)
        for leaf, other in zip(leaves(cache), leaves(never), strict=True):
            assert_same(shown(leaf), shown(other))
    assert [id(leaf) for leaf in leaves(cache)] == objects
    # More tokens, then another turn of a conversation, then more.
    for n in (1, 1, again, 1, 1):
        if n > 1 and setting.rows > 1:
            continue
        tokens = rng.integers(VOCAB, size=(setting.rows, n))
        assert_same([feed(setting, cache, tokens)], [feed(setting, never, tokens)])


@pytest.mark.parametrize("name", SETTINGS)
def test_nothing_waits_for_the_device(name):
    setting = SETTINGS[name]
    cache = setting.prompted(np.ones((setting.rows, 20), int))

    # MLX refuses to evaluate an array while it traces a function.
    @mx.compile
    def traced(tokens):
        return draft(setting, Rollback(cache), cache, tokens, 3, evaluate=False)

    assert len(traced(mx.ones((setting.rows, 8), mx.int32))) == 3


class Broken:
    """A layer's cache that the model cannot use."""

    def __getattr__(self, name):
        raise RuntimeError(name)


@pytest.mark.parametrize("keep", range(4))
@pytest.mark.parametrize(
    "name",
    ["KVCache", "RotatingKVCache", *SETTINGS.keys() & {"ChunkedKVCache of llama4"}],
)
def test_a_step_that_fails_half_way_is_undone(name, keep):
    setting = SETTINGS[name]
    tokens = np.arange(20)[None]
    cache, never = setting.prompted(tokens), setting.prompted(tokens)
    rollback = Rollback(cache)
    rollback.mark()
    for _ in range(3):
        rollback.step()
        feed(setting, cache, tokens[:, :1])
    rollback.step()
    before = dict(vars(cache[0]))
    with pytest.raises(RuntimeError):
        feed(setting, [*cache[:-1], Broken()], tokens[:, :1])
    assert [name for name, x in vars(cache[0]).items() if x is not before[name]]
    rollback.to(keep)
    for _ in range(keep):
        feed(setting, never, tokens[:, :1])
    for leaf, other in zip(cache, never, strict=True):
        seen, expected = shown(leaf), shown(other)
        if "chunk_size" in seen:  # the model cut its free slots off before it failed
            del seen["nbytes"], expected["nbytes"]
        assert_same(seen, expected)


@pytest.mark.parametrize(
    "name",
    [
        "QuantizedKVCache",
        "RotatingKVCache",
        *SETTINGS.keys() & {"ChunkedKVCache of llama4"},
        "CacheList of falcon_h1",
    ],
)
def test_caches_from_a_file(name, tmp_path):
    setting = SETTINGS[name]
    tokens = np.arange(20)[None]
    file = str(tmp_path / "cache.safetensors")
    mlx_lm_caches.save_prompt_cache(file, setting.prompted(tokens))
    cache, never = (mlx_lm_caches.load_prompt_cache(file) for _ in range(2))
    assert supported(cache)
    kept = draft(setting, Rollback(cache), cache, tokens[:, :8], 3, evaluate=True)
    assert_same(kept, [feed(setting, never, tokens[:, i : i + 1]) for i in range(3)])
    for leaf, other in zip(leaves(cache), leaves(never), strict=True):
        assert_same(shown(leaf), shown(other))


def test_arrays_that_a_step_changes_in_place():
    cache = mlx_lm_caches.ArraysCache(2, left_padding=[3, 1])
    cache.prepare(lengths=[9, 8])
    cache[0] = mx.zeros((2, 3))
    rollback = Rollback([cache])
    rollback.mark()
    for step in range(4):
        rollback.step()
        cache[0][:, step % 3] = step + 1
        cache[1] = cache[0] + 1
        cache.advance(1)
    rollback.to(2)
    assert cache[0].tolist() == [[1, 2, 0]] * 2
    assert cache[1].tolist() == [[2, 3, 1]] * 2
    assert cache.left_padding.tolist() == [1, -1]
    assert cache.lengths.tolist() == [7, 6]


def test_a_draft_longer_than_what_is_copied_at_a_time():
    setting = gemma(30)
    tokens = np.arange(48)[None]
    for keep in (0, 3, 16, 17, 31, 33, 40):
        cache, never = setting.prompted(tokens), setting.prompted(tokens)
        draft(setting, Rollback(cache), cache, tokens[:, :40], keep, evaluate=True)
        for i in range(keep):
            feed(setting, never, tokens[:, i : i + 1])
        for leaf, other in zip(cache, never, strict=True):
            assert_same(shown(leaf), shown(other))


def test_every_cache_of_mlx_lm_is_supported():
    base = mlx_lm_caches._BaseCache
    classes = [c for c in base.__subclasses__() if c.__module__ == base.__module__]
    assert len(classes) >= 9
    for cls in classes:
        cache = cls.__new__(cls)
        if cls is mlx_lm_caches.CacheList:
            cache.caches = (KVCache(),)
        known = cls is not mlx_lm_caches.ChunkedKVCache or not OLD_MLX_LM
        assert supported([KVCache(), cache]) is known, cls


def test_a_cache_that_is_not_known_is_refused():
    class Other(KVCache):
        pass

    for cache in ([KVCache(), Other()], [mlx_lm_caches.CacheList(Other(), KVCache())]):
        assert not supported(cache)
        with pytest.raises(ValueError, match="class Other cannot be rolled back"):
            Rollback(cache)


def test_what_cannot_be_undone_is_refused():
    cache = [KVCache()]
    cache[0].update_and_fetch(*mx.zeros((2, 1, 1, 4, 32)))
    rollback = Rollback(cache)
    rollback.mark()
    for n in (-1, 1):
        with pytest.raises(ValueError, match=f"cannot keep {n} of 0 steps"):
            rollback.to(n)
    rollback.step()
    cache[0] = cache[0].to_quantized(group_size=32, bits=8)
    with pytest.raises(ValueError, match="quantize KV caches between drafts"):
        rollback.to(0)
    # The draft has ended.
    with pytest.raises(ValueError, match="cannot keep 1 of 0 steps"):
        rollback.to(1)


@pytest.mark.parametrize("keep", range(5))
@pytest.mark.parametrize("replaces", [range(4), range(2, 4), [1]], ids=str)
def test_a_model_that_puts_other_caches_into_the_list(keep, replaces):
    """As mlx-vlm's Qwen3.5 does at each step of one sequence of a batch."""
    cache = [KVCache(), KVCache()]

    def feed(i, cache, replaced=False):
        for j, c in enumerate(cache):
            if replaced:
                cache[j] = c = copy.copy(c)
                c.keys, c.values = c.keys + 0, c.values + 0
            keys = mx.full((1, 1, 1, 4), float(10 * i + j))
            c.update_and_fetch(keys, -keys)

    for i in range(3):
        feed(i, cache)
    wanted = [KVCache(), KVCache()]
    for i in range(3 + keep):
        feed(i, wanted)
    rollback = Rollback(cache)
    rollback.mark()
    for i in range(4):
        rollback.step()
        feed(3 + i, cache, replaced=i in replaces)
    rollback.to(keep)
    assert [c.offset for c in cache] == [3 + keep] * 2
    for got, other in zip(cache, wanted, strict=True):
        for a, b in ((got.keys, other.keys), (got.values, other.values)):
            assert mx.array_equal(a[..., : 3 + keep, :], b[..., : 3 + keep, :])
    feed(99, cache)
    assert [c.offset for c in cache] == [4 + keep] * 2
