"""When the dense product is expected to take less time than retrieval, before anything
is measured on the device at hand (:mod:`mlx_flashhead.tuning`).

The constants are measurements on one GPU, an NVIDIA H200 (benchmarks/kernels.py, four
shapes of models). Other GPUs may differ, Apple's included.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..compute.device import on_gpu

if TYPE_CHECKING:
    from .flash_head import FlashHead

# On an H200 the dense product reads its rows once for all states, retrieval for each.
# They broke even at 8 states, where retrieval read this share of the rows.
H200_BREAK_EVEN = 0.55
# The same where the vocabulary is sorted afterwards: candidates are sorted so much
# faster that retrieval still took a quarter of the time at 32 states.
H200_BREAK_EVEN_SORTED = 2.5


def prefers_dense(head: FlashHead, n_states: int, sorts: bool = False) -> bool:
    """Whether the dense product is expected to take less time than retrieval, where
    that was not measured.

    Args:
        head: The head.
        n_states: Hidden states at once.
        sorts: Whether the vocabulary is to be sorted after a dense product.
    """
    if not on_gpu():
        # On a CPU the time of both grows with the states.
        return head.rows_read() >= head.vocab_size
    share = H200_BREAK_EVEN_SORTED if sorts else H200_BREAK_EVEN
    return head.rows_read(n_states) >= share * head.vocab_size
