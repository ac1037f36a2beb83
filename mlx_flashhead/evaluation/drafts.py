"""What exact decoding reads for each token that it keeps."""

from __future__ import annotations

from ..folder.section import Draft
from ..head import FlashHead
from ..tuning import kept


def bytes_per_token(
    head: FlashHead, dense_bytes: int, draft: Draft, body_bytes: int = 0
) -> float:
    """Bytes read for each token that is kept.

    Args:
        head: The head.
        dense_bytes: Of all rows that a verification reads; drafts read some of them.
        draft: How it is drafted.
        body_bytes: What a step of the model's body reads.
    """
    k = draft.verify_every
    drafted = head.centroids.nbytes + head.spread.nbytes
    drafted += dense_bytes * draft.n_probes // head.n_clusters
    return (k * (body_bytes + drafted) + dense_bytes) / kept(draft.acceptance, k)
