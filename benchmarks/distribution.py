"""The distribution that sampling implies, against the dense head's.

    python benchmarks/distribution.py --model FOLDER --text a.txt --text b.txt

At each temperature: KL(dense || FlashHead) in nats and total variation over the whole
vocabulary, for the folder's FlashHead and for sampling as the paper describes it (arXiv
2603.14591): clusters drawn by the softmax of their centroids' scores, then a token by
the softmax over theirs. Both read the same clusters. The reference is the folder's
dense head. The paper's way is averaged over fewer states, and FlashHead's figures on
just these stand beside it. ``--states`` also writes tables for benchmarks/draws.py.
"""

from __future__ import annotations

from pathlib import Path

import click
import mlx.core as mx
import numpy as np

from mlx_flashhead import load
from mlx_flashhead.evaluation.fidelity import measure
from mlx_flashhead.evaluation.states import hidden_states
from mlx_flashhead.folder.section import read_section
from mlx_flashhead.integration.locate import get_module, head_of, head_table

# Draws of p clusters over which the paper's scheme is averaged.
N_DRAWS = 64


@click.command(context_settings={"show_default": True})
@click.option("--model", "folder", required=True, help="A converted folder.")
@click.option("--text", "texts", multiple=True, required=True, help="A text file.")
@click.option("--tokens", default=1000, help="Tokens of each text, at most.")
@click.option("--paper-states", default=32, help="States of each for the paper's way.")
@click.option(
    "--temperature",
    "temperatures",
    multiple=True,
    type=float,
    default=[0.3, 0.5, 0.7, 1.0, 1.5, 2.0],
)
@click.option("--n-probes", type=int, help="Instead of the folder's.")
@click.option("--states", "states_path", help="Write tables of some states here.")
@click.option("--n-states", default=6, help="States of each text for that.")
def main(
    folder, texts, tokens, paper_states, temperatures, n_probes, states_path, n_states
) -> None:
    dense, tokenizer = load(folder, dense=True)
    path = read_section(folder).head_path
    weight = np.array(head_table(get_module(dense, path)).dequantize(mx.float32))
    sets = {}
    for text in texts:
        ids = tokenizer.encode(Path(text).read_text())[: tokens + 1]
        sets[Path(text).stem] = hidden_states(dense, path, ids)
    del dense
    model, _ = load(folder, n_probes=n_probes)
    head = head_of(model)
    click.echo(
        f"{head.n_probes} of {head.n_clusters} clusters probed, "
        f"{100 * head.rows_read() / head.vocab_size:.1f} % of the rows read"
    )
    click.echo(
        "KL / TV; the paper's with 1 cluster drawn, with p; ours on these states"
    )
    click.echo(
        f"{'text':10}{'T':>5}{'probed mass':>13}{'ours':>16}{'KL, logits':>12}"
        f"{'paper 1':>16}{'paper p':>16}{'ours there':>16}"
    )
    tables = {}
    for name, states in sets.items():
        found = measure(head, weight, states, temperatures=temperatures, details=True)
        click.echo(
            f"{name}: {len(states)} tokens, recall {100 * found.recall.mean():.2f} %, "
            f"agreement {100 * found.agreement.mean():.2f} %"
        )
        some = slice(None, None, max(1, len(states) // paper_states))
        for t in temperatures:
            ours = found.at[t]
            kl, tv = ours.kl(), ours.total_variation
            cells = [f"{name[:9]:10}{t:5.2f}{100 * ours.probed_mass.mean():12.2f}%"]
            cells.append(_cell(kl.mean(), tv.mean()))
            cells.append(f"{kl.mean() + ours.equal_shares.mean():12.4f}")
            cells += [_cell(*way) for way in papers(head, weight, states[some], t)]
            cells.append(_cell(kl[some].mean(), tv[some].mean()))
            click.echo("".join(cells))
        # The least certain states have the largest tails.
        order = np.argsort(found.at[max(temperatures)].probed_mass)
        picked = order[np.linspace(0, len(order) // 2, n_states).astype(int)]
        tables[name] = states[picked]
    if states_path:
        np.savez_compressed(states_path, **_tables(head, tables))
        click.echo(f"Wrote {states_path}")


def papers(head, weight: np.ndarray, states: np.ndarray, temperature: float):
    """Mean (KL, TV) of the paper's way of sampling, with one cluster drawn for each
    token, exactly, and with p drawn without replacement, averaged over N_DRAWS."""
    c, m = head.n_clusters, head.cluster_size
    order = np.array(head.token_ids).reshape(-1)
    real = order < head.vocab_size
    rows = np.array(head.rows.dequantize(mx.float32)).reshape(c * m, -1)
    rng = np.random.default_rng(0)
    results = []
    for h in states:
        reference = weight[np.minimum(order, head.vocab_size - 1)] @ h / temperature
        logits = np.where(real, rows @ h / temperature, -np.inf).reshape(c, m)
        p = np.exp(np.where(real, reference - reference.max(), -np.inf))
        p /= p.sum()
        scores = np.array(head.centroid_logits(mx.array(h[None])))[0] / temperature
        share = np.exp(scores - scores.max())
        share /= share.sum()
        own = np.logaddexp.reduce(logits, axis=1)
        one = (share[:, None] * np.exp(logits - own[:, None])).reshape(-1)
        many = np.zeros(c * m)
        for _ in range(N_DRAWS):
            gumbel = scores + rng.gumbel(size=c)
            drawn = np.argpartition(-gumbel, head.n_probes - 1)[: head.n_probes]
            total = np.logaddexp.reduce(own[drawn])
            many.reshape(c, m)[drawn] += np.exp(logits[drawn] - total) / N_DRAWS
        results.append([_differ(p, one), _differ(p, many)])
    return np.mean(results, axis=0)


def _cell(kl: float, tv: float) -> str:
    return f"{f'{kl:.4f} / {tv:.4f}':>16}"


def _differ(p: np.ndarray, q: np.ndarray) -> tuple[float, float]:
    """KL(p || q), where q is 0 taken for 1e-12, and total variation."""
    some = p > 0
    kl = (p[some] * np.log(p[some] / np.maximum(q[some], 1e-12))).sum()
    return kl, np.abs(p - q).sum() / 2


def _tables(head, states: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What draws need of a head for some states: every row's logit."""
    h = np.concatenate(list(states.values()))
    x = mx.array(h)
    everything = mx.broadcast_to(
        mx.arange(head.n_clusters, dtype=mx.uint32), (1, head.n_clusters)
    )
    logits = [np.array(head.score(x[i : i + 1], everything))[0] for i in range(len(h))]
    return {
        "names": np.repeat(list(states), [len(s) for s in states.values()]),
        "centroid_logits": np.array(head.centroid_logits(x)),
        "logits": np.array(logits, np.float32),
        "spread": np.array(head.spread),
        "excess": np.array(head.excess),
        "temperatures": np.array(head.temperatures),
        "tail_offset": np.array(head.tail_offset),
        "token_ids": np.array(head.token_ids),
        "sizes": np.array([head.vocab_size, head.hidden_size, head.n_probes]),
    }


if __name__ == "__main__":
    main()
