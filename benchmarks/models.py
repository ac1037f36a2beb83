"""Whole models of real shapes and made weights: dense, approximate and exact decoding.

    python benchmarks/models.py [MODEL ...]

Through mlx-lm's own ``generate_step``, some tokens of each in turn: a host whose speed
drifts is as slow for all of them. Ratios are those of all rounds together, with the
quartiles of single ones. Weights are made at random, for speed does not depend on them,
but rows of a cluster resemble each other and logits are as peaked as a language
model's, so that drafts stand about as often. ``--host`` adds where the time of a step
goes, steps in turn as well: to build its graph, to submit it, and to wait for the
device.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from typing import Any

import click
import mlx.core as mx
import mlx.nn as nn
from in_turn import TURN, in_turn, mean, quartiles, ratio
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_sampler
from samplers import SAMPLERS

from mlx_flashhead import patch_decoding, unpatch, verification
from mlx_flashhead.benchmarking import decoding
from mlx_flashhead.benchmarking.report import markdown_table
from mlx_flashhead.compute.table import Table
from mlx_flashhead.head import FlashHead
from mlx_flashhead.integration.keys import Keys
from mlx_flashhead.integration.locate import head_of, place
from mlx_flashhead.integration.samplers import read_sampler
from mlx_flashhead.integration.slots import FlashLinear, hidden_state
from mlx_flashhead.kernels import doctor
from mlx_flashhead.sampling import coupled, draw
from mlx_flashhead.sampling.draw import known_transform

_COMMON = {"rms_norm_eps": 1e-6, "max_position_embeddings": 32768}
# Module of mlx-lm and its arguments; all are tied.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma-3-270m": (
        "gemma3_text",
        {
            **_COMMON,
            "model_type": "gemma3_text",
            "hidden_size": 640,
            "num_hidden_layers": 18,
            "intermediate_size": 2048,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "vocab_size": 262_144,
            "query_pre_attn_scalar": 256,
            "sliding_window": 512,
            "sliding_window_pattern": 6,
        },
    ),
    "gemma-3-1b": (
        "gemma3_text",
        {
            **_COMMON,
            "model_type": "gemma3_text",
            "hidden_size": 1152,
            "num_hidden_layers": 26,
            "intermediate_size": 6912,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "vocab_size": 262_144,
            "query_pre_attn_scalar": 256,
            "sliding_window": 512,
            "sliding_window_pattern": 6,
        },
    ),
    "qwen3-0.6b": (
        "qwen3",
        {
            **_COMMON,
            "model_type": "qwen3",
            "hidden_size": 1024,
            "num_hidden_layers": 28,
            "intermediate_size": 3072,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151_936,
            "rope_theta": 1e6,
            "tie_word_embeddings": True,
        },
    ),
    "llama-3.2-1b": (
        "llama",
        {
            **_COMMON,
            "model_type": "llama",
            "hidden_size": 2048,
            "num_hidden_layers": 16,
            "intermediate_size": 8192,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "vocab_size": 128_256,
            "rope_theta": 5e5,
            "tie_word_embeddings": True,
        },
    ),
}
CLUSTER_SIZE = 16
# Standard deviation of the logits: the likeliest token then has most of the mass.
SPREAD = 8.0


def body(name: str, bits: int) -> nn.Module:
    """A model, its weights at random, quantized."""
    mx.random.seed(0)
    module, arguments = MODELS[name]
    classes = importlib.import_module(f"mlx_lm.models.{module}")
    model = classes.Model(classes.ModelArgs.from_dict(arguments))
    model.tie_word_embeddings = True
    model.pop("lm_head", None)
    model.set_dtype(mx.bfloat16)
    v, d = arguments["vocab_size"], arguments["hidden_size"]
    means = mx.random.normal((v // CLUSTER_SIZE, 1, d))
    rows = means + 0.3 * mx.random.normal((v // CLUSTER_SIZE, CLUSTER_SIZE, d))
    rows = rows * (SPREAD / d**0.5)
    model.model.embed_tokens.weight = rows.reshape(v, d).astype(mx.bfloat16)
    nn.quantize(model, 64, bits)
    mx.eval(model.parameters())
    return model


def flash(name: str, bits: int, exact: bool) -> nn.Module:
    """The same with a FlashHead over the same rows."""
    model = body(name, bits)
    table = model.model.embed_tokens
    v = MODELS[name][1]["vocab_size"]
    c = v // CLUSTER_SIZE
    arrays = [table.weight, table.scales, table.biases]
    rows = Table(
        *(a.reshape(c, CLUSTER_SIZE, -1) for a in arrays), bits=bits, group_size=64
    )
    means = rows.dequantize(mx.float32).mean(1).astype(mx.bfloat16)
    head = FlashHead(
        rows,
        Table.from_dense(means, 4, 64),
        mx.arange(v, dtype=mx.uint32).reshape(c, CLUSTER_SIZE),
        v,
        spread=mx.zeros(c),
        excess=mx.zeros((1, c)),
        n_probes=c // (32 if exact else 16),
    )
    place(model, "model.embed_tokens", head)
    slot = model.model.embed_tokens
    assert isinstance(slot, FlashLinear)
    if exact:
        slot.decoding, slot.verify_every = "exact", 16
    mx.eval(model.parameters())
    return model


def speeds(
    models: dict[str, nn.Module],
    sampler: str,
    rounds: int,
    batch_size: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of a step by each way of decoding, round by round."""

    def prepare(way: str) -> None:
        unpatch() if way == "dense" else patch_decoding()

    n, prompts = TURN * (rounds + 2), [list(range(5, 37))] * batch_size
    streams = {}
    for way, model in models.items():
        own = make_sampler(**SAMPLERS[sampler])
        streams[way] = decoding.steps(model, prompts, own, n)
    found = in_turn(streams, prepare, rounds, clock=clock)
    for stream in streams.values():
        stream.close()
    unpatch()
    return found


def host(
    steps: dict[str, Callable[[mx.array], list[mx.array]]],
    states: dict[str, mx.array],
    n: int = 120,
) -> dict[str, list[str]]:
    """Median microseconds of steps that wait for the one before, in turn: to build the
    graph, to submit it, and to wait. A step's first array is its next one's input."""
    spent: dict[str, list[tuple[float, float, float]]] = {name: [] for name in steps}
    for _ in range(n):
        for name, step in steps.items():
            begin = time.perf_counter()
            arrays = step(states[name])
            built = time.perf_counter()
            mx.async_eval(*arrays)
            submitted = time.perf_counter()
            mx.eval(*arrays)
            states[name] = arrays[0]
            spent[name].append(
                (built - begin, submitted - built, time.perf_counter() - submitted)
            )
    return {
        name: [f"{1e6 * quartiles(each)[1]:.0f}" for each in zip(*times, strict=True)]
        for name, times in spent.items()
    }


def host_rows(name: str, models: dict[str, nn.Module], sampler: str) -> list[list[str]]:
    """What :func:`host` finds of a dense step, of an approximate one, of a drafted one,
    and of a verification, the body left out of that."""
    sample = make_sampler(**SAMPLERS[sampler])
    settings = read_sampler(sample)
    steps: dict[str, Callable[[mx.array], list[mx.array]]] = {}
    for way in ("dense", "approximate", "exact"):
        model = models[way]
        head = head_of(model)
        cache = make_prompt_cache(model)
        keys = Keys()

        def dense(token: mx.array, model=model, cache=cache) -> list[mx.array]:
            logits = model(token[None], cache=cache)[:, -1]
            logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            return [sample(logprobs), logprobs]

        def drawn(token: mx.array, model=model, head=head, cache=cache, keys=keys):
            h = hidden_state(head, model, token[None], cache=cache)[:, -1]
            return [draw(head, settings, h, keys.next(settings)).tokens]

        what = "a draft" if way == "exact" else way
        steps[what] = dense if way == "dense" else drawn
    states = {what: mx.array([7]) for what in steps}
    keys = mx.random.split(mx.random.key(0), 16)

    def verification(states: mx.array) -> list[mx.array]:
        logits = known_transform(head)(head.clustered(states))
        tokens = coupled.draw(head, settings, logits, keys).tokens
        return [states + 0 * tokens[:, None].astype(states.dtype), tokens]

    what = "a verification of 16"
    steps[what] = verification
    states[what] = mx.random.normal((16, head.hidden_size)).astype(mx.bfloat16)
    return [[name, sampler, what, *row] for what, row in host(steps, states).items()]


@click.command(context_settings={"show_default": True})
@click.argument("names", nargs=-1, type=click.Choice(list(MODELS)))
@click.option("--bits", default=8)
@click.option("--rounds", default=20, help=f"Of {TURN} tokens of each.")
@click.option("--samplers", default="greedy,top-p,top-k,temperature")
@click.option("--host/--no-host", "show_host", default=False)
def main(names, bits, rounds, samplers, show_host):
    """Decode with made models: dense, approximate, exact."""
    click.echo(doctor.describe())
    times = [["model", "sampler", "step", "build, us", "submit, us", "wait, us"]]
    table = [
        [
            *("model", "sampler", "dense", "approximate", "exact"),
            *("approximate / dense (quartiles)", "exact / dense (quartiles)"),
            *("drafts that stood", "thrown away"),
        ]
    ]
    # Decoding as it is set: ``tuning.py`` shows what is chosen.
    for name in names or MODELS:
        models = {
            "dense": body(name, bits),
            "approximate": flash(name, bits, False),
            "exact": flash(name, bits, True),
        }
        for sampler in samplers.split(","):
            with verification() as count:
                found = speeds(models, sampler, rounds)
            table.append(
                [
                    *(name, sampler),
                    *(f"{1 / mean(s):.1f}" for s in found.values()),
                    ratio(found["dense"], found["approximate"]),
                    ratio(found["dense"], found["exact"]),
                    f"{100 * count.acceptance:.1f} %",
                    f"{100 * count.waste:.1f} %",
                ]
            )
            click.echo(" | ".join(table[-1]))
            if show_host:
                times += host_rows(name, models, sampler)
    click.echo(markdown_table(table, left=2))
    if show_host:
        click.echo(f"\n{markdown_table(times, left=3)}")


if __name__ == "__main__":
    main()
