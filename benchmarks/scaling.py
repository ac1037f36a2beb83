"""The head alone: how its latency grows with V, D, p, the batch and the bits.

    python benchmarks/scaling.py [--json OUT]

One size is varied at a time, about a base. Weights are made: clusters are random, for
latency does not depend on values. Measured as benchmarks/kernels.py does, by chains of
dependent steps; each of the chains of a sweep takes its turn. "Bytes" are what a step
reads of the head, and the share is that of the bandwidth of a large copy, measured on
the same device: what the bytes would take at that speed, of what the step takes.

On a GPU the sizes are those of models, and kernels are compiled first by processes side
by side, for MLX keeps them on disk. On a CPU V is an eighth, D a half, and what is not
quantized is in float32.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click
import mlx.core as mx

from mlx_flashhead import FlashHead, kernels
from mlx_flashhead.benchmarking.latency import (
    chained,
    copy_bandwidth,
    dense_sample,
    on_gpu,
    spread,
)
from mlx_flashhead.benchmarking.report import footer, machine, markdown_table
from mlx_flashhead.compute.table import Table
from mlx_flashhead.sampling import Settings
from mlx_flashhead.sampling.draw import draw

CLUSTER_SIZE, GROUP_SIZE = 16, 64
GREEDY, TOP_P = Settings(), Settings(temp=0.8, top_p=0.95)


@dataclass(frozen=True)
class Size:
    """A head, and how many states it is given: V, D, clusters / p, B, bits of rows."""

    vocab_size: int = 128 << 10
    hidden_size: int = 1024
    clusters_per_probe: int = 16
    batch_size: int = 1
    bits: int = 8


SWEEPS = {
    "vocab_size": [n << 10 for n in (32, 64, 128, 256, 512)],
    "hidden_size": [512, 1024, 2048, 4096],
    "clusters_per_probe": [64, 32, 16, 8, 4],
    "batch_size": [1, 2, 4, 8, 16],
    "bits": [4, 8, 16],
}


def sweeps() -> dict[str, list[Size]]:
    """Sizes by what is varied; on a CPU an eighth of V and half of D."""
    base, found = Size(), {}
    for field, values in SWEEPS.items():
        found[field] = [replace(base, **{field: value}) for value in values]
    if on_gpu():
        return found

    def smaller(s: Size) -> Size:
        v, d = s.vocab_size // 8, s.hidden_size // 2
        return replace(s, vocab_size=v, hidden_size=d)

    return {field: [smaller(s) for s in sizes] for field, sizes in found.items()}


def made_table(shape: tuple[int, ...], bits: int, dtype: mx.Dtype) -> Table:
    """A table of random rows: packed weights at random, not packed from rows."""
    if bits == 16:
        weight = mx.random.normal(shape) * shape[-1] ** -0.5
        return Table(weight.astype(dtype), bits=8 * dtype.size)
    *rows, d = shape
    words = mx.random.randint(0, 1 << 31, (*rows, d * bits // 32), mx.uint32)
    scales = mx.random.uniform(0.5, 1.5, (*rows, d // GROUP_SIZE)) * d**-0.5
    scales = (scales / (1 << bits)).astype(dtype)
    biases = -scales * (1 << bits - 1)
    return Table(words, scales, biases, bits=bits, group_size=GROUP_SIZE)


def made_head(size: Size, dtype: mx.Dtype) -> FlashHead:
    v, d, m = size.vocab_size, size.hidden_size, CLUSTER_SIZE
    c = v // m
    head = FlashHead(
        made_table((c, m, d), size.bits, dtype),
        made_table((c, d), 4, dtype),
        mx.random.permutation(v).astype(mx.uint32).reshape(c, m),
        v,
        spread=mx.random.uniform(shape=(c,)),
        excess=mx.zeros((1, c)),
        n_probes=c // size.clusters_per_probe,
    )
    mx.eval(head.parameters())
    return head


def chains_of(size: Size, steps: int) -> dict[str, tuple]:
    """Chains of a size by name, each with the bytes that a step of it reads."""
    dtype = mx.bfloat16 if on_gpu() else mx.float32
    head = made_head(size, dtype)
    start = mx.random.normal((size.batch_size, size.hidden_size)).astype(dtype)
    rows = head.rows.map(lambda a: a.reshape(-1, a.shape[-1]))
    centroids = head.centroids.nbytes + head.spread.nbytes
    probed = size.batch_size * (head.bytes_read() - centroids)
    flash_bytes = centroids + min(probed, head.rows.nbytes)

    def dense(h, key):
        return mx.argmax(rows.matmul(h), -1)

    def dense_top_p(h, key):
        return dense_sample(rows.matmul(h), key, TOP_P.top_p, TOP_P.temp)

    def flash(settings):
        # Fills what a compiled step must find ready.
        mx.eval(draw(head, settings, start, mx.random.key(0)).tokens)
        return lambda h, key: draw(head, settings, h, key).tokens

    steps_of = {
        "dense": (dense, rows.nbytes),
        "dense, top-p": (dense_top_p, rows.nbytes),
        "FlashHead": (flash(GREEDY), flash_bytes),
        "FlashHead, top-p": (flash(TOP_P), flash_bytes),
    }
    return {
        name: (chained(step, start, steps), n_bytes)
        for name, (step, n_bytes) in steps_of.items()
    }


def measure(size: Size, steps: int, repeats: int, bandwidth: float) -> dict:
    """Latencies of a size, in microseconds per step."""
    chains = chains_of(size, steps)
    times: dict[str, list[float]] = {name: [] for name in chains}
    for _ in range(repeats):
        for name, (run, _) in chains.items():
            times[name].append(1e6 * run())
    found: dict = {"size": asdict(size)}
    for name, (_, n_bytes) in chains.items():
        us = spread(times[name])
        share = 1e6 * n_bytes / bandwidth / us["median"]
        found[name] = us | {"bytes": n_bytes, "bandwidth_share": share}
    return found


def show(field: str, results: list[dict]) -> None:
    names = [n for n in results[0] if n != "size"]
    header = [field, *(f"{n}, us" for n in names), "x greedy", "x top-p"]
    header += ["FlashHead MB", "its share of copy"]
    table = [header]
    for found in results:
        us = {n: found[n]["median"] for n in names}
        flash = found["FlashHead"]
        value = found["size"][field]
        table.append(
            [
                f"C / {value}" if field == "clusters_per_probe" else f"{value:,}",
                *(f"{us[n]:,.1f}" for n in names),
                f"{us['dense'] / us['FlashHead']:.2f}",
                f"{us['dense, top-p'] / us['FlashHead, top-p']:.2f}",
                f"{flash['bytes'] / 1e6:.2f}",
                f"{100 * flash['bandwidth_share']:.0f} %",
            ]
        )
    click.echo(f"\n{markdown_table(table)}")


def compile_first(jobs: int, names: list[str]) -> None:
    """Compile the kernels of all sizes, in processes side by side."""
    command = [sys.executable, __file__, "--sweeps", ",".join(names), "--shard"]
    processes = [
        subprocess.Popen([*command, f"{i}/{jobs}"], stdout=subprocess.DEVNULL)
        for i in range(jobs)
    ]
    codes = [p.wait() for p in processes]
    if any(codes):
        click.echo("Warning: kernels could not all be compiled in advance", err=True)


@click.command(context_settings={"show_default": True})
@click.option("--steps", type=int, help="[default: 64 on a GPU, 4 on a CPU]")
@click.option("--repeats", default=5)
@click.option("--sweeps", "names", default=",".join(SWEEPS), help="What to vary.")
@click.option("--jobs", default=16, help="Processes that compile first, on a GPU.")
@click.option("--shard", hidden=True, help="I/N: only compile a part.")
@click.option("--json", "json_path", help="Write the figures here, too.")
def main(steps, repeats, names, jobs, shard, json_path):
    """Latency of the head alone against its sizes; made weights."""
    names = names.split(",")
    if unknown := set(names) - set(SWEEPS):
        raise click.ClickException(
            f"--sweeps {', '.join(unknown)}: choose of {', '.join(SWEEPS)}"
        )
    planned = {name: sizes for name, sizes in sweeps().items() if name in names}
    every = list(dict.fromkeys(s for sizes in planned.values() for s in sizes))
    if shard:
        i, n = map(int, shard.split("/"))
        for size in every[i::n]:
            for run, _ in chains_of(size, 2).values():
                run()
        return
    if on_gpu() and jobs > 1:
        compile_first(min(jobs, len(every), os.cpu_count() or 1), names)
    steps = steps or (64 if on_gpu() else 4)
    bandwidth = copy_bandwidth()
    click.echo(
        f"Made weights; base: {sweeps()['bits'][1]}, p = C / 16. Microseconds per "
        f"step, medians of {repeats} chains of {steps}. Copy bandwidth "
        f"{bandwidth / 1e9:.0f} GB/s, back-end {kernels.kind()}."
    )
    done: dict[Size, dict] = {}
    results = {}
    for name, sizes in planned.items():
        for size in sizes:
            if size not in done:
                done[size] = measure(size, steps, repeats, bandwidth)
                mx.clear_cache()
        results[name] = [done[size] for size in sizes]
        show(name, results[name])
    about = machine()
    command = shlex.join(["python", "benchmarks/scaling.py", *sys.argv[1:]])
    click.echo(f"\n{footer(about, command)}")
    if json_path:
        figures = {
            "made_weights": True,
            "machine": about,
            "copy_bytes_per_second": bandwidth,
            "steps": steps,
            "repeats": repeats,
            "sweeps": results,
        }
        Path(json_path).write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
