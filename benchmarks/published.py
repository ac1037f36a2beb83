"""Published dense decoding speeds of Macs, and the law that is fitted to them.

    python benchmarks/published.py

``published.jsonl`` has a measurement of somebody else's in each line, with its source.
The time of a decoded token is taken to be

    bytes / (efficiency * bandwidth) + launches * cost of a launch

with all weights and the cache as bytes. A launch has one cost on chips up to M3 and on
Ultras, and another on later ones. The three constants are fitted by least squares of
relative errors; some chips are kept out of the fit, to see how far it is off.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import click
import numpy as np

from mlx_flashhead.benchmarking.report import markdown_table

DATA = Path(__file__).with_name("published.jsonl")
# Chips that nothing is fitted to, if they are in the data.
KEPT_OUT = ("M4 Pro", "M2 Ultra")

# Memory bandwidth as Apple publishes it, GB/s; of each Max the one with more GPU cores.
BANDWIDTH = {
    **{"M1": 68, "M1 Pro": 200, "M1 Max": 400, "M1 Ultra": 800},
    **{"M2": 100, "M2 Pro": 200, "M2 Max": 400, "M2 Ultra": 800},
    **{"M3": 100, "M3 Pro": 150, "M3 Max": 400, "M3 Ultra": 819},
    **{"M4": 120, "M4 Pro": 273, "M4 Max": 546},
    **{"M5": 153, "M5 Max": 614},
}


@dataclass(frozen=True)
class Model:
    """Sizes of a dense model, as its ``config.json`` has them.

    Attributes:
        layer_launches: Launches of one layer in mlx-lm: norms, products, rotations,
            writes to the cache, attention, activation and sums.
    """

    vocab_size: int
    hidden_size: int
    n_layers: int
    intermediate_size: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    layer_launches: int
    tied: bool = True

    @property
    def head(self) -> int:
        """Weights of the head."""
        return self.vocab_size * self.hidden_size

    @property
    def body(self) -> int:
        """Weights of all layers. Of the embedding one row is read."""
        heads = 2 * self.n_heads + 2 * self.n_kv_heads
        of_layer = heads * self.head_dim + 3 * self.intermediate_size
        return self.n_layers * self.hidden_size * of_layer

    def cache_bytes(self, context: int) -> int:
        """Of the keys and values of so many tokens, in 16 bits."""
        return 4 * self.n_layers * self.n_kv_heads * self.head_dim * context

    @property
    def launches(self) -> int:
        """Of a step up to the head."""
        return self.n_layers * self.layer_launches + EMBEDDING_AND_NORM


# Launches outside of the layers: embedding and last norm; the dense head and the greedy
# choice (benchmarks/launches.py).
EMBEDDING_AND_NORM, DENSE_GREEDY = 3, 4
# Llama: 2 norms, 7 products, 2 rotations, 2 writes to the cache, attention, activation,
# 2 sums. Qwen 2.5 adds 3 biases, Qwen 3 norms of queries and keys, Gemma 3 these, two
# more norms and 1 to the weight of each norm.
_LLAMA, _QWEN2, _QWEN3, _GEMMA3 = 17, 20, 19, 27
MODELS = {
    "SmolLM-135M": Model(49_152, 576, 30, 1536, 9, 3, 64, _LLAMA),
    "SmolLM3-3B": Model(128_256, 2048, 36, 11_008, 16, 4, 128, _LLAMA),
    "Llama-3.2-1B": Model(128_256, 2048, 16, 8192, 32, 8, 64, _LLAMA),
    "Llama-3.2-3B": Model(128_256, 3072, 28, 8192, 24, 8, 128, _LLAMA),
    "Llama-3.1-8B": Model(128_256, 4096, 32, 14_336, 32, 8, 128, _LLAMA, False),
    "Qwen2.5-0.5B": Model(151_936, 896, 24, 4864, 14, 2, 64, _QWEN2),
    "Qwen2.5-1.5B": Model(151_936, 1536, 28, 8960, 12, 2, 128, _QWEN2),
    "Qwen2.5-7B": Model(152_064, 3584, 28, 18_944, 28, 4, 128, _QWEN2, False),
    "Qwen3-0.6B": Model(151_936, 1024, 28, 3072, 16, 8, 128, _QWEN3),
    "Qwen3-1.7B": Model(151_936, 2048, 28, 6144, 16, 8, 128, _QWEN3),
    "Qwen3-4B": Model(151_936, 2560, 36, 9728, 32, 8, 128, _QWEN3),
    "Qwen3-8B": Model(151_936, 4096, 36, 12_288, 32, 8, 128, _QWEN3, False),
    "Gemma-3-270M": Model(262_144, 640, 18, 2048, 4, 1, 256, _GEMMA3),
    "Gemma-3-1B": Model(262_144, 1152, 26, 6912, 4, 1, 256, _GEMMA3),
    "Gemma-3-4B": Model(262_208, 2560, 34, 10_240, 8, 4, 256, _GEMMA3),
}


def weight_bytes(bits: int, group_size: int = 64) -> float:
    """Bytes of a weight with its share of a scale and an offset of 16 bits."""
    return bits / 8 if bits == 16 else bits / 8 + 4 / group_size


def is_slow(chip: str) -> bool:
    """Whether a chip's launches are the dearer ones."""
    return chip.endswith("Ultra") or chip[1] in "123"


@dataclass(frozen=True)
class Measurement:
    """Somebody's measurement.

    Attributes:
        chip, model: Names in BANDWIDTH and MODELS.
        bits, group_size: Of all weights.
        context: Tokens in the cache, on average.
        tokens_per_second: One sequence, decoded.
        engine: What ran it, on MLX.
        source, where: Address, and where on that page.
    """

    chip: str
    model: str
    bits: int
    context: int
    tokens_per_second: float
    engine: str
    source: str
    where: str
    group_size: int = 64

    @property
    def microseconds(self) -> float:
        return 1e6 / self.tokens_per_second

    @property
    def launches(self) -> int:
        return MODELS[self.model].launches + DENSE_GREEDY

    @cached_property
    def bytes(self) -> float:
        model = MODELS[self.model]
        weights = (model.head + model.body) * weight_bytes(self.bits, self.group_size)
        return weights + model.cache_bytes(self.context)


@dataclass(frozen=True)
class Law:
    """What a token takes.

    Attributes:
        efficiency: Share of the published bandwidth that is reached.
        slow, fast: Cost of a launch in us, where :func:`is_slow`, and elsewhere.
    """

    efficiency: float
    slow: float
    fast: float

    def reading(self, n_bytes: float, chip: str) -> float:
        """Microseconds of reading that much."""
        return n_bytes / (self.efficiency * BANDWIDTH[chip] * 1e3)

    def launching(self, n: float, chip: str) -> float:
        """Microseconds of so many launches."""
        return n * (self.slow if is_slow(chip) else self.fast)

    def microseconds(self, n_bytes: float, launches: float, chip: str) -> float:
        return self.reading(n_bytes, chip) + self.launching(launches, chip)

    def error(self, row: Measurement) -> float:
        """By how much a measurement's time is overestimated, relative."""
        predicted = self.microseconds(row.bytes, row.launches, row.chip)
        return predicted / row.microseconds - 1


def load(path: Path = DATA) -> list[Measurement]:
    return [Measurement(**json.loads(line)) for line in path.read_text().splitlines()]


def fit(rows: Iterable[Measurement]) -> Law:
    """The law with the least squares of relative errors."""
    terms = []
    for row in rows:
        slow = is_slow(row.chip)
        reading = row.bytes / (BANDWIDTH[row.chip] * 1e3)
        each = reading, row.launches * slow, row.launches * (not slow)
        terms.append([t / row.microseconds for t in each])
    inverse, slow_cost, fast_cost = np.linalg.lstsq(
        np.array(terms), np.ones(len(terms)), rcond=None
    )[0]
    return Law(1 / inverse, slow_cost, fast_cost)


def fitted_on(rows: Sequence[Measurement]) -> list[Measurement]:
    """The measurements of chips that are not kept out."""
    return [r for r in rows if r.chip not in KEPT_OUT]


def leave_one_out(rows: Sequence[Measurement]) -> dict[str, Law]:
    """The law without each of the chips it is fitted on."""
    rows = fitted_on(rows)
    chips = dict.fromkeys(r.chip for r in rows)
    return {c: fit(r for r in rows if r.chip != c) for c in chips}


@click.command()
def main() -> None:
    """Fit the law, and print its errors on each chip."""
    rows = load()
    law, without = fit(fitted_on(rows)), leave_one_out(rows)
    click.echo(
        f"{100 * law.efficiency:.0f} % of the bandwidth; {law.slow:.1f} us a launch up "
        f"to M3 and on Ultras, {law.fast:.1f} us later\n"
    )
    table = [
        [
            *("chip", "measurements", "in the fit"),
            *("error of the time, %: root mean square (least to most)",),
            "the same, without the chip's own",
        ]
    ]
    for chip in dict.fromkeys(r.chip for r in rows):
        own = [r for r in rows if r.chip == chip]
        kept = chip in KEPT_OUT
        cells = [
            _errors(law, own),
            "the same" if kept else _errors(without[chip], own),
        ]
        table.append([chip, str(len(own)), "no" if kept else "yes", *cells])
    click.echo(markdown_table(table))


def _errors(law: Law, rows: Sequence[Measurement]) -> str:
    e = 100 * np.array([law.error(r) for r in rows])
    return f"{np.sqrt((e**2).mean()):.0f} ({e.min():+.0f} to {e.max():+.0f})"


if __name__ == "__main__":
    main()
