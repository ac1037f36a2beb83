"""What is measured by default, and the loop that measures it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, TypedDict

from mlx_lm.sample_utils import make_sampler

from ..compute.device import on_gpu
from ..integration.exact import Verification
from .competitors import Competitor, Sampler
from .decoding import Run, prompts, run
from .energy import Meter
from .latency import Spread, chained, spread

SAMPLERS: dict[str, Callable[[], Sampler]] = {
    "greedy": lambda: make_sampler(0.0),
    "top-p": lambda: make_sampler(0.8, top_p=0.95),
}
PROMPT_TOKENS = (32, 512, 4096)
BATCH_SIZES = (1, 4, 16)

# Steps in a chain of the head alone, and seconds that it may take.
_CHAIN_STEPS, _CHAIN_SECONDS = 64, 0.3


class Cell(NamedTuple):
    """Prompts of ``prompt_tokens`` for ``batch_size`` sequences at once."""

    batch_size: int
    prompt_tokens: int

    def __str__(self) -> str:
        return f"batch {self.batch_size}, prompt of {self.prompt_tokens:,} tokens"


@dataclass(frozen=True)
class Limits:
    """What of the matrix a device is given where the user does not choose.

    Attributes:
        batch_size: Largest batch.
        prompt_tokens: Most prompt tokens of a batch together.
        max_tokens: Tokens that each sequence decodes.
        repeats: Times that each run is repeated.
    """

    batch_size: int
    prompt_tokens: int
    max_tokens: int
    repeats: int = 3


class Row(TypedDict):
    """Measurements of one head in one cell with one sampler.

    Attributes:
        head: Name of the competitor.
        kind: Its kind.
        batch_size, prompt_tokens: The cell.
        sampler: Name in ``SAMPLERS``.
        max_tokens: Tokens that each sequence decoded.
        tokens_per_second: Of all sequences together, the first token apart.
        first_token_seconds: From the call to the first token of every sequence.
        head_seconds_per_token: Of the head alone; ``None`` where it is not known.
        head_bytes_per_token: Of the head, read for each token of one sequence; ``None``
            in batches, and for other models.
        acceptance, waste: Of the drafts of exact decoding, those that stood, and of the
            body's steps those that were thrown away, 0 to 1; else ``None``.
        head_share: The head's median share of the time of a decode step, 0 to 1.
        peak_bytes: Greatest memory use.
        joules_per_token: Energy of the device; ``None`` where it is not told.
        runs: Fields of each :class:`~.decoding.Run`.
    """

    head: str
    kind: str
    batch_size: int
    prompt_tokens: int
    sampler: str
    max_tokens: int
    tokens_per_second: Spread
    first_token_seconds: Spread
    head_seconds_per_token: Spread | None
    head_bytes_per_token: float | None
    acceptance: float | None
    waste: float | None
    head_share: float | None
    peak_bytes: int
    joules_per_token: Spread | None
    runs: list[dict[str, Any]]


# So that a small model takes a few minutes.
GPU = Limits(batch_size=16, prompt_tokens=16_384, max_tokens=64)
CPU = Limits(batch_size=1, prompt_tokens=512, max_tokens=64)
QUICK_GPU = Limits(batch_size=1, prompt_tokens=32, max_tokens=32)
QUICK_CPU = Limits(batch_size=1, prompt_tokens=32, max_tokens=32)


def limits(quick: bool) -> Limits:
    """Those of the default device; ``quick``: for one short prompt."""
    if on_gpu():
        return QUICK_GPU if quick else GPU
    return QUICK_CPU if quick else CPU


def cells(
    batch_sizes: Sequence[int] | None,
    prompt_tokens: Sequence[int] | None,
    limits: Limits | None,
) -> tuple[list[Cell], list[Cell]]:
    """What is measured, and what of the whole matrix is left out.

    What is named is measured; the limits are for what is not. Without limits all is.
    """
    chosen: list[Cell] = []
    left: list[Cell] = []
    for b, n in itertools.product(
        batch_sizes or BATCH_SIZES, prompt_tokens or PROMPT_TOKENS
    ):
        named = batch_sizes is not None and prompt_tokens is not None
        fits = limits is None or (
            (batch_sizes is not None or b <= limits.batch_size)
            and (prompt_tokens is not None or n <= limits.prompt_tokens)
            and (named or b * n <= limits.prompt_tokens)
        )
        (chosen if fits else left).append(Cell(b, n))
    if not chosen:
        chosen, left = left[:1], left[1:]
    return chosen, left


def measure(
    competitors: Sequence[Competitor],
    cells: Sequence[Cell],
    samplers: Sequence[str],
    max_tokens: int,
    repeats: int,
    meter: Meter,
    tick: Callable[[], object] = lambda: None,
) -> Iterator[tuple[Cell, list[Row]]]:
    """Rows of measurements, cell by cell.

    Competitors take turns within every repeat, each time another one first, after a
    short run of each that does not count.

    Args:
        competitors: What is compared.
        cells: Batches and prompts.
        samplers: Names in ``SAMPLERS``.
        max_tokens: Tokens that each sequence decodes.
        repeats: Runs of each that count.
        meter: Of energy.
        tick: Called after each of :func:`n_runs`.
    """
    alone: dict[tuple[int, str], list[list[float] | None]] = {}
    for cell in cells:
        texts = [
            prompts(c.tokenizer, cell.prompt_tokens, cell.batch_size)
            for c in competitors
        ]
        runs: dict[str, list[list[Run]]] = {}
        for name in samplers:
            sampler = SAMPLERS[name]()

            def once(
                i: int,
                n_tokens: int,
                sampler: Sampler = sampler,
                texts: list[list[list[int]]] = texts,
            ) -> Run:
                c = competitors[i]
                return run(c.place(), texts[i], sampler, n_tokens, c.nbytes)

            every = range(len(competitors))
            for i in every:
                once(i, 3)
                tick()
            runs[name] = [[] for _ in every]
            for repeat in range(repeats):
                for i in every:
                    turn = (i + repeat) % len(competitors)
                    runs[name][turn].append(once(turn, max_tokens))
                    tick()
            if (cell.batch_size, name) not in alone:
                alone[cell.batch_size, name] = head_alone(
                    competitors, sampler, cell.batch_size, repeats
                )
        meter.settle()
        rows = []
        for name in samplers:
            for i, c in enumerate(competitors):
                head = alone[cell.batch_size, name][i]
                rows.append(_row(c, cell, name, max_tokens, runs[name][i], head, meter))
        yield cell, rows


def n_runs(n_competitors: int, n_cells: int, n_samplers: int, repeats: int) -> int:
    """How often :func:`measure` ticks."""
    return n_competitors * n_cells * n_samplers * (repeats + 1)


def head_alone(
    competitors: Sequence[Competitor], sampler: Sampler, batch_size: int, repeats: int
) -> list[list[float] | None]:
    """Seconds per decode step from hidden states to tokens, in a chain of dependent
    steps, ``repeats`` times in turn; ``None`` for a head that is not known."""
    # Of each head: a chain, how many of its steps fit the time, and what they took.
    timed: list[tuple[Callable[[int], float], int, list[float]] | None] = []
    for c in competitors:
        step = c.step(sampler)
        if step is None:
            timed.append(None)
            continue
        chain = chained(step, c.states(batch_size), _CHAIN_STEPS)
        n = max(2, min(_CHAIN_STEPS, int(_CHAIN_SECONDS / chain(1))))
        chain(n)
        timed.append((chain, n, []))
    for _ in range(repeats):
        for one in timed:
            if one is not None:
                chain, n, seconds = one
                seconds.append(chain(n))
    return [None if one is None else one[2] for one in timed]


def _row(
    c: Competitor,
    cell: Cell,
    sampler: str,
    max_tokens: int,
    runs: list[Run],
    head: list[float] | None,
    meter: Meter,
) -> Row:
    b = cell.batch_size
    verified = sum((r.verified for r in runs), Verification())
    bytes_read = float(c.head_bytes) if c.head_bytes is not None and b == 1 else None
    if bytes_read is not None and c.verified_bytes is not None and verified.tokens:
        bytes_read *= verified.steps / verified.tokens
        bytes_read += c.verified_bytes * verified.verifications / verified.tokens
    step = spread(r.step for r in runs)
    n_tokens = b * (max_tokens - 1)
    told = (meter.joules(r.begin, r.end) for r in runs)
    energy = [j / n_tokens for j in told if j is not None]
    return {
        "head": c.name,
        "kind": c.kind,
        "batch_size": b,
        "prompt_tokens": cell.prompt_tokens,
        "sampler": sampler,
        "max_tokens": max_tokens,
        "tokens_per_second": spread(b / r.step for r in runs),
        "first_token_seconds": spread(r.first_token for r in runs),
        "head_seconds_per_token": spread(t / b for t in head) if head else None,
        "head_bytes_per_token": bytes_read,
        "acceptance": verified.acceptance if verified.tokens else None,
        "waste": verified.waste if verified.tokens else None,
        "head_share": spread(head)["median"] / step["median"] if head else None,
        "peak_bytes": max(r.peak_bytes for r in runs),
        "joules_per_token": spread(energy) if energy else None,
        "runs": [asdict(r) for r in runs],
    }
