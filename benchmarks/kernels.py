"""Latency of one decode step through the head: dense against FlashHead.

Steps depend on each other (each adds a multiple of the token it chose to the next
hidden state) and are evaluated together, so launches count and host round trips do
not. Every step, dense or not, goes through ``mx.compile``, as the head's own does on a
GPU: building the graph anew would cost several times what the kernels do ("not
compiled" shows it). Everything is relative to the same run on the same device; random
weights have the bytes and the shapes of the models, which is what latency depends on.

"Exact" is a chunk of exact decoding, drafts and verification, divided by its tokens, as
if all drafts stood; its rows have 8 or 16 bits.

"Plain MLX" is the same head in MLX operations, its selection by ``mx.argpartition``.

MLX compiles CUDA kernels as they are first used, seconds each, and keeps them on disk:
``--shard 0/8`` to ``--shard 7/8`` side by side fill that store before the run that
counts.

``--stage-1``, ``--selection`` and ``--conversion`` time nothing but ways to do one
thing, in turn: stage 1 by MLX's product and by forms of the kernel, and the selection
with its keys in registers and made again in each pass, each alone and in the greedy
step; and what makes floats of quantized weights.

usage: python benchmarks/kernels.py [--steps 64] [--models NAME ...]
       [--batch-sizes 1 2 4 ...] [--shard I/N]
       [--stage-1] [--selection] [--conversion]
"""

import argparse
from contextlib import nullcontext
from functools import partial

import kernel_variants as variants
import mlx.core as mx

from mlx_flashhead import kernels
from mlx_flashhead.benchmarking.latency import chain, copy_bandwidth, dense_sample
from mlx_flashhead.compute.table import Table
from mlx_flashhead.head import FlashHead, masses
from mlx_flashhead.sampling import Settings, coupled
from mlx_flashhead.sampling.draw import _draw

# vocab_size, hidden_size
MODELS = {
    "Gemma-3-270M": (262_144, 640),
    "Gemma-3-1B": (262_144, 1152),
    "Qwen3-0.6B": (151_936, 1024),
    "Llama-3.2-1B": (128_256, 2048),
}
CLUSTER_SIZE = 16
TOP_P, TEMPERATURE = 0.95, 0.8
# Of exact decoding: one in so many clusters is probed for a draft.
DRAFT_ONE_IN, VERIFY_EVERY = 32, 16


class Head(FlashHead):
    """A head whose selection in plain MLX is what one would write: the reference
    settles ties, too, which is dearer."""

    def select(self, centroid_logits, n_probes=None):
        if kernels.kind() != "plain":
            return super().select(centroid_logits, n_probes)
        scores, p = centroid_logits + self.spread, n_probes or self.n_probes
        return mx.argpartition(-scores, kth=p - 1)[:, :p]


def measure(
    vocab_size: int,
    hidden_size: int,
    steps: int,
    batch_sizes: list[int],
    shard: tuple[int, int] = (0, 1),
) -> dict[str, float]:
    """Microseconds per step, by what was measured; of a shard, only its entries."""
    V, D, m = vocab_size, hidden_size, CLUSTER_SIZE
    C = V // m
    p = C // 16
    rows = mx.random.normal((V, D), scale=D**-0.5).astype(mx.bfloat16)
    states = mx.random.normal((max([1, *batch_sizes]), D)).astype(mx.bfloat16)
    token_ids = mx.random.permutation(V).astype(mx.uint32).reshape(C, m)
    spread = mx.random.uniform(shape=(C,))
    centroids = mx.quantize(rows.reshape(C, m, D).mean(1), group_size=64, bits=4)
    packed = {bits: mx.quantize(rows, group_size=64, bits=bits) for bits in (8, 4)}
    mx.eval(rows, states, token_ids, spread, centroids, packed)
    product = partial(mx.quantized_matmul, transpose=True, group_size=64)

    def dense(bits):
        if bits == 16:
            return lambda h: h @ rows.T
        return lambda h: product(h, *packed[bits], bits=bits)

    def scores(h):
        return product(h, *centroids, bits=4)

    def flash_head(bits, n_probes):
        table = Table(rows.reshape(C, m, -1))
        if bits < 16:
            blocks = (a.reshape(C, m, -1) for a in packed[bits])
            table = Table(*blocks, bits=bits, group_size=64)
        return Head(
            table,
            Table(*centroids, bits=4, group_size=64),
            token_ids,
            V,
            spread=spread,
            excess=mx.zeros((1, C)),
            n_probes=n_probes,
        )

    def of_masses(head, settings):
        temperatures = (1.0 if settings.greedy else settings.temp, 1.0)
        weights = [masses.log_weights(head, t) for t in temperatures]
        mx.eval(weights)
        return weights

    def whole(settings, bits=8):
        """The package's own draw: the probed tokens' best, or sampled among the whole
        vocabulary."""
        head = flash_head(bits, p)
        weights = of_masses(head, settings)
        return lambda h, key: _draw(head, settings, h, key, *weights)[0]

    def exact(settings, bits):
        """A chunk of exact decoding; each draft gives the next hidden state."""
        head = flash_head(bits, C // DRAFT_ONE_IN)
        weights = of_masses(head, settings)

        def step(h, key):
            keys = mx.random.split(key, VERIFY_EVERY)
            drafted, token = [], 0
            for i in range(VERIFY_EVERY):
                drafted.append(h)
                token = _draw(head, settings, h, keys[i], *weights)[0]
                h = h + (token[:, None] % 7).astype(h.dtype) * 1e-3
            logits = head.clustered(mx.concatenate(drafted))
            tokens, _ = coupled._draw(head, settings, 1024, logits, keys)
            return token + tokens.max()

        return step

    def parts(h, key, last):
        """The kernels' greedy step up to one of its launches."""
        got = of_centroids = scores(h)
        if last > 0:
            got = kernels.select_probes(got, p, spread=spread)
        if last > 1:
            blocks = [a.reshape(C, m, -1) for a in packed[8]]
            rows = kernels.Rows(h, *blocks, 8, 64, V)
            tail = kernels.Tail(of_centroids, spread, spread, lambda c: c, rows)
            shaping = kernels.Shaping(mx.bfloat16)
            draw = kernels.Draw(got, token_ids, shaping, tail)
            logits, summary = kernels.probe_blocks(rows, draw)
            got = logits if summary is None else summary[:, 0]
        return got[:, 0].astype(mx.uint32)

    timed = {"nothing": lambda h, key: h[:, 0].astype(mx.uint32)}
    for bits in (16, 8, 4):
        head = dense(bits)
        timed[f"dense {bits}-bit"] = lambda h, key, f=head: mx.argmax(f(h), -1)
    head = dense(8)
    timed["dense 8-bit, top-p"] = lambda h, key, f=head: dense_sample(
        f(h), key, TOP_P, TEMPERATURE
    )
    for bits in (16, 8, 4):
        timed[f"FlashHead {bits}-bit"] = whole(Settings(), bits)
    for name, filters in (
        ("top-p", {"top_p": TOP_P}),
        ("top-k 40", {"top_k": 40}),
        ("min-p", {"min_p": 0.05}),
        ("XTC", {"xtc_probability": 0.5}),
    ):
        timed[f"FlashHead 8-bit, {name}"] = whole(Settings(temp=TEMPERATURE, **filters))
    chunks = {
        f"exact {bits}-bit{name}": exact(settings, bits)
        for bits, name, settings in (
            (8, "", Settings()),
            (16, "", Settings()),
            (8, ", temperature", Settings(temp=TEMPERATURE)),
            (8, ", top-p", Settings(temp=TEMPERATURE, top_p=TOP_P)),
            (8, ", top-k 40", Settings(temp=TEMPERATURE, top_k=40)),
        )
    }
    timed["FlashHead 8-bit, temperature"] = whole(Settings(temp=TEMPERATURE))
    runs = []

    def add(name, function, batch_size=1, plain=False, **options):
        runs.append((name, function, batch_size, plain, options))

    for name, function in timed.items():
        add(name, function)
        if name.startswith("FlashHead"):
            add(f"{name}, plain MLX", function, plain=True)
    for name, function in chunks.items():
        add(name, function, chunk=VERIFY_EVERY)
    for name in ("dense 8-bit", "FlashHead 8-bit"):
        add(f"{name}, not compiled", timed[name], compiled=False)
    for last, name in enumerate(("stage 1", "+ select", "+ probe")):
        add(f"up to {name}", partial(parts, last=last))
    for B in batch_sizes:
        for name in (
            "dense 8-bit",
            "FlashHead 8-bit",
            "dense 8-bit, top-p",
            "FlashHead 8-bit, top-p",
        ):
            add(f"batch {B}: {name}", timed[name], B)
    result = {}
    for name, function, B, plain, options in runs[shard[0] :: shard[1]]:
        with kernels.plain() if plain else nullcontext():
            chunk = options.pop("chunk", 1)
            time_us = chain(function, states[:B] + 0, max(1, steps // chunk), **options)
            result[name] = time_us / chunk
    return result


def head_bytes(vocab_size: int, hidden_size: int, bits: int) -> tuple[float, float]:
    """Bytes that a decode step reads: the dense head, and FlashHead."""
    per_row = hidden_size * (bits / 8 + (4 / 64 if bits < 16 else 0))
    C = vocab_size // CLUSTER_SIZE
    centroids = C * (hidden_size * (4 / 8 + 4 / 64) + 4)
    return vocab_size * per_row, centroids + C // 16 * CLUSTER_SIZE * per_row


def show(result: dict[str, float], V: int, D: int, bandwidth: float) -> None:
    for name, time_us in result.items():
        print(f"  {name:44}{time_us:9.1f} us")
    for bits in (16, 8, 4):
        dense, flash = (1e6 * b / bandwidth for b in head_bytes(V, D, bits))
        print(
            f"  bytes alone, {bits}-bit: dense {dense:.1f} us, FlashHead {flash:.1f} us"
        )
    base = result["FlashHead 8-bit"]
    top_p = result["FlashHead 8-bit, top-p"]
    print(
        f"  greedy: {result['FlashHead 8-bit, plain MLX'] / base:.2f}x plain MLX, "
        f"{result['dense 16-bit'] / base:.2f}x dense 16-bit, "
        f"{result['dense 8-bit'] / base:.2f}x dense 8-bit, "
        f"{result['dense 4-bit'] / base:.2f}x dense 4-bit"
    )
    print(
        f"  top-p / greedy {top_p / base:.2f}, temperature / greedy "
        f"{result['FlashHead 8-bit, temperature'] / base:.2f}"
    )
    print(
        f"  top-p:  {result['FlashHead 8-bit, top-p, plain MLX'] / top_p:.2f}x plain "
        f"MLX, {result['dense 8-bit, top-p'] / top_p:.2f}x dense 8-bit",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=MODELS)
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=[])
    parser.add_argument("--shard", default="0/1", help="only compile a part")
    parser.add_argument(
        "--stage-1", action="store_true", help="compare ways to score centroids"
    )
    parser.add_argument(
        "--selection", action="store_true", help="compare ways to keep its keys"
    )
    parser.add_argument(
        "--conversion", action="store_true", help="compare ways to unpack weights"
    )
    options = parser.parse_args()
    from mlx_flashhead.kernels import doctor

    compared = [variants.stage_1] * options.stage_1
    compared += [variants.selection] * options.selection
    compared += [variants.conversion] * options.conversion
    if compared and kernels.kind() == "plain":
        print("no GPU back-end here: no kernel to compare")
        return
    print(doctor.describe())
    bandwidth = copy_bandwidth()
    print(f"back-end {kernels.kind()}, copy bandwidth {bandwidth / 1e9:.0f} GB/s")
    for name in options.models:
        V, D = MODELS[name]
        print(f"\n{name}: vocab_size {V}, hidden_size {D}", flush=True)
        for compare in compared:
            variants.show(compare(V, D, CLUSTER_SIZE, options.steps))
        if compared:
            continue
        shard = tuple(map(int, options.shard.split("/")))
        result = measure(V, D, options.steps, options.batch_sizes, shard)
        if shard == (0, 1):
            show(result, V, D, bandwidth)


if __name__ == "__main__":
    main()
