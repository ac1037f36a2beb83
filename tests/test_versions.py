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
    exact, dense = found["exact"], found["dense"]
    for name in exact.keys() - {"sampled", "joined"}:
        assert exact[name] == dense[name], name
    assert exact["penalty"] != exact["greedy"]
    # The draws are ours, whatever mlx-lm it is; but for what its penalties look at.
    for way in other_mlx_lm.DECODINGS:
        installed = other_mlx_lm.written(str(untied_folder), way)
        theirs = {"penalty", *(("sampled", "joined") if way == "dense" else ())}
        for name in installed.keys() - theirs:
            assert found[way][name] == installed[name], (way, name)
