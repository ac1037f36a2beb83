"""Real draws against the distribution that they are to have: chi-square.

    python benchmarks/distribution.py --model FOLDER --text ... --states STATES.npz
    python benchmarks/draws.py STATES.npz --draws 200000

Every state's tokens are drawn by the package's own sampling, many at a time, from the
state's stored logits; the retrieval before it is the same for all. The expected
distribution is computed apart, in float64. Tokens expected fewer than 10 times are
counted together: those probed, and by cluster those that were not; what is left of
these, all in one. Runs on a GPU where there is one.
"""

from __future__ import annotations

import math
from pathlib import Path

import click
import mlx.core as mx
import numpy as np

from mlx_flashhead.compute.table import Table
from mlx_flashhead.head import FlashHead
from mlx_flashhead.head.masses import log_weights
from mlx_flashhead.sampling import Settings, draw

# Of made rows and states: the least that kernels take.
HIDDEN_SIZE = 32


def head_of(tables, centroid_logits: np.ndarray, logits: np.ndarray) -> FlashHead:
    """A head whose logits for the first unit vector are those of one state."""
    v, _, p = (int(n) for n in tables["sizes"])
    c, m = tables["token_ids"].shape
    centroids, rows = (
        np.zeros((c, HIDDEN_SIZE), "f"),
        np.zeros((c, m, HIDDEN_SIZE), "f"),
    )
    centroids[:, 0] = centroid_logits
    # Padded places have no logit, and the head does not read them.
    rows[..., 0] = np.where(np.isfinite(logits), logits, 0).reshape(c, m)
    return FlashHead(
        Table(mx.array(rows), bits=32),
        Table(mx.array(centroids), bits=32),
        mx.array(tables["token_ids"]),
        v,
        spread=mx.array(tables["spread"]),
        excess=mx.array(tables["excess"]),
        temperatures=tables["temperatures"].tolist(),
        tail_offset=tables["tail_offset"].tolist(),
        n_probes=p,
    )


def expected(head: FlashHead, centroid_logits, logits, temperature: float):
    """Probabilities ``[C, m]``, and whether each cluster was probed, in float64."""
    c, m = logits.shape
    probed = np.zeros(c, bool)
    probed[np.array(head.select(mx.array(centroid_logits[None])))[0]] = True
    logits = logits.astype(np.float64) / temperature
    own = np.logaddexp.reduce(logits, axis=1)
    weights = np.array(log_weights(head, temperature), np.float64)
    mass = np.where(
        probed, own, centroid_logits.astype(np.float64) / temperature + weights
    )
    mass -= np.logaddexp.reduce(mass)
    return np.exp(logits - own[:, None] + mass[:, None]), probed


def chi_square(counts: np.ndarray, p: np.ndarray, probed: np.ndarray):
    """Statistic, degrees of freedom and p-value (Wilson and Hilferty's normal
    approximation) of ``counts [C, m]``."""
    n = counts.sum()
    often = n * p >= 10
    seen, due = [counts[often]], [n * p[often]]
    rest_seen, rest_due = np.where(often, 0, counts), np.where(often, 0, n * p)
    by_cluster = (rest_due.sum(1) >= 10) & ~probed
    seen.append(rest_seen[by_cluster].sum(1))
    due.append(rest_due[by_cluster].sum(1))
    for some in (probed, ~probed & ~by_cluster):
        seen.append([rest_seen[some].sum()])
        due.append([rest_due[some].sum()])
    seen, due = np.concatenate(seen), np.concatenate(due)
    keep = due >= 5
    lost = (due[~keep].sum(), seen[~keep].sum())
    statistic = ((seen - due)[keep] ** 2 / due[keep]).sum()
    k = keep.sum() - 1
    spread = math.sqrt(2 / (9 * k)) if k else 1
    z = ((statistic / k) ** (1 / 3) - 1 + 2 / (9 * k)) / spread if k else 0
    return statistic, k, 0.5 * math.erfc(z / math.sqrt(2)), lost


@click.command(context_settings={"show_default": True})
@click.argument("path", type=click.Path(exists=True))
@click.option("--draws", default=200_000)
@click.option("--batch", default=1000, help="Draws at a time.")
@click.option("--temperature", "temperatures", multiple=True, type=float, default=[1.0])
@click.option("--seed", default=0)
def main(path, draws, batch, temperatures, seed) -> None:
    tables = dict(np.load(path))
    click.echo(f"{Path(path).name}, {draws:,} draws each, {mx.default_device()}")
    click.echo(
        f"{'state':26}{'T':>5}{'tail mass':>11}{'drawn':>9}"
        f"{'chi2':>10}{'dof':>7}{'p':>9}"
    )
    worst = []
    for i, name in enumerate(tables["names"]):
        centroid_logits, logits = tables["centroid_logits"][i], tables["logits"][i]
        head = head_of(tables, centroid_logits, logits)
        for t in temperatures:
            p, probed = expected(head, centroid_logits, logits, t)
            counts = np.zeros(head.vocab_size, np.int64)
            for j in range(draws // batch):
                key = mx.array([seed, i * draws + j], dtype=mx.uint32)
                x = mx.zeros((batch, HIDDEN_SIZE))
                x[:, 0] = 1
                found = draw(head, Settings(temp=t), x, key)
                counts += np.bincount(np.array(found.tokens), minlength=len(counts))
            order = tables["token_ids"].reshape(-1)
            real = order < head.vocab_size
            laid = np.where(real, counts[np.minimum(order, len(counts) - 1)], 0)
            laid = laid.reshape(p.shape)
            statistic, k, value, _ = chi_square(laid, p, probed)
            worst.append(value)
            click.echo(
                f"{name[:22] + ' ' + str(i):26}{t:5.2f}{p[~probed].sum():11.5f}"
                f"{laid[~probed].sum() / laid.sum():9.5f}"
                f"{statistic:10.1f}{k:7}{value:9.4f}"
            )
    # Of n honest p-values the smallest is below x with probability 1 - (1 - x)^n.
    low, n = min(worst), len(worst)
    click.echo(
        f"smallest of {n} p-values {low:.4f}: {1 - (1 - low) ** n:.3f} by chance"
    )


if __name__ == "__main__":
    main()
