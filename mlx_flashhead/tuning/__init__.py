"""How long a head's decode steps take here, and what follows from it: measured when a
head is first used on a device, chosen from what was measured, and watched."""

from .choose import Plan, cheapest, cost, dense_wins, kept
from .measure import in_turn
from .store import Store, forget
from .times import KINDS, Cell, Times, kind_of
from .watch import Watch

__all__ = [
    "KINDS",
    "Cell",
    "Plan",
    "Store",
    "Times",
    "Watch",
    "cheapest",
    "cost",
    "dense_wins",
    "forget",
    "in_turn",
    "kept",
    "kind_of",
]
