"""The head's hot path in a few launches, one kernel per file.

Each public function runs as Metal on Apple silicon, as CUDA on NVIDIA GPUs and as
plain MLX operations everywhere else, with the same result. A kernel is trusted only
once it has matched its plain reference on the device at hand (see ``backend``).
"""

from .backend import kind, plain
from .draft import Law, Noise, Rows, Shaping, Tail, draft_greedy, draft_sampled, lowest
from .probe_logits import probe_logits
from .select_probes import select_probes

__all__ = [
    "Law",
    "Noise",
    "Rows",
    "Shaping",
    "Tail",
    "draft_greedy",
    "draft_sampled",
    "kind",
    "lowest",
    "plain",
    "probe_logits",
    "select_probes",
]
