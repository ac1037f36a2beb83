"""What a conversion reports."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from mlx_flashhead.compute.table import Table
from mlx_flashhead.folder.section import Draft, Measured
from mlx_flashhead.head import FlashHead


@dataclass(frozen=True)
class Report:
    """What a conversion gave.

    Attributes:
        path: The folder, or the file of a sidecar.
        vocab_size, hidden_size, n_clusters, cluster_size, n_probes: Sizes.
        head_bits, centroid_bits: Bits of the FlashHead's rows and centroids.
        dense_bits: Bits of the rows that decide in exact decoding, and with the dense
            head: the plain model's, or the FlashHead's own.
        dense_bytes: Head bytes that a decoded token reads with the dense head.
        flash_bytes: The same with the FlashHead, approximate.
        exact_bytes: The same in exact decoding, for each token that is kept.
        draft_probes, verify_every: Clusters probed for a draft, and tokens verified at
            once, in exact decoding.
        acceptance: Share of drafted tokens that is expected to stand, greedy.
        rows_read: Share of the vocabulary's rows read per token, centroids included.
        recall: Share of held-out states whose best token is probed.
        agreement: Share on which the FlashHead's best token is the dense head's.
        kl: Mean KL(dense || FlashHead) over the whole vocabulary, nats per token.
        held_out_tokens: Number of held-out states.
        seconds: Time taken, without the upload.
        url: Address of the upload.
        model: What a sidecar is for: the model or folder that it was made of.
    """

    path: str
    vocab_size: int
    hidden_size: int
    n_clusters: int
    cluster_size: int
    n_probes: int
    head_bits: int
    centroid_bits: int
    dense_bits: int
    dense_bytes: int
    flash_bytes: int
    exact_bytes: int
    draft_probes: int
    verify_every: int
    acceptance: float
    rows_read: float
    recall: float
    agreement: float
    kl: float
    held_out_tokens: int
    seconds: float
    url: str | None = None
    model: str | None = None

    def __str__(self) -> str:
        return "\n".join(
            [
                f"Vocabulary    {self.vocab_size:,} tokens x {self.hidden_size}, in "
                f"{self.n_clusters:,} clusters of {self.cluster_size}; "
                f"{self.n_probes:,} probed",
                f"Read a token  dense {self.dense_bits}-bit "
                f"{self.dense_bytes / 1e6:.1f} MB; exact "
                f"{self.exact_bytes / 1e6:.1f} MB; approximate "
                f"{self.flash_bytes / 1e6:.1f} MB ({self.head_bits}-bit rows, "
                f"{self.centroid_bits}-bit centroids)",
                f"Exact         {self.draft_probes:,} probed for a draft, "
                f"{self.verify_every} verified at once; "
                f"{100 * self.acceptance:.2f} % of drafts expected to stand",
                f"Held-out text {self.held_out_tokens:,} tokens: recall "
                f"{100 * self.recall:.2f} %, same best token "
                f"{100 * self.agreement:.2f} %, KL {self.kl:.4f} nats",
                f"Took          {self.seconds:.0f} s",
                f"{'Sidecar' if self.model else 'Folder':14}{self.path}",
                *([f"Uploaded      {self.url}"] if self.url else []),
                f"Try           python -m mlx_flashhead.generate {self._options} "
                '--prompt "Once upon a time"',
            ]
        )

    @property
    def _options(self) -> str:
        if self.model is None:
            return f"--model {self.path}"
        return f"--model {self.model} --flashhead {self.path}"


def report_of(
    target: Path,
    head: FlashHead,
    verifying: Table,
    measured: Measured,
    draft: Draft,
    exact_bytes: int,
    start: float,
    model: str | None = None,
) -> Report:
    """The report of a head that was written to a target.

    Args:
        target: The folder or file.
        head: The head.
        verifying: The rows that decide in exact decoding.
        measured, draft: As the section has them.
        exact_bytes: Head bytes of a token that exact decoding keeps.
        start: When it began, by ``time.perf_counter``.
        model: What a sidecar is for.
    """
    return Report(
        path=str(target),
        vocab_size=head.vocab_size,
        hidden_size=head.hidden_size,
        n_clusters=head.n_clusters,
        cluster_size=head.cluster_size,
        n_probes=head.n_probes,
        head_bits=head.rows.bits,
        centroid_bits=head.centroids.bits,
        dense_bits=verifying.bits,
        dense_bytes=verifying.nbytes,
        flash_bytes=head.bytes_read(),
        exact_bytes=exact_bytes,
        draft_probes=draft.n_probes,
        verify_every=draft.verify_every,
        acceptance=draft.acceptance,
        rows_read=head.rows_read() / head.vocab_size,
        seconds=time.perf_counter() - start,
        model=model,
        **asdict(measured),
    )


def report_json(report: Report) -> str:
    """A report as a JSON object, its attributes by their names."""
    return json.dumps(asdict(report), indent=2)
