"""Results that people share: what a benchmark writes is taken in, and nothing else."""

from __future__ import annotations

import copy
import importlib.util
import json

import pytest
from click.testing import CliRunner
from documents import ROOT

from mlx_flashhead.benchmarking import community

_spec = importlib.util.spec_from_file_location(
    "community", ROOT / "benchmarks/community.py"
)
script = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(script)


def row(kind, sampler="greedy", speed=100.0):
    drafts = kind == "exact"
    spread = {"median": speed, "min": 0.9 * speed, "max": 1.1 * speed}
    return {
        "head": f"head {kind}",
        "kind": kind,
        "batch_size": 1,
        "prompt_tokens": 32,
        "sampler": sampler,
        "max_tokens": 64,
        "tokens_per_second": spread,
        "first_token_seconds": {"median": 0.02, "min": 0.02, "max": 0.02},
        "acceptance": 0.995 if drafts else None,
        "waste": 0.02 if drafts else None,
    }


MACHINE = {
    "device": "Apple M9",
    "cpu": "Apple M9",
    "memory_bytes": 16 << 30,
    "backend": "Metal",
    "os": "macOS 99.1",
    "versions": {"python": "3.12.1", "mlx": "0.32.4"},
}


@pytest.fixture
def record(tmp_path):
    (tmp_path / "private/my-model").mkdir(parents=True)
    rows = [row("16", speed=80.0), row("8"), row("flash"), row("exact", speed=150.0)]
    model = str(tmp_path / "private/my-model")
    return community.record(model, rows, MACHINE, ["low power mode is on"])


def test_a_block_is_read_back(record):
    pasted = f"# Mine\n\nBelow.\n\n{community.block(record)}\n\nCheers"
    assert script.read(pasted) == record
    assert script.read(json.dumps(record)) == record
    assert record["model"] == "my-model" and "private" not in json.dumps(record)
    assert record["rows"][3]["tokens_per_second"] == [150.0, 135.0, 165.0]


def changed(record, path, value):
    other = copy.deepcopy(record)
    at = other
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return other


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("format",), 2),
        (("date",), "yesterday"),
        (("device",), "a\nb"),
        (("device",), "<script>"),
        (("rows",), []),
        (("rows", 0, "kind"), "quantum"),
        (("rows", 0, "tokens_per_second"), [100.0, 110.0, 120.0]),
        (("rows", 0, "tokens_per_second"), [100.0, 0, 120.0]),
        (("rows", 0, "acceptance"), 1.5),
        (("rows", 0, "batch_size"), True),
        (("unknown",), 1),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(record, path, value):
    with pytest.raises(ValueError) as e:
        script.read(json.dumps(changed(record, path, value)))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "text", ["", "hello", "{", "[" * 100_000, '{"format": NaN}', "{" * 100_000]
)
def test_what_is_no_record_is_refused_in_one_line(text):
    with pytest.raises(ValueError) as e:
        script.read(text)
    assert "\n" not in str(e.value)


def test_records_are_kept_checked_and_shown(record, tmp_path, monkeypatch):
    kept = tmp_path / "kept"
    kept.mkdir()
    monkeypatch.setattr(script, "ROOT", tmp_path)
    monkeypatch.setattr(script, "FOLDER", kept)
    monkeypatch.setattr(script, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(script, "PICTURE", tmp_path / "picture.svg")
    pasted = tmp_path / "results.md"
    pasted.write_text(community.block(record))
    done = CliRunner().invoke(script.main, ["add", str(pasted)])
    assert done.exit_code == 0, done.output
    (file,) = kept.iterdir()
    assert file.name.startswith("apple-m9-my-model-")
    assert script.records(kept) == [record]
    with monkeypatch.context() as patched:
        patched.setattr(script, "records", lambda *_: [record])
        done = CliRunner().invoke(script.main, ["page"])
    assert done.exit_code == 0, done.output
    text = (tmp_path / "page.md").read_text()
    assert "| Apple M9, 16 GB * | my-model | greedy  |" in text and "150.0" in text
    assert "<svg" in (tmp_path / "picture.svg").read_text()
    # Somebody edits a figure.
    file.write_text(file.read_text().replace("150.0", "151.0"))
    with pytest.raises(ValueError, match="changed since it was added"):
        script.records(kept)


def test_what_the_repository_keeps_is_whole_and_its_page_up_to_date():
    found = script.records()
    assert script.PAGE.read_text("utf-8") == script.page(found)
    assert script.PICTURE.exists() == bool(found)
