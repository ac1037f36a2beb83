"""How exact decoding drafts, token by token: by what was measured and what stands."""

from __future__ import annotations

from .choose import Plan, cheapest, stock_wins
from .times import Cell, Times

# What is known of the acceptance before a text counts as much as so many drafts of it,
# and of these the last so many.
_PRIOR = 16.0
_MEMORY = 128.0
# Tokens that are decoded densely, where drafts do not pay, before one is tried again;
# twice as many after each trial that fails.
_PAUSE = 32
_LONGEST_PAUSE = 1024
# Positions of the first trial after a pause.
_TRIAL = 2


class Watch:
    """Chooses how to go on in one text.

    Chunks begin with one position and double: the first token is not waited for. Where
    nothing was measured, that is all.

    Otherwise the fastest of what was measured is chosen anew for each chunk, by the
    acceptance so far, and chunks double on the way to it only where all drafts stand.
    Of other numbers of probes than the stored one, which have not been tried in this
    text, it is taken that misses are inverse to them, but of more probes not that more
    drafts stand than was stored.
    Where nothing that drafts is faster than the dense product, that takes over, and
    drafts are tried again from time to time.

    Args:
        n_probes: Clusters probed for a draft, as stored.
        verify_every: Positions that are verified at once, as stored.
        acceptance: Share of the drafts that is expected to stand, as stored.
        times: What was measured; ``None`` for nothing.
    """

    def __init__(
        self,
        n_probes: int,
        verify_every: int,
        acceptance: float = 1.0,
        times: Times | None = None,
    ):
        self._stored = Plan(n_probes, verify_every, 0.0)
        self._expected = acceptance
        self.times = times
        self._drafted: dict[int, float] = {}
        self._accepted: dict[int, float] = {}
        self._size = 1
        self._pause = _PAUSE
        self._dense_left = 0
        # Whether mlx-lm's own decoding is as fast as any that drafts, even if all
        # drafts stand: who can leaves the text to it.
        self.stock = times is not None and stock_wins(times)

    @property
    def n_probes(self) -> list[int]:
        """Numbers of probes that may be chosen."""
        measured = [c.n for c in self.times or () if c.what == "draft"]
        return measured or [self._stored.n_probes]

    @property
    def choice(self) -> Plan:
        """What is fastest as far as is known; dense, too, where mlx-lm's own decoding
        is."""
        assert self.times is not None
        plan = cheapest(self.times, self.acceptance)
        return plan._replace(verify_every=0) if self.stock else plan

    def next(self) -> Plan:
        """How the next chunk is decoded: drafted, or one position densely."""
        if self.times is None:
            return self._grown(self._stored)
        if self._dense_left > 0:
            self._dense_left -= 1
            return self._dense()
        plan = cheapest(self.times, self.acceptance)
        if not plan.dense:
            return self._grown(plan)
        self._dense_left, self._pause = (
            self._pause - 1,
            min(2 * self._pause, _LONGEST_PAUSE),
        )
        # What comes after the pause is another text.
        self._drafted, self._accepted, self._size = {}, {}, _TRIAL
        return self._dense()

    def saw(self, n_probes: int, drafted: int, accepted: int) -> None:
        """What became of a chunk's drafts: those that were compared, those that
        stood."""
        decay = (1 - 1 / _MEMORY) ** drafted
        for counts, new in ((self._drafted, drafted), (self._accepted, accepted)):
            for p in counts:
                counts[p] *= decay
            counts[n_probes] = counts.get(n_probes, 0.0) + new
        if self._drafted[n_probes] > 0.75 * _MEMORY:
            self._pause = _PAUSE
        if accepted == drafted:
            self._size = max(self._size, 2 * (drafted + 1))

    def acceptance(self, n_probes: int) -> float:
        """Share of the drafts with so many probes that is expected to stand."""
        before, stored = self._expected, self._stored.n_probes
        if n_probes != stored:
            ways = {stored, *self.n_probes}
            if n_probes < stored:
                nearer = min(p for p in ways if p > n_probes)
            else:
                nearer = max(p for p in ways if p < n_probes)
            inverse = 1 - (1 - self.acceptance(nearer)) * nearer / n_probes
            before = max(0.0, min(before, inverse))
        drafted = self._drafted.get(n_probes, 0.0)
        accepted = self._accepted.get(n_probes, 0.0)
        return (_PRIOR * before + accepted) / (_PRIOR + drafted)

    def _grown(self, plan: Plan) -> Plan:
        size = min(self._size, plan.verify_every)
        if self.times is None or size == 1:
            self._size = 2 * size
        return plan._replace(verify_every=size)

    def _dense(self) -> Plan:
        assert self.times is not None
        return Plan(self._stored.n_probes, 0, self.times[Cell("dense", 1)])
