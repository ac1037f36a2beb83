"""What bytes, launches and published bandwidths say of chips that nobody has measured.

    python benchmarks/predict.py

The model, for one greedy token with 8-bit rows:

    dense:      bytes / (E * bandwidth) + V * S
    FlashHead:  bytes / (E * bandwidth) + L
    exact:      (k * (draft's bytes / (E * bandwidth) + L)
                 + dense bytes / (E * bandwidth) + L) / tokens kept of k

Exact decoding drafts with a 32nd of the clusters and verifies k = 16 positions at once;
that 99.5 % of its drafts stand is what Gemma 3 270M's held-out states say.

E is the share of the published bandwidth that a kernel reaches. S is what an entry of
the logits costs beyond its row (writing it, looking for the largest), L the latency of
FlashHead's four launches, which wait for each other. S and L follow from one model on
an NVIDIA H200; the others on the same device are the check, predicted before compared.

Of Apple's chips only the bandwidth is published. There L is taken over and S is left
out, which favours the dense head. "Whole model" adds the bytes of a body in 4 bits at
the same bandwidth, for exact decoding those of steps that are thrown away, too, and
nothing for its launches, attention and sampling: no step is
faster than that, and the ratio is an upper bound.
"""

from __future__ import annotations

import click
from kernels import CLUSTER_SIZE, MODELS

from mlx_flashhead.benchmarking.report import markdown_table
from mlx_flashhead.evaluation.drafts import kept

# Parameters without the head.
BODY = {
    "Gemma-3-270M": 100e6,
    "Gemma-3-1B": 698e6,
    "Qwen3-0.6B": 440e6,
    "Llama-3.2-1B": 973e6,
}
BODY_BITS = 4.5  # with a scale and a bias of 16 bits for 64 weights
E = 0.8
# Of exact decoding: one in so many clusters is drafted with, positions that are
# verified at once, and the share of drafts that stand.
ONE_IN, VERIFY_EVERY, ACCEPTANCE = 32, 16, 0.995

# On an H200, us a step less the empty chain's (RESULTS.md): dense 8-bit, FlashHead.
H200 = 4800
MEASURED = {
    "Gemma-3-270M": (160.1, 57.6),
    "Gemma-3-1B": (217.2, 69.8),
    "Qwen3-0.6B": (104.4, 55.4),
    "Llama-3.2-1B": (140.8, 68.5),
}
FITTED_ON = "Gemma-3-270M"

# Published memory bandwidth, GB/s.
APPLE = {
    "M1": 68,
    "M1 Pro": 200,
    "M1 Max": 400,
    "M2": 100,
    "M2 Max": 400,
    "M3": 100,
    "M3 Max": 400,
    "M3 Ultra": 819,
    "M4": 120,
    "M4 Pro": 273,
    "M4 Max": 546,
    "M5": 153,
}


def head_bytes(
    vocab_size: int, hidden_size: int, one_in: int = 16
) -> tuple[float, float]:
    """Bytes that a decode step reads: the dense head in 8 bits, and FlashHead that
    probes one in so many clusters."""
    row = hidden_size * (8 + 0.5) / 8
    n_clusters = vocab_size // CLUSTER_SIZE
    centroids = n_clusters * (hidden_size * (4 + 0.5) / 8 + 4)
    return vocab_size * row, centroids + n_clusters // one_in * CLUSTER_SIZE * row


def microseconds(n_bytes: float, bandwidth: float) -> float:
    """Of reading that much at E of a bandwidth in GB/s."""
    return n_bytes / (E * bandwidth * 1e3)


def fit() -> tuple[float, float]:
    """S in us per entry, and L in us."""
    vocab_size, hidden_size = MODELS[FITTED_ON]
    dense, flash = (microseconds(b, H200) for b in head_bytes(vocab_size, hidden_size))
    measured = MEASURED[FITTED_ON]
    return (measured[0] - dense) / vocab_size, measured[1] - flash


def check(per_entry: float, launches: float) -> list[list[str]]:
    rows = []
    for name, (vocab_size, hidden_size) in MODELS.items():
        dense, flash = (
            microseconds(b, H200) for b in head_bytes(vocab_size, hidden_size)
        )
        predicted = dense + vocab_size * per_entry, flash + launches
        cells = [
            f"{p:.0f} / {m:.0f} ({100 * (p / m - 1):+.0f} %)"
            for p, m in zip(predicted, MEASURED[name])
        ]
        rows.append([name + (", fitted" if name == FITTED_ON else ""), *cells])
    return rows


def exact(
    shape: tuple[int, int], body: float, bandwidth: float, launches: float
) -> float:
    """Microseconds of exact decoding for each token that is kept."""
    dense, draft = (
        microseconds(b, bandwidth)
        for b in (head_bytes(*shape)[0], body + head_bytes(*shape, ONE_IN)[1])
    )
    k = VERIFY_EVERY
    return (k * (draft + launches) + dense + launches) / kept(ACCEPTANCE, k)


def apple(launches: float, *, whole: bool) -> list[list[str]]:
    rows = []
    for chip, bandwidth in APPLE.items():
        cells = [chip]
        for name, shape in MODELS.items():
            body = BODY[name] * BODY_BITS / 8 if whole else 0
            dense, flash = (
                microseconds(body + b, bandwidth) for b in head_bytes(*shape)
            )
            each = dense, flash + launches, exact(shape, body, bandwidth, launches)
            shown = (f"{1e6 / t if whole else t:,.0f}" for t in each)
            times = (f"{dense / t:.1f}x" for t in each[1:])
            cells.append(f"{' → '.join(shown)} ({', '.join(times)})")
        rows.append(cells)
    return rows


@click.command()
def main() -> None:
    """Predict decode steps from bytes, launches and published bandwidths."""
    per_entry, launches = fit()
    click.echo(
        f"S = {1000 * per_entry:.2f} ns an entry, L = {launches:.0f} us, E = {E}\n\n"
        "Check on an NVIDIA H200, head alone, us: predicted / measured\n"
    )
    names = list(MODELS)
    header = ["model", "dense 8-bit", "FlashHead"]
    click.echo(markdown_table([header, *check(per_entry, launches)]))
    for title, whole in (
        ("Predicted: head alone, us, dense 8-bit → approximate → exact", False),
        (
            "Predicted: whole model, at most so many tokens/s, dense 8-bit → "
            "approximate → exact",
            True,
        ),
    ):
        click.echo(f"\n{title}\n")
        click.echo(markdown_table([["", *names], *apple(launches, whole=whole)]))


if __name__ == "__main__":
    main()
