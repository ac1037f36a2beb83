"""The head's hot path in a few launches, one kernel per file.

Each public function runs as Metal on Apple silicon, as CUDA on NVIDIA GPUs and as
plain MLX operations everywhere else, with the same result. A kernel is trusted only
once it has matched its plain reference on the device at hand (see ``backend``).
"""

from .backend import kind, plain
from .blocks import probe_blocks
from .centroid_logits import centroid_logits
from .draft import draft, lowest
from .law import Draft, Draw, Law, Tail
from .noise import Noise
from .probe_logits import probe_logits
from .rows import Rows
from .select_probes import select_probes
from .shaping import Shaping

__all__ = [
    "Draft",
    "Draw",
    "Law",
    "Noise",
    "Rows",
    "Shaping",
    "Tail",
    "centroid_logits",
    "draft",
    "kind",
    "lowest",
    "plain",
    "probe_blocks",
    "probe_logits",
    "select_probes",
]
