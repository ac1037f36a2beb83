"""Exact decoding's draws against mlx-lm's dense sampler: chi-square.

    python benchmarks/exact_draws.py --model FOLDER

States of real text, from the most certain to the least. The draws are those of
``mlx_flashhead.sampling.coupled.draw`` with the keys of positions; what is expected
comes from the plain model's own logits and mlx-lm's own filters. What a draw keeps
depends on the logits and XTC's coin alone, so it is computed once for all keys of a
state, and the noise of a key serves all states and settings; Bonferroni's bound holds
for tests that share it. The first keys of each are given to the whole ``draw``, too,
and have to get the same tokens there. "Outside" counts draws of tokens that mlx-lm's
filters drop: its float32 sum of a whole vocabulary moves the edge of top-p by a token
now and then.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import click
import mlx.core as mx
import numpy as np
from draws import chi_square
from mlx_flashhead.convert.collect import read_documents
from mlx_lm.sample_utils import make_sampler

from mlx_flashhead import load
from mlx_flashhead.evaluation.states import hidden_states
from mlx_flashhead.folder.section import read_section
from mlx_flashhead.head import FlashHead
from mlx_flashhead.integration.locate import get_module, head_of
from mlx_flashhead.kernels import Noise
from mlx_flashhead.sampling import Settings, coupled
from mlx_flashhead.sampling.draw import known_transform

SETTINGS = {
    "temperature 1.0": Settings(temp=1.0),
    "top-p 0.9, T 0.8": Settings(temp=0.8, top_p=0.9),
    "min-p 0.05, 3 kept": Settings(temp=1.0, min_p=0.05, min_tokens_to_keep=3),
    "top-k 40, T 1.2": Settings(temp=1.2, top_k=40),
    "XTC 0.5 above 0.05": Settings(1.0, xtc_probability=0.5, xtc_threshold=0.05),
    "all of them, T 0.7": Settings(0.7, 0.95, 0.01, 2, 50, 0.3, 0.05),
}
PASSAGES = Path(__file__).parents[1] / "tests/data/passages.jsonl"
# Keys that the whole draw is given, too.
N_CHECKED = 24


def expected(settings: Settings, logits: mx.array) -> np.ndarray:
    """Probabilities ``[V]``, float64, by mlx-lm's own filters, of logits ``[V]``."""
    logprobs = logits[None] - mx.logsumexp(logits)
    total = np.zeros(len(logits))
    q = settings.xtc_probability
    for share, coin in ((1 - q, 0.0), (q, 1.0)):
        arguments = {**vars(settings), "xtc_probability": coin}
        arguments["xtc_special_tokens"] = list(settings.xtc_special_tokens)
        left = logprobs
        for method in make_sampler(**arguments).__closure__[0].cell_contents:
            left = method(left)
        left = np.array(left[0]).astype(np.float64) / settings.temp
        p = np.exp(left - left.max())
        total += share * p / p.sum()
    return total


class Drawing:
    """Draws of one state by one sampler's settings.

    Args:
        head: The head.
        settings: The settings.
        logits: The state's logits, in cluster order, ``[V]``.
    """

    def __init__(self, head: FlashHead, settings: Settings, logits: mx.array):
        self.head, self.settings, self.logits = head, settings, logits
        # Where XTC's coin falls on dropping, and where it does not. Some filters keep
        # more than draw looks at by default; it is asked again, then.
        self.kept = self._keep(coupled.N_FILTERED)
        if not all(kept.certain.item() for kept in self.kept):
            self.kept = self._keep(head.n_clusters)
        self.counts = np.zeros(head.vocab_size, np.int64)

    def _keep(self, n_filtered: int) -> list[coupled.Kept]:
        row = self.logits[None]
        kept = [
            coupled.keep(self.head, self.settings, row, mx.array([coin]), n_filtered)
            for coin in (0.0, 1.0)
        ]
        mx.eval(kept)
        return kept

    def draw(self, noise: Noise) -> np.ndarray:
        """Draw and count a token for each of k positions, whose noise is given."""
        drops = np.array(noise.coins) <= self.settings.xtc_probability
        tokens = np.zeros(len(drops), np.int64)
        for kept, these in zip(self.kept, (drops, ~drops)):
            (index,) = np.nonzero(these)
            if not len(index):
                continue
            some = noise
            if len(index) < len(drops):
                some = Noise(*(part[mx.array(index)] for part in noise))
            wide = coupled.Kept(
                *(
                    part
                    if part is None
                    else mx.broadcast_to(part, (len(index), *part.shape[1:]))
                    for part in kept
                )
            )
            chosen = coupled.choose(self.head, self.settings, wide, some)
            tokens[index] = np.array(chosen)
        self.counts += np.bincount(tokens, minlength=len(self.counts))
        return tokens

    def check(self, keys: list[mx.array], tokens: np.ndarray) -> None:
        """Raise AssertionError unless the whole draw has the same tokens."""
        logits = mx.broadcast_to(self.logits, (len(keys), len(self.logits)))
        drawn = coupled.draw(self.head, self.settings, logits, keys)
        for i, key in enumerate(keys):
            token = drawn.tokens[i]
            if not drawn.certain[i].item():
                every = self.head.n_clusters
                token = coupled.draw(
                    self.head, self.settings, logits[:1], [key], every
                ).tokens
            assert token.item() == tokens[i], (self.settings, key)

    def test(self, p: np.ndarray) -> tuple[float, int, float, int]:
        """Statistic, degrees of freedom and p-value against probabilities ``[V]``; and
        how many tokens were drawn that have none."""
        order = np.array(self.head.token_ids)
        real = order < len(p)
        index = np.minimum(order, len(p) - 1)
        counts = np.where(real, self.counts[index], 0)
        p = np.where(real, p[index], 0)
        nothing = np.zeros(len(order), bool)
        statistic, k, value, _ = chi_square(counts, p, nothing)
        return statistic, int(k), value, int(counts[p == 0].sum())


def _repeat(part: mx.array | None, k: int) -> mx.array | None:
    """``[1, ...]`` as ``[k, ...]``, nothing copied."""
    return None if part is None else mx.broadcast_to(part, (k, *part.shape[1:]))


def real_states(model, tokenizer, path: str, n: int) -> np.ndarray:
    """States ``[n, D]`` of the passages, evenly over the ranks of their entropy."""
    module = get_module(model, path)
    states = np.concatenate(
        [
            hidden_states(model, path, tokenizer.encode(passage))
            for passage in read_documents(PASSAGES)
        ]
    )
    entropies = []
    for start in range(0, len(states), 16):
        logprobs = log_softmax(head_logits(module, states[start : start + 16]))
        entropies += (-(mx.exp(logprobs) * logprobs).sum(axis=-1)).tolist()
    ranks = np.linspace(0.1, 0.99, n) * (len(states) - 1)
    return states[np.argsort(entropies)[ranks.astype(int)]]


def head_logits(module, states: np.ndarray) -> mx.array:
    """Logits ``[n, V]`` of the plain model's head."""
    return getattr(module, "as_linear", module)(mx.array(states))


def log_softmax(logits: mx.array) -> mx.array:
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


@click.command(context_settings={"show_default": True})
@click.option("--model", "folder", required=True, help="A converted folder.")
@click.option("--draws", default=200_000, help="Draws of each state and sampler.")
@click.option("--n-states", default=10, help="States.")
@click.option("--batch", default=250, help="Keys at a time.")
@click.option("--seed", default=0)
def main(folder, draws, n_states, batch, seed) -> None:
    start = time.perf_counter()
    dense, tokenizer = load(folder, dense=True)
    path = read_section(folder).head_path
    states = real_states(dense, tokenizer, path, n_states)
    model, _ = load(folder)
    head = head_of(model)
    transform = known_transform(head)
    cases = []
    for i, h in enumerate(states):
        plain = transform(head_logits(get_module(dense, path), h[None]))[0]
        clustered = transform(head.clustered(mx.array(h[None])))[0]
        second = np.argsort(-np.array(plain))[1].item()
        for name, settings in SETTINGS.items():
            if settings.xtc_probability > 0:
                settings = replace(settings, xtc_special_tokens=(second,))
            p = expected(settings, plain)
            cases.append((i, name, p, Drawing(head, settings, clustered)))
    del dense, model
    click.echo(
        f"{folder}: {n_states} states, {draws:,} draws each; {mx.default_device()}"
    )
    done = 0
    while done < draws:
        n = min(batch, draws - done)
        keys = mx.array([[seed, done + j] for j in range(n)], dtype=mx.uint32)
        noise = Noise.make(head.n_clusters, head.cluster_size, keys)
        mx.eval(noise)
        for _, _, _, drawing in cases:
            tokens = drawing.draw(noise)
            if done == 0:
                drawing.check(keys[:N_CHECKED], tokens)
        done += n
    click.echo(
        f"{'sampler':22}{'state':>6}{'kept':>8}{'entropy':>9}{'chi2':>11}{'dof':>7}"
        f"{'p':>9}{'outside':>9}"
    )
    values = []
    for i, name, p, drawing in cases:
        statistic, k, value, outside = drawing.test(p)
        if k:  # more than one token
            values.append(value)
        some = p[p > 0]
        entropy = -(some * np.log(some)).sum()
        click.echo(
            f"{name:22}{i:6}{len(some):8}{entropy:9.3f}{statistic:11.1f}{k:7}"
            f"{f'{value:.4f}' if k else '-':>9}{outside:9}"
        )
    low, n = min(values, default=1.0), len(values)
    click.echo(
        f"smallest of {n} p-values {low:.5f}; times {n} (Bonferroni) "
        f"{min(1.0, low * n):.3f}; {time.perf_counter() - start:.0f} s"
    )


if __name__ == "__main__":
    main()
