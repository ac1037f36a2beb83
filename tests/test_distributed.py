"""A model that two processes share, through ``mlx.launch`` and its ring back-end."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
import ranks

from mlx_flashhead import load

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def written(untied_folder, tmp_path_factory) -> list[dict[str, list]]:
    """What each of the two wrote."""
    if not mx.distributed.is_available("ring"):
        pytest.skip("this MLX has no ring back-end")
    out = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = Path(sys.executable).with_name("mlx.launch")
    options = ("--hosts", "127.0.0.1", "-n", 2, "--backend", "ring", "-p", port)
    words = (launch, *options, "--python", sys.executable, ranks.__file__)
    done = subprocess.run(
        [str(w) for w in (*words, untied_folder, out)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    files = sorted(out.iterdir())
    assert len(files) == 2, done.stdout + done.stderr
    return [json.loads(file.read_text()) for file in files]


def test_every_rank_draws_the_same_tokens(written):
    """Exactly and approximately, greedily and by chance, whatever their seeds are."""
    first, second = written
    assert len(first) == 12
    assert first == second
    assert first["True greedy"] != first["True sampled"]


def test_the_tokens_are_those_of_one_process(written, untied_folder):
    """Drawn by the seed of the first."""
    wanted = ranks.texts(lambda exact: load(untied_folder, exact=exact), ranks.SEED)
    for name, text in wanted.items():
        assert written[0][name] == text, name
