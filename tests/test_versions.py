"""The oldest mlx-lm that ``pyproject.toml`` allows, in place of the installed one.

``make test-oldest`` has more of it, with the oldest of all other packages.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import other_mlx_lm
import real_models
from documents import ROOT


def test_the_oldest_mlx_lm_is_patched(untied_folder):
    (oldest,) = re.findall(r'"mlx-lm>=([\d.]+)', (ROOT / "pyproject.toml").read_text())
    done = subprocess.run(
        [sys.executable, other_mlx_lm.__file__, str(untied_folder)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(real_models.mlx_lm_of(oldest))},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["version"] == oldest
    assert found["drafted"] > 50
    exact, approximate, dense = (
        found[way] for way in ("exact", "approximate", "dense")
    )
    for name in other_mlx_lm.WAYS.keys() - {"sampled"} | {"batch of 1", "batch of 2"}:
        assert exact[name] == dense[name], name
        # Of rows in 8 bits, whose texts may part at last.
        assert approximate[name][:4] == dense[name][:4], name
    assert exact["penalty"] != exact["greedy"]
    # The draws are ours, whatever mlx-lm it is.
    installed = other_mlx_lm.written(str(untied_folder), exact=True, verify_every=8)
    assert exact["sampled"] == installed["sampled"]
