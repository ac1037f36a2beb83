"""Uploads to a hub and loading from one: the real client, a small hub of our own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import fake_hub
import pytest
from huggingface_hub import ModelCard
from test_clusters import publish as publish_clusters

from mlx_flashhead.folder.format import HEAD_FILE

LOAD = """
import sys, numpy as np, mlx.core as mx
from mlx_flashhead import flash_heads, load
revision = sys.argv[2] if len(sys.argv) > 2 else None
model, tokenizer = load(sys.argv[1], revision=revision)
print(len(list(flash_heads(model))), float(model(mx.array([[72, 101]])).sum()))
"""


@pytest.fixture
def hub():
    with fake_hub.serving() as hub:
        yield hub


class Machine:
    """Processes with a home of their own, on a network where there is only this hub."""

    def __init__(self, home: Path, hub: fake_hub.FakeHub, token: str = fake_hub.TOKEN):
        self.environment = os.environ | {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(home),
            "HF_TOKEN": token,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "no_proxy": "127.0.0.1",
        }

    def run(self, *words, code: int = 0, **env: str) -> subprocess.CompletedProcess:
        done = subprocess.run(
            [sys.executable, *map(str, words)],
            capture_output=True,
            text=True,
            env=self.environment | env,
            timeout=120,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done

    def convert(self, *words, **options):
        words = ("--cluster-size", 8, "--n-probes", 90, *words)
        return self.run("-m", "mlx_flashhead.convert", *words, **options)


@pytest.fixture
def machine(hub, tmp_path):
    return Machine(tmp_path / "home", hub)


CARD = """---
license: gemma
license_link: https://example.org/terms
language: [en, de]
tags: [chat]
---
# Base
"""


def content(folder: Path, **more: str) -> dict[str, bytes]:
    found = {f.name: f.read_bytes() for f in folder.iterdir() if f.is_file()}
    return found | {name: text.encode() for name, text in more.items()}


def error_of(done) -> str:
    lines = [x for x in done.stderr.splitlines() if x.startswith("Error: ")]
    assert len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    return lines[0]


def test_there_and_back(hub, machine, tmp_path, tied_source):
    """From a model on the hub to a converted one on the hub, to another machine."""
    base = content(tied_source) | {"README.md": CARD.encode()}
    hub.add("org/base", base)
    words = ("--hf-path", "org/base", "--mlx-path", tmp_path / "made")
    done = machine.convert(*words, "--upload-repo", "someone/made", "--json")
    assert json.loads(done.stdout)["url"] == f"{hub.url}/someone/made"
    sha, uploaded = hub.repos["someone/made"].at("main")
    assert content(tmp_path / "made").items() <= uploaded.items()
    assert HEAD_FILE in uploaded

    card = ModelCard(uploaded["README.md"].decode())
    data = card.data.to_dict()
    assert data["base_model"] == "org/base" and data["license"] == "gemma"
    assert data["license_link"] == "https://example.org/terms"
    assert data["library_name"] == "mlx" and data["pipeline_tag"] == "text-generation"
    assert {"mlx", "flashhead"} <= set(data["tags"])
    report = json.loads(done.stdout)
    for text in (
        "mlx_flashhead.generate --model someone/made",
        "mlx_lm.generate --model someone/made",
        f"{report['recall']:.2%}",
        f"{report['agreement']:.2%}",
        f"{report['kl']:.4f} nats",
        f"{report['held_out_tokens']:,} tokens",
        "126 of 8",
    ):
        assert text in card.text, text

    other = Machine(tmp_path / "elsewhere", hub, token="")
    wanted = other.run("-c", LOAD, tmp_path / "made").stdout
    assert wanted.startswith("1 ")
    assert other.run("-c", LOAD, "someone/made").stdout == wanted
    # The second time from the cache: with the hub's answer, and without a hub.
    n = len([r for r in hub.requests if r.startswith("GET /someone/made/resolve")])
    assert n > 4
    assert other.run("-c", LOAD, "someone/made").stdout == wanted
    again = [r for r in hub.requests if r.startswith("GET /someone/made/resolve")]
    assert len(again) == n
    assert other.run("-c", LOAD, "someone/made", HF_HUB_OFFLINE="1").stdout == wanted

    # Another version, without a head that belongs to it, beside the one before.
    hub.add("someone/made", uploaded | {HEAD_FILE: b"damaged"})
    failed = other.run("-c", LOAD, "someone/made", code=1).stderr
    assert "FormatError" in failed and HEAD_FILE in failed
    assert other.run("-c", LOAD, "someone/made", sha).stdout == wanted
    failed = other.run("-c", LOAD, "someone/made", "v9", code=1).stderr
    assert "RevisionNotFound" in failed
    failed = other.run("-c", LOAD, "someone/none", code=1).stderr
    assert "RepositoryNotFound" in failed


def test_a_model_without_a_card(hub, machine, tmp_path, tied_source):
    hub.add("org/base", content(tied_source))
    machine.convert("--hf-path", "org/base", "--mlx-path", tmp_path / "made")
    data = ModelCard.load(tmp_path / "made/README.md").data.to_dict()
    assert data["base_model"] == "org/base" and "license" not in data


def test_an_upload_replaces_what_mlx_lm_would_load(
    hub, machine, tmp_path, untied_source
):
    old = {"model-00001-of-00002.safetensors": b"old", "LICENSE": b"mine"}
    hub.add("someone/made", old | {"model.safetensors.index.json": b"old"})
    words = ("--hf-path", untied_source, "--mlx-path", tmp_path / "made")
    machine.convert(*words, "--upload-repo", "someone/made")
    _, uploaded = hub.repos["someone/made"].at("main")
    assert uploaded.keys() - {"LICENSE"} == content(tmp_path / "made").keys()
    card = ModelCard(uploaded["README.md"].decode())
    assert "base_model" not in card.data.to_dict()


def test_licences_go_along(hub, machine, tmp_path, untied_source):
    import shutil

    source = Path(shutil.copytree(untied_source, tmp_path / "source"))
    head = "---\nlicense_name: own\nbase_model: a/b\nlanguage: de\n---\n"
    (source / "README.md").write_text(head)
    (source / "LICENSE.txt").write_text("Do good.")
    machine.convert("--hf-path", source, "--mlx-path", tmp_path / "made")
    assert (tmp_path / "made/LICENSE.txt").read_text() == "Do good."
    data = ModelCard.load(tmp_path / "made/README.md").data.to_dict()
    assert (data["license"], data["license_name"]) == ("other", "own")
    assert data["base_model"] == "a/b" and data["language"] == "de"


@pytest.mark.parametrize("repo, token", [("a/b/c", None), ("a/b", "hf_wrong")])
def test_refused_before_any_work(hub, tmp_path, untied_source, repo, token):
    machine = Machine(tmp_path / "home", hub, token or fake_hub.TOKEN)
    words = ("--hf-path", untied_source, "--mlx-path", tmp_path / "made")
    error = error_of(machine.convert(*words, "--upload-repo", repo, code=1))
    assert f"--upload-repo {repo}" in error
    assert ("log in" in error) == (token is not None)
    assert not (tmp_path / "made").exists()


def test_an_upload_that_fails_leaves_the_folder(hub, machine, tmp_path, untied_source):
    hub.full = True
    words = ("--hf-path", untied_source, "--mlx-path", tmp_path / "made")
    error = error_of(machine.convert(*words, "--upload-repo", "someone/m", code=1))
    assert "hf upload someone/m" in error and str(tmp_path / "made") in error
    assert machine.run("-c", LOAD, tmp_path / "made").stdout.startswith("1 ")
    # Nothing of it is on the hub.
    assert hub.repos["someone/m"].at("main")[1].keys() == {".gitattributes"}


def test_clusters_from_the_hub(hub, machine, tmp_path, untied_source):
    folder = publish_clusters(tmp_path / "clusters")
    files = {
        f"flash_head_assets/{f.name}": f.read_bytes()
        for f in (folder / "flash_head_assets").iterdir()
    }
    hub.add("authors/clusters", files | {"model.safetensors": b"not asked for"})
    words = ("--hf-path", untied_source, "--mlx-path", tmp_path / "made")
    machine.convert(*words, "--clusters", "authors/clusters")
    config = json.loads((tmp_path / "made/config.json").read_text())
    assert config["flashhead"]["clusters"] == "authors/clusters"
    assert not any("resolve/main/model" in r for r in hub.requests)
