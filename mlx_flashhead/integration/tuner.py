"""Decodes as is fastest here: measures a model's decode steps when it is first used.

A token takes a step of the body and one of the head, and host and device work at once:
so whole steps are timed, with the functions that decode, on a prompt cache of their
own; where only hidden states are at hand, the head by itself (:mod:`.alone`). What is
measured is kept in the user's cache (:mod:`mlx_flashhead.tuning`). Models of mlx-vlm
are measured as mlx-lm's are, by their text model.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast
from weakref import WeakKeyDictionary

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from ..compute.device import on_gpu
from ..head import FlashHead, prefers_dense
from ..sampling import Settings, draw, fits, logprobs
from ..tuning import (
    Cell,
    Store,
    Times,
    Watch,
    dense_wins,
    in_turn,
    kind_of,
)
from ..tuning.measure import Clock, Run
from .exact import ExactDecoder, LogitsProcessor, Sampler, Verification
from .rollback import Rollback, supported
from .slots import FlashLinear, Origin, answered, dense_answer, hidden_state

# What a measurement takes at most.
SECONDS = 1.0
# Beside the stored number of probes, these multiples of it are measured: fewer pay
# where rows are slow to read, and more where text is hard to draft.
_TIMES_PROBES = (0.5, 2, 4)
_LONGEST_CHUNK = 64
# Texts at whose beginning a slow machine measures what is still needed.
_TRIES = 3


def switched_off() -> bool:
    """Whether the environment says ``MLX_FLASHHEAD_TUNE=0``."""
    return os.environ.get("MLX_FLASHHEAD_TUNE", "1").lower() in ("0", "false", "off")


def exact_decoder(
    slot: FlashLinear,
    model: nn.Module,
    sampler: Sampler | None,
    processors: Sequence[LogitsProcessor],
) -> ExactDecoder:
    """An exact decoder that drafts as is fastest here, where that may be measured."""
    return tuned(ExactDecoder(slot, model, sampler, processors), model)


def tuned(decoder: ExactDecoder, model: nn.Module) -> ExactDecoder:
    """The same decoder, which drafts as is fastest here for a model, or text model,
    where that may be measured."""
    slot = decoder.slot
    if slot.origin is not None and not switched_off():
        # One that is not known may keep a state.
        known = decoder.settings is not None
        options = decoder.settings or Settings(), decoder.sampler if known else None
        times = tuner_of(slot).exact(slot, model, *options)
        if times is not None:
            decoder.watch = watch(slot, times)
    return decoder


def watch(slot: FlashLinear, times: Times) -> Watch:
    """The choice in one text, by the times that were measured."""
    assert slot.origin is not None
    draft = slot.origin.draft
    return Watch(slot.head.n_probes, slot.verify_every, draft.acceptance, times)


def dense_is_faster(
    slot: FlashLinear, model: nn.Module, settings: Settings, sampler: Any, n: int
) -> bool:
    """Whether a step of n sequences takes no longer with the dense head than among
    candidates: measured, or else expected.

    Args:
        slot: Where the model's head stood; it decodes approximately.
        model: The model.
        settings: What is drawn with.
        sampler: The same as mlx-lm's function, or ``None``.
        n: Sequences at once.
    """
    found = None
    if slot.origin is not None and not switched_off() and fits(slot.head, settings):
        found = tuner_of(slot).dense_is_faster(slot, model, settings, sampler, n)
    if found is None:
        return prefers_dense(slot.head, n, settings.sorts)
    return found


_tuners: WeakKeyDictionary[Origin, dict[str, Tuner]] = WeakKeyDictionary()


def tuner_of(slot: FlashLinear) -> Tuner:
    """The tuner of a slot that has an origin."""
    assert slot.origin is not None
    of_origin = _tuners.setdefault(slot.origin, {})
    if slot.decoding not in of_origin:
        of_origin.setdefault(slot.decoding, Tuner(slot.origin, slot.decoding))
    return of_origin[slot.decoding]


class Tuner:
    """What was measured of one head here; measures what is missing.

    Args:
        origin: Where the head is from.
        decoding: How it decodes.
        seconds: What a measurement may take.
        clock: Gives the time, in seconds.
        say: Is given the lines that tell of it.
    """

    def __init__(
        self,
        origin: Origin,
        decoding: str,
        seconds: float = SECONDS,
        clock: Clock = time.perf_counter,
        say: Callable[[str], None] | None = None,
    ):
        self._store = Store(origin.sha256, decoding, origin.what)
        self._draft = origin.draft
        self.seconds = seconds
        self.clock = clock
        self.say = say or _say
        self._said: set[str] = set()
        self._tries: Counter[tuple[str, int]] = Counter()
        self._lock = threading.Lock()
        self.times = self._store.read()

    def exact(
        self,
        slot: FlashLinear,
        model: nn.Module,
        settings: Settings,
        sampler: Any = None,
        complete: bool = False,
    ) -> Times | None:
        """Times of exact decoding's steps; ``None`` where they could not be measured.

        Args:
            slot: Where the model's head stood.
            model: The model.
            settings: What is drawn with.
            sampler: The same as mlx-lm's function, or ``None``.
            complete: Whether to measure all that can be chosen, and not only what is
                needed to choose at all.
        """
        probes, sizes = self._probes(slot, settings), self._sizes(slot)
        if not probes:
            return None
        every = [
            *(Cell("stock", 1), Cell("dense", 1)),
            *(Cell("draft", probes[0]), Cell("verify", sizes[0])),
            *(Cell("draft", p) for p in probes[1:2]),
            *(Cell("verify", k) for k in sizes[1:]),
            *(Cell("draft", p) for p in probes[2:]),
        ]
        group, needed = kind_of(settings), every if complete else every[:4]
        with self._lock:
            before = self.times.get(group, {})
            if not before.keys() >= set(needed):
                missing = [c for c in every if c not in before]
                self._measure(
                    *(group, 1, _TRIES),
                    lambda: _exact_runs(slot, model, settings, sampler, missing),
                    model,
                )
            times = self.times.get(group, {})
        found = {cell: times[cell] for cell in every if cell in times}
        if not found.keys() >= set(every[:4]):
            return None
        if watch(slot, found).choice.dense:
            self._once(
                f"{group} decoding is faster dense on this device: nothing is drafted "
                "(mlx_flashhead.tune shows it, and with --reset measures again; "
                "MLX_FLASHHEAD_TUNE=0 drafts)"
            )
        return found

    def dense_is_faster(
        self,
        slot: FlashLinear,
        model: nn.Module,
        settings: Settings,
        sampler: Any,
        n: int,
    ) -> bool | None:
        """Whether a step of n sequences takes no longer with the dense head than among
        candidates; ``None`` where that could not be measured."""
        times = self.batches(slot, model, settings, sampler, _around(n))
        hint = "mlx_flashhead.tune shows it, "
        return self._dense_wins(times, n, kind_of(settings), hint)

    def batches(
        self,
        slot: FlashLinear,
        model: nn.Module,
        settings: Settings,
        sampler: Any,
        sizes: Iterable[int],
    ) -> Times:
        """Times of batches of at least these sizes, as far as they could be
        measured."""
        group = f"{kind_of(settings)}, p {slot.head.n_probes}"
        make = partial(_batch_runs, slot, model, settings, sampler)
        return self._both(group, sizes, make, model)

    def alone(
        self, head: FlashHead, n: int, what: str, make: Callable[[int], dict[Cell, Run]]
    ) -> bool | None:
        """Whether the head by itself takes no longer for n hidden states by the dense
        product than by retrieval; ``None`` where that could not be measured.

        Args:
            head: The head.
            n: Hidden states at once.
            what: Is made of them.
            make: Gives the runs of both for a number of states, ``Cell("stock", n)``
                and ``Cell("approximate", n)``.
        """
        what = f"head-only {what}"
        times = self._both(f"{what}, p {head.n_probes}", _around(n), make)
        return self._dense_wins(times, n, what)

    def _both(
        self,
        group: str,
        sizes: Iterable[int],
        make: Callable[[int], dict[Cell, Run]],
        model: nn.Module | None = None,
    ) -> Times:
        """Times of so many sequences at once, dense and among candidates."""
        with self._lock:
            for size in sizes:
                cells = {Cell("stock", size), Cell("approximate", size)}
                if not self.times.get(group, {}).keys() >= cells:
                    # Every step of a batch comes here.
                    self._measure(group, size, 1, partial(make, size), model)
            return self.times.get(group, {})

    def _dense_wins(
        self, times: Times, n: int, what: str, hint: str = ""
    ) -> bool | None:
        """As :func:`dense_wins`; a line says so."""
        found = dense_wins(times, n)
        if found:
            many = "" if n == 1 else f" of {n} sequences"
            self._once(
                f"{what} decoding{many} is faster dense on this device "
                f"({hint}MLX_FLASHHEAD_TUNE=0 retrieves)"
            )
        return found

    def _probes(self, slot: FlashLinear, settings: Settings) -> list[int]:
        """Numbers of probes that may be chosen, the stored one first; one that is not
        the stored one is the user's choice."""
        p, least = slot.head.n_probes, max(1, 2 * slot.head.n_always)
        most, ps = slot.head.n_clusters // 4, [p]
        if p == self._draft.n_probes:
            ps += [q for f in _TIMES_PROBES if least <= (q := int(f * p)) <= most]
        return [p for p in ps if fits(slot.probing(p), settings)]

    def _sizes(self, slot: FlashLinear) -> list[int]:
        """Likewise of positions that are verified at once."""
        k = slot.verify_every
        if k != self._draft.verify_every:
            return [k]
        return [k, *(n for n in (k // 2, k // 4, 2 * k) if 2 <= n <= _LONGEST_CHUNK)]

    def _measure(
        self,
        group: str,
        size: int,
        tries: int,
        make: Callable[[], dict[Cell, Run]],
        model: nn.Module | None,
    ) -> None:
        """Measure what ``make`` gives, of a model if any, unless that was tried so
        often before."""
        if self._tries[group, size] >= tries:
            return
        self._tries[group, size] += 1
        begin = self.clock()
        try:
            with _same_numbers(), _as_it_was(model):
                mx.synchronize()
                runs = make()
                left = self.seconds - (self.clock() - begin)
                found = in_turn(runs, left, compiles=on_gpu(), clock=self.clock)
        except (RuntimeError, ValueError, MemoryError) as e:
            # Decoding goes on as it is set to, and says itself what it lacks.
            self._tries[group, size] = tries
            self._once(
                f"this head cannot be measured: {' '.join(str(e).split())[:200]}"
            )
            return
        if not runs:
            return
        self.times = self._store.add(group, {**self.times.get(group, {}), **found})
        many = "" if size == 1 else f" of {size} sequences"
        how = "which is done once" if len(found) == len(runs) else "as far as it went"
        self.say(
            f"mlx-flashhead: measured {group.split(',')[0]} decoding{many} on this "
            f"device, {how} ({len(found)} of {len(runs)} steps in "
            f"{self.clock() - begin:.1f} s)"
        )

    def _once(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self.say(f"mlx-flashhead: {line}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _around(n: int) -> set[int]:
    """Sizes to measure in order to know of n sequences: powers of two, so that there
    are few."""
    low = 1 << (n.bit_length() - 1)
    return {low, low if low == n else 2 * low}


@contextmanager
def _same_numbers() -> Iterator[None]:
    """Context after which MLX's generator stands where it stood: mlx-lm's samplers
    draw from it."""
    state = cast(list[mx.array], mx.random.state)
    high, low = cast(list[int], state[0].tolist())
    try:
        yield
    finally:
        mx.random.seed(high << 32 | low)


@contextmanager
def _as_it_was(model: nn.Module | None) -> Iterator[None]:
    """Context after which a model's modules have the attributes that they had: mlx-vlm
    keeps the positions of the prompt at hand in them."""
    modules = model.modules() if isinstance(model, nn.Module) else []
    before = [(module, {**vars(module), **module}) for module in modules]
    try:
        yield
    finally:
        for module, attributes in before:
            for name, value in attributes.items():
                if getattr(module, name, None) is not value:
                    setattr(module, name, value)


def _exact_runs(
    slot: FlashLinear,
    model: nn.Module,
    settings: Settings,
    sampler: Any,
    cells: Sequence[Cell],
) -> dict[Cell, Run]:
    """Exact decoding's steps, and mlx-lm's dense one; none where what is drafted cannot
    be undone."""
    cache = make_prompt_cache(model)
    if not supported(cache):
        return {}
    decoder = ExactDecoder(slot, model, None, [], seed=0)
    decoder.settings, decoder.count = settings, Verification()
    first, context = mx.zeros((1,), mx.uint32), mx.zeros((0,), mx.uint32)
    stock = partial(_stock(model, sampler, cache), first)  # its slot answers densely

    def state(token: mx.array) -> mx.array:
        return hidden_state(slot.head, model, token[None], cache=cache)[:, -1]

    def dense(n: int) -> None:
        token = first
        for _ in range(n):
            token = decoder.choose(token, cache, context).ids
            mx.async_eval(token)
        mx.eval(token)

    def draft(n: int, head: FlashHead) -> None:
        rollback, drafts = Rollback(cache), [first]
        rollback.mark()
        for _ in range(n):
            rollback.step()
            drafts.append(decoder.draft(head, state(drafts[-1]), context, drafts))
            mx.async_eval(drafts[-1])
        mx.eval(drafts[-1])
        rollback.to(0)

    latest = first

    def verify(n: int, k: int) -> None:
        nonlocal latest
        for _ in range(n):
            rollback = Rollback(cache)
            rollback.mark()
            rollback.step()
            states = [state(first)] * k
            # Of equal states the greedy choice is the same: all stand.
            chosen = decoder.verify(states, [first, *[latest] * (k - 1)], context)
            latest = chosen[0].ids
            rollback.to(0)

    def run_of(cell: Cell) -> Run:
        if cell.what == "draft":
            head = slot.probing(cell.n)
            return lambda n: draft(n, head)
        if cell.what == "verify":
            return lambda n: verify(n, cell.n)
        return dense if cell.what == "dense" else stock

    # Weights that were never used may still be on the disk.
    stock(1)
    return {cell: run_of(cell) for cell in cells}


def _stock(
    model: Callable[..., Any], sampler: Any, cache: Any
) -> Callable[[mx.array, int], None]:
    """Takes so many of mlx-lm's own steps from tokens ``[B]``, and waits for the
    last."""
    choose = sampler or (lambda x: mx.argmax(x, axis=-1))

    def run(latest: mx.array, n: int) -> None:
        for _ in range(n):
            made = model(latest[:, None], cache=cache)
            logits = (made if isinstance(made, mx.array) else made.logits)[:, -1]
            known = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            latest = choose(known)
            mx.async_eval(latest, known)
        mx.eval(latest)

    return run


def _batch_runs(
    slot: FlashLinear, model: nn.Module, settings: Settings, sampler: Any, size: int
) -> dict[Cell, Run]:
    """A token of each of so many sequences, by mlx-lm's dense head and sampler, and
    among candidates."""
    head, cache = slot.head, make_prompt_cache(model)
    tokens, key = mx.zeros((size,), mx.uint32), mx.zeros((2,), mx.uint32)
    dense = partial(answered, head, dense_answer(head), model)
    stock = partial(_stock(dense, sampler, cache), tokens)

    def approximate(n: int) -> None:
        latest = tokens
        for _ in range(n):
            h = hidden_state(head, model, latest[:, None], cache=cache)[:, -1]
            drawn = draw(head, settings, h, key, whole=True)
            latest, _ = drawn.tokens, list(logprobs(head, drawn))
            mx.async_eval(latest)
        mx.eval(latest)

    if size == 1:
        # Weights that were never used may still be on the disk.
        stock(1)
    return {Cell("stock", size): stock, Cell("approximate", size): approximate}
