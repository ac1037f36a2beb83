"""In 16 bits, the best token by one dense product of one state and of several.

    python benchmarks/exact_ties.py --model FOLDER --save STATES.npz
    python benchmarks/exact_ties.py --states STATES.npz

Exact decoding promises stock mlx-lm's tokens. Stock mlx-lm multiplies one state at a
time, exact decoding several; a sum in another order may round to another 16-bit number,
and to another token where two are almost as likely. This counts how often it does, with
states of real text and the head's own rows. The first command writes both, from a
folder; the second needs nothing else, so it runs on another machine.

Stock's choice is the argmax of ``logits - logsumexp(logits)`` of one state. Counted are
the states for which the same of k states at once differs, and
``mlx_flashhead.sampling.coupled.draw``, greedy, on the head's rows in cluster order,
for one state and for k. A difference is a tie where the two tokens' logits, by one
state, are at most one unit in the last place apart.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import click
import mlx.core as mx
import numpy as np
from mlx_flashhead.convert.collect import read_documents

from mlx_flashhead import load
from mlx_flashhead.compute.table import Table
from mlx_flashhead.evaluation.states import hidden_states
from mlx_flashhead.folder.section import read_section
from mlx_flashhead.head import FlashHead
from mlx_flashhead.integration.locate import get_module, head_of, head_table
from mlx_flashhead.sampling import Settings, coupled

PASSAGES = Path(__file__).parents[1] / "tests/data/passages.jsonl"
AT_ONCE = (2, 4, 8, 16, 32)
DTYPES = {"bfloat16": mx.bfloat16, "float16": mx.float16}


def save(folder: str, path: str, texts: tuple[str, ...]) -> None:
    """Write the states of texts, the head's rows and their order."""
    model, tokenizer = load(folder, dense=True)
    head_path = read_section(folder).head_path
    table = head_table(get_module(model, head_path))
    states = np.concatenate(
        [
            hidden_states(model, head_path, tokenizer.encode(document))
            for text in texts or (PASSAGES,)
            for document in read_documents(text)
        ]
    )
    rows = table.dequantize(mx.bfloat16)
    head = head_of(load(folder)[0])
    np.savez_compressed(
        path,
        states=states.astype(np.float32),
        rows=np.array(rows.view(mx.uint16)),
        token_ids=np.array(head.token_ids),
    )
    click.echo(f"Wrote {path}: {states.shape[0]:,} states, {rows.shape[0]:,} rows")


def read_heads(rows: mx.array, ids: mx.array, bits: int) -> tuple[Table, FlashHead]:
    """The rows as a model has them, ``[V, D]``, and in cluster order."""
    v = len(rows)
    table = Table.from_dense(rows, bits, 0 if bits == 16 else 64)
    index = mx.where(ids < v, ids, 0)
    c = len(ids)
    head = FlashHead(
        table.map(lambda a: a[index]),
        Table(mx.zeros((c, 32)), bits=32),
        ids,
        v,
        spread=mx.zeros(c),
        excess=mx.zeros((1, c)),
    )
    mx.eval(table.arrays, head.parameters())
    return table, head


def at_once(x: mx.array, k: int) -> Iterator[mx.array]:
    """All states, k at a time; the last group has what is left."""
    for i in range(0, len(x), k):
        yield x[i : i + k]


def best(table: Table, x: mx.array) -> mx.array:
    """mlx-lm's greedy choice ``[k]`` for states ``[k, D]``."""
    logits = table.matmul(x)
    return mx.argmax(logits - mx.logsumexp(logits, axis=-1, keepdims=True), axis=-1)


def drawn(head: FlashHead, x: mx.array) -> mx.array:
    """The same by exact decoding."""
    return coupled.draw(
        head, Settings(), head.clustered(x), mx.zeros((len(x), 2), mx.uint32)
    ).tokens


def choices(choose, x: mx.array, k: int) -> np.ndarray:
    found = []
    for group in at_once(x, k):
        found.append(choose(group))
        mx.eval(found[-1])
    return np.concatenate([np.array(f).astype(np.int64) for f in found])


def gaps(table: Table, x: mx.array, a: np.ndarray, b: np.ndarray) -> list[float]:
    """By how many units in the last place the logits of two tokens differ, by the
    product of one state."""
    found = []
    for i in range(len(x)):
        logits = table.matmul(x[i : i + 1])[0]
        pair = [logits[int(t)].item() for t in (a[i], b[i])]
        size = max(abs(n) for n in pair)
        bits = 7 if logits.dtype == mx.bfloat16 else 10
        unit = 2.0 ** (np.floor(np.log2(size)) - bits)
        found.append(abs(pair[0] - pair[1]) / unit)
    return found


def ties(table: Table, x: mx.array) -> int:
    """States with more than one best token."""
    n = 0
    for group in at_once(x, 1):
        logits = table.matmul(group)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        n += ((logprobs == logprobs.max()).sum() > 1).item()
    return n


def measure(table: Table, head: FlashHead, x: mx.array) -> None:
    stock = choices(lambda y: best(table, y), x, 1)
    click.echo(f"  ties for the best: {ties(table, x)} of {len(x):,} states")
    for name, choose in (
        ("MLX's own product", lambda y: best(table, y)),
        ("exact decoding", lambda y: drawn(head, y)),
    ):
        for k in (1, *AT_ONCE):
            found = choices(choose, x, k)
            (differ,) = np.nonzero(found != stock)
            some = mx.array(differ.astype(np.uint32))
            far = []
            if len(differ):
                far = gaps(table, x[some], found[differ], stock[differ])
            click.echo(
                f"  {name:18}{k:4} at once: {len(differ):4} of {len(found):,} differ "
                f"({100 * len(differ) / len(found):.2f} %), "
                f"{sum(gap > 1 for gap in far)} of them by more than one unit"
            )


@click.command(context_settings={"show_default": True})
@click.option("--model", "folder", help="A converted folder, for --save.")
@click.option("--text", "texts", multiple=True, help="Texts, for --save.")
@click.option("--save", "written", help="Write states and rows here.")
@click.option("--states", "path", help="Measure what --save has written.")
@click.option("--limit", default=0, help="States, at most; 0 for all.")
@click.option("--bits", multiple=True, type=int, default=[16, 8], help="Of the rows.")
def main(folder, texts, written, path, limit, bits) -> None:
    if written:
        if not folder:
            raise click.UsageError("--save needs --model")
        save(folder, written, texts)
    if not path:
        if not written:
            raise click.UsageError("give --save or --states")
        return
    stored = np.load(path)
    states, ids = mx.array(stored["states"]), mx.array(stored["token_ids"])
    states = states[:limit] if limit else states
    own = mx.array(stored["rows"]).view(mx.bfloat16)
    click.echo(f"{path}: {own.shape[0]:,} x {own.shape[1]}, {mx.default_device()}")
    for name, dtype in DTYPES.items():
        for n in bits:
            start = time.perf_counter()
            table, head = read_heads(own.astype(dtype), ids, n)
            click.echo(f"{name}, rows of {n} bits")
            measure(table, head, states.astype(dtype))
            click.echo(f"  {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
