"""Uploads to a hub, with a stand-in for the calls that write, and downloads from a
small one by the real client."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from unittest.mock import Mock, create_autospec

import pytest
from click.testing import CliRunner, Result
from hub import Hub, serving
from huggingface_hub import HfApi, ModelCard, RepoUrl
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from mlx_flashhead.convert import publish
from mlx_flashhead.convert.cli import main
from test_clusters import publish as publish_clusters

from mlx_flashhead import flash_heads, load
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
    with serving() as hub:
        yield hub


class Machine:
    """Processes with a home of their own, on a network where there is only this hub."""

    def __init__(self, home: Path, hub: Hub):
        self.environment = os.environ | {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(home),
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


@pytest.fixture
def api(monkeypatch):
    """Stands in for the client's calls that need an account; with their parameters."""
    api = create_autospec(HfApi, instance=True)
    api.create_repo.side_effect = lambda repo_id, **_: RepoUrl(f"{ENDPOINT}/{repo_id}")
    monkeypatch.setattr(publish, "HfApi", lambda: api)
    return api


ENDPOINT = "https://huggingface.co"


def convert(source: Path, made: Path, repo: str) -> Result:
    words = ["--hf-path", source, "--mlx-path", made, "--upload-repo", repo, "--json"]
    words += ["--cluster-size", 8, "--n-probes", 90]
    return CliRunner().invoke(main, [str(w) for w in words])


def error_of(done: Result) -> str:
    assert done.exit_code == 1
    lines = [x for x in done.stderr.splitlines() if x.startswith("Error: ")]
    assert len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    return lines[0]


def test_there_and_back(hub, machine, tmp_path, tied_source):
    """From a model on the hub to a converted one on the hub, to another machine."""
    base = content(tied_source) | {"README.md": CARD.encode()}
    hub.add("org/base", base)
    made = tmp_path / "made"
    done = machine.convert("--hf-path", "org/base", "--mlx-path", made, "--json")
    card = ModelCard.load(made / "README.md")
    data = card.data.to_dict()
    assert data["base_model"] == "org/base" and data["license"] == "gemma"
    assert data["license_link"] == "https://example.org/terms"
    assert data["library_name"] == "mlx" and data["pipeline_tag"] == "text-generation"
    assert {"mlx", "flashhead"} <= set(data["tags"])
    report = json.loads(done.stdout)
    for text in (
        "mlx_flashhead.generate --model made",
        "mlx_lm.generate --model made",
        f"{report['recall']:.2%}",
        f"{report['agreement']:.2%}",
        f"{report['kl']:.4f} nats",
        f"{report['held_out_tokens']:,} tokens",
        "126 of 8",
    ):
        assert text in card.text, text

    uploaded = content(made)
    sha = hub.add("someone/made", uploaded)
    other = Machine(tmp_path / "elsewhere", hub)
    wanted = other.run("-c", LOAD, made).stdout
    assert wanted.startswith("1 ")
    assert other.run("-c", LOAD, "someone/made").stdout == wanted
    # The second time from the cache: with the hub's answer, and without a hub.
    n = len(hub.downloads)
    assert ("someone/made", HEAD_FILE) in hub.downloads
    assert other.run("-c", LOAD, "someone/made").stdout == wanted
    assert len(hub.downloads) == n
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


def test_an_upload(api, tmp_path, untied_source):
    """In one commit; what mlx-lm would load of an older version goes."""
    made = tmp_path / "made"
    done = convert(untied_source, made, "someone/made")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["url"] == f"{ENDPOINT}/someone/made"
    api.whoami.assert_called_once_with()
    api.create_repo.assert_called_once_with("someone/made", exist_ok=True)
    (call,) = api.upload_folder.call_args_list
    assert call.kwargs["repo_id"] == "someone/made"
    assert call.kwargs["folder_path"] == made and "ignore_patterns" not in call.kwargs
    deleted = call.kwargs["delete_patterns"]
    for old in ("model-00001-of-00002.safetensors", "model.safetensors.index.json"):
        assert any(fnmatch(old, pattern) for pattern in deleted)
    assert not any(fnmatch("LICENSE", pattern) for pattern in deleted)
    card = ModelCard.load(made / "README.md")
    assert "base_model" not in card.data.to_dict()
    assert "mlx_flashhead.generate --model someone/made" in card.text


def test_a_sidecar_is_uploaded_alone(api, tmp_path, untied_source):
    """What is beside it stays, and no weights' licence is asked for."""
    source = Path(shutil.copytree(untied_source, tmp_path / "source"))
    (source / "README.md").write_text(CARD)
    (source / "LICENSE.txt").write_text("Do good.")
    made = tmp_path / "made"
    words = ["--hf-path", source, "--sidecar", made, "--upload-repo", "someone/head"]
    words += ["--cluster-size", 8, "--n-probes", 90, "--json"]
    done = CliRunner().invoke(main, [str(w) for w in words])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["url"] == f"{ENDPOINT}/someone/head"
    (call,) = api.upload_folder.call_args_list
    assert call.kwargs["folder_path"] == made and not call.kwargs["delete_patterns"]
    assert {f.name for f in made.iterdir()} == {HEAD_FILE, "README.md"}
    card = ModelCard.load(made / "README.md")
    assert "license" not in card.data.to_dict()
    assert "mlx_flashhead" in card.text and "--flashhead someone/head" in card.text


def test_licences_go_along(machine, tmp_path, untied_source):
    source = Path(shutil.copytree(untied_source, tmp_path / "source"))
    head = "---\nlicense_name: own\nbase_model: a/b\nlanguage: de\n---\n"
    (source / "README.md").write_text(head)
    (source / "LICENSE.txt").write_text("Do good.")
    machine.convert("--hf-path", source, "--mlx-path", tmp_path / "made")
    assert (tmp_path / "made/LICENSE.txt").read_text() == "Do good."
    data = ModelCard.load(tmp_path / "made/README.md").data.to_dict()
    assert (data["license"], data["license_name"]) == ("other", "own")
    assert data["base_model"] == "a/b" and data["language"] == "de"


@pytest.mark.parametrize("repo", ["a/b/c", "a/b"])
def test_refused_before_any_work(api, tmp_path, untied_source, repo):
    api.whoami.side_effect = LocalTokenNotFoundError("Token is required")
    error = error_of(convert(untied_source, tmp_path / "made", repo))
    assert f"--upload-repo {repo}" in error
    assert ("log in" in error) == (repo == "a/b")
    assert not (tmp_path / "made").exists() and not api.create_repo.called


def test_an_upload_that_fails_leaves_the_folder(api, tmp_path, untied_source):
    full = HfHubHTTPError("the storage is full", response=Mock(headers={}))
    api.upload_folder.side_effect = full
    made = tmp_path / "made"
    error = error_of(convert(untied_source, made, "someone/m"))
    assert "(the storage is full)" in error
    assert f"hf upload someone/m {made}" in error
    assert list(flash_heads(load(made)[0]))


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
    assert sorted(hub.downloads) == sorted(("authors/clusters", name) for name in files)
