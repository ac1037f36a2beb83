"""How many launches a decode step adds after the body, counted in MLX's graphs.

    python benchmarks/launches.py

Small models wait for launches and the host, not for bytes. A launch is a primitive of
the graph that ``generate_step`` evaluates which makes something run: no view, no
constant. Kernels of this package count as one each. Nothing runs, so no GPU is needed:
the graph is the one that would be made for one. Exact decoding drafts in each step, and
verifies once for all positions of a chunk.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import click
import mlx.core as mx
from mlx_lm.sample_utils import make_sampler
from samplers import SAMPLERS

from mlx_flashhead.benchmarking.report import markdown_table
from mlx_flashhead.compute.table import Table
from mlx_flashhead.head import FlashHead
from mlx_flashhead.integration.samplers import read_sampler
from mlx_flashhead.kernels import backend
from mlx_flashhead.sampling import coupled, draw

VERIFY_EVERY = 16

# Primitives that change how an array is looked at, or stand for a constant.
_VIEWS = {
    *("AsStrided", "Broadcast", "BroadcastAxes", "ExpandDims", "Flatten", "Full"),
    *("Reshape", "Slice", "Split", "Squeeze", "StopGradient", "Transpose"),
    *("Unflatten", "View"),
}


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Context in which graphs are made as for a GPU, and the kernels only stand in
    them."""

    def launch(self: Any, inputs: Sequence[mx.array], **options: Any) -> list[mx.array]:
        made = [mx.zeros(shape, dtype) for shape, dtype in options["outputs"]]
        return mx.depends(made, list(inputs))

    device = SimpleNamespace(type=mx.DeviceType.gpu)
    with ExitStack() as stack:
        for owner, name, value in (
            (mx, "default_device", lambda: device),
            (mx.metal, "is_available", lambda: True),
            (backend, "largest_group", lambda variant, most, check: most),
            (backend.Kernel, "__call__", launch),
        ):
            stack.enter_context(patch.object(owner, name, value))
        yield


def launches(*arrays: mx.array) -> Counter[str]:
    """The primitives that launch something for arrays that are not evaluated."""
    with tempfile.NamedTemporaryFile("w+", suffix=".dot") as file:
        mx.export_to_dot(file, *arrays)
        file.flush()
        file.seek(0)
        names = re.findall(r'\[label ?= ?"([^"]+)", shape=rectangle\]', file.read())
    kernels = {"Depends": "kernel"}
    found = Counter(kernels.get(n.split(" ")[0], n.split(" ")[0]) for n in names)
    return Counter({n: k for n, k in found.items() if n not in _VIEWS})


def small_head(
    vocab_size: int = 4096, hidden_size: int = 64, biased: bool = False
) -> FlashHead:
    """A head of 8-bit rows and 4-bit centroids in bfloat16, clusters of 16."""
    c = vocab_size // 16
    rows = mx.random.normal((c, 16, hidden_size), key=mx.random.key(0))
    centroids = mx.random.normal((c, hidden_size), key=mx.random.key(1))
    head = FlashHead(
        Table.from_dense(rows.astype(mx.bfloat16), 8, 64),
        Table.from_dense(centroids.astype(mx.bfloat16), 4, 64),
        mx.arange(vocab_size, dtype=mx.uint32).reshape(c, 16),
        vocab_size,
        spread=mx.random.uniform(shape=(c,), key=mx.random.key(2)),
        excess=mx.zeros((1, c)),
        bias=mx.ones((c, 16), mx.bfloat16) if biased else None,
    )
    mx.eval(head.parameters())
    return head


def count(hidden_size: int = 64) -> dict[str, dict[str, Counter[str]]]:
    """Launches by sampler: of mlx-lm's dense head, of FlashHead's approximate draw or
    draft, which are the same, without and with a bias, and of the verification of a
    chunk."""
    head = small_head(hidden_size=hidden_size)
    biased = small_head(hidden_size=hidden_size, biased=True)
    h = mx.zeros((1, head.hidden_size), mx.bfloat16)
    states = mx.zeros((VERIFY_EVERY, head.hidden_size), mx.bfloat16)
    key = mx.random.key(3)
    keys = mx.array([[0, i] for i in range(VERIFY_EVERY)], mx.uint32)
    rows = head.rows.flat
    mx.eval(h, states, key, keys)
    found: dict[str, dict[str, Counter[str]]] = {}
    for name, options in SAMPLERS.items():
        sampler = make_sampler(**options)

        def dense(
            sampler: Callable[[mx.array], mx.array] = sampler,
        ) -> tuple[mx.array, ...]:
            logits = rows.matmul(h)
            logprobs = logits - mx.logsumexp(logits, keepdims=True)
            return sampler(logprobs), logprobs.squeeze(0)

        settings = read_sampler(sampler)
        assert settings is not None
        found[name] = {"mlx-lm, dense": launches(*dense())}
        with as_on_a_gpu():
            for way, step in (
                ("FlashHead", lambda s=settings: [draw(head, s, h, key).tokens]),
                ("with a bias", lambda s=settings: [draw(biased, s, h, key).tokens]),
                (
                    "verification",
                    lambda s=settings: list(
                        coupled.draw(head, s, head.clustered(states), keys)
                    ),
                ),
            ):
                step()  # the first is not compiled
                found[name][way] = launches(*step())
    return found


@click.command()
@click.option("--details", is_flag=True, help="Name the primitives.")
def main(details: bool) -> None:
    """Count the launches of a decode step after the body."""
    found = count()
    ways = list(next(iter(found.values())))
    table = [["sampler", *ways, f"exact, a token of {VERIFY_EVERY}"]]
    for name, each in found.items():
        totals = [c.total() for c in each.values()]
        exact = totals[1] + totals[-1] / VERIFY_EVERY
        table.append([name, *map(str, totals), f"{exact:.1f}"])
    click.echo(markdown_table(table))
    if details:
        for name, each in found.items():
            for way, counted in each.items():
                click.echo(f"{name}, {way}: {dict(counted)}")


if __name__ == "__main__":
    main()
