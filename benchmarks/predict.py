"""What published speeds of Macs predict for heads that nobody has measured on one.

    python benchmarks/predict.py
    python benchmarks/predict.py --bits 4

A step is the body's, in 4 bits, by the law that ``published.py`` fits to measured dense
decoding, and a head's of ``--bits``:

    dense:    all rows, 4 launches; with top-p 22, and the vocabulary sorted
    approx.:  centroids, a sixteenth of the rows, 4 launches, and WORK for what they do
    exact:    (k drafts, with a 32nd of the rows, + a verification) / tokens kept of k

A verification reads the rows for k = 16 positions; MLX's product of so many is bound by
arithmetic on Macs, which takes as long as reading VERIFY_BYTES a weight. Its other
launches go over k logits of each token.

What is not known has a range; an interval is from the least to the largest of all
combinations, and of the law fitted without each of its chips in turn.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import click
from published import (
    BANDWIDTH,
    MODELS,
    Law,
    Model,
    fit,
    fitted_on,
    is_slow,
    leave_one_out,
    load,
    weight_bytes,
)

from mlx_flashhead.benchmarking.report import markdown_table
from mlx_flashhead.evaluation.drafts import kept

SHOWN = ("Gemma-3-270M", "Gemma-3-1B", "Qwen3-0.6B", "Llama-3.2-1B")
CLUSTER_SIZE, BODY_BITS, CENTROID_BITS = 16, 4, 4
# Clusters probed: one in so many, approximate and for a draft; positions verified.
ONE_IN, DRAFT_ONE_IN, VERIFY_EVERY = 16, 32, 16
# Tokens in the cache.
CONTEXT = 256

# Launches after the body (benchmarks/launches.py).
LAUNCHES = {"greedy": (4, 4, 6), "top-p": (22, 4, 56)}
# What FlashHead's launches do beyond reading, us, on an NVIDIA H100 (RESULTS.md).
# Mostly one threadgroup's work, which takes as long on any chip of that clock: half and
# double are the range.
WORK = {"greedy": 50.0, "top-p": 60.0}
WORK_RANGE = 0.5, 1.0, 2.0
# Sorting an entry of the vocabulary, ns: MLX on unnamed Apple chips, 64 rows of 151,936
# at once in 8.15 ms (github.com/sgl-project/sglang/pull/34166), and 128,256 entries of
# one row in 0.627 ms instead of 0.211 without (github.com/ml-explore/mlx-lm/pull/1083).
SORT_RANGE = 0.84, 1.65, 3.2
# A quantized product of 16 positions against the published bandwidth, bytes a weight:
# M3 Ultra 0.260 ms for 5,120 x 17,408 (github.com/ml-explore/mlx/issues/4265), M3 Max
# 26.9 ms for 16,384 x 250,112 (mlx/pull/3791), M4 Pro 4.5 * 0.198 ms for 5,120 x 17,408
# (mlx/issues/3852). In 16 bits twice the product of one position (mlx/issues/4265).
VERIFY_RANGE = 2.4, 2.6, 2.7
# Waiting for the device, us, once for each verification (mlx/issues/4265).
WAIT = 250.0
# Share of drafts that stand: Gemma 3 270M's and SmolLM2's texts, RESULTS.md.
ACCEPTANCE_RANGE = 0.985, 0.99, 0.995


@dataclass(frozen=True)
class Assumed:
    """What a prediction rests on."""

    law: Law
    work: float = 1.0
    sort: float = SORT_RANGE[1]
    verify: float = VERIFY_RANGE[1]
    acceptance: float = ACCEPTANCE_RANGE[1]

    def steps(
        self, model: Model, chip: str, sampler: str, bits: int
    ) -> tuple[float, float, float]:
        """Microseconds of a token: dense, approximate, exact."""
        law, k = self.law, VERIFY_EVERY
        dense, flash, verification = LAUNCHES[sampler]
        body_bytes = model.body * weight_bytes(BODY_BITS) + model.cache_bytes(CONTEXT)
        body = law.microseconds(body_bytes, model.launches, chip)
        rows = law.reading(model.head * weight_bytes(bits), chip)
        centroids = law.reading(
            model.vocab_size
            // CLUSTER_SIZE
            * (model.hidden_size * weight_bytes(CENTROID_BITS) + 4),
            chip,
        )
        sorting = model.vocab_size * self.sort / 1e3 if sampler == "top-p" else 0.0
        work = law.launching(flash, chip) + self.work * WORK[sampler]
        weight = 2 * weight_bytes(16) if bits == 16 else self.verify
        verifying = max(rows, model.head * weight / (BANDWIDTH[chip] * 1e3))
        verifying += law.microseconds(
            verification * 4 * k * model.vocab_size, verification, chip
        )
        draft = body + centroids + rows / DRAFT_ONE_IN + work
        return (
            body + rows + law.launching(dense, chip) + sorting,
            body + centroids + rows / ONE_IN + work,
            (k * draft + verifying + WAIT) / kept(self.acceptance, k),
        )


@dataclass(frozen=True)
class Prediction:
    """Of a model on a chip: microseconds of a token, dense, approximate and exact, and
    by how much the last two are faster, least and most."""

    steps: tuple[float, float, float]
    approximate: tuple[float, float]
    exact: tuple[float, float]

    def __str__(self) -> str:
        speeds = " → ".join(f"{1e6 / t:,.0f}" for t in self.steps)
        times = (f"{a:.2f}-{b:.2f}" for a, b in (self.approximate, self.exact))
        return f"{speeds} ({', '.join(times)})"


def predict(
    laws: list[Law], model: Model, chip: str, sampler: str, bits: int
) -> Prediction:
    """By the first law, the interval by all of them."""
    steps = Assumed(laws[0]).steps(model, chip, sampler, bits)
    gains = []
    for values in product(
        [of_chip for law in laws for of_chip in possible(law, chip)],
        WORK_RANGE,
        SORT_RANGE[::2],
        VERIFY_RANGE[::2],
        ACCEPTANCE_RANGE[::2],
    ):
        dense, *others = Assumed(*values).steps(model, chip, sampler, bits)
        gains.append([dense / t for t in others])
    first, second = zip(*gains, strict=True)
    return Prediction(steps, (min(first), max(first)), (min(second), max(second)))


def possible(law: Law, chip: str) -> Iterator[Law]:
    """The law, and where nobody has measured what launches cost with the other cost: of
    chips up to M3 only M1 and the Ultras show it."""
    yield law
    if is_slow(chip) and chip != "M1" and not chip.endswith("Ultra"):
        yield replace(law, slow=law.fast)


def laws() -> list[Law]:
    """The law, and those that are fitted without each of the chips."""
    rows = load()
    return [fit(fitted_on(rows)), *leave_one_out(rows).values()]


def by_chip(
    laws: list[Law], sampler: str, bits: int
) -> list[tuple[list[str], list[Prediction]]]:
    """Chips that nothing here tells apart, and their predictions for SHOWN."""
    found: dict[str, tuple[list[str], list[Prediction]]] = {}
    for chip in BANDWIDTH:
        each = [predict(laws, MODELS[m], chip, sampler, bits) for m in SHOWN]
        found.setdefault("|".join(map(str, each)), ([], each))[0].append(chip)
    return list(found.values())


@click.command(context_settings={"show_default": True})
@click.option(
    "--bits", default="8", type=click.Choice(["4", "8", "16"]), help="Of the head."
)
def main(bits: str) -> None:
    """Predict tokens per second by published speeds."""
    fitted = laws()
    for sampler in LAUNCHES:
        click.echo(
            f"Predicted, not measured: tokens/s, {sampler}, body of {BODY_BITS} bits, "
            f"dense {bits}-bit head → approximate → exact (times dense, from least to "
            "most: approximate, exact)\n"
        )
        table = [
            [", ".join(chips), *map(str, each)]
            for chips, each in by_chip(fitted, sampler, int(bits))
        ]
        click.echo(markdown_table([["", *SHOWN], *table]) + "\n")


if __name__ == "__main__":
    main()
