"""The pictures of the documentation are what their scripts draw now, of what the
results say."""

from __future__ import annotations

import re
import subprocess
import sys
import xml.dom.minidom
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "docs/pictures"
RESULTS = ROOT / "benchmarks/RESULTS.md"
# The recording shows what a machine did once.
DRAWN = sorted(p.stem for p in PICTURES.glob("*.svg") if p.stem != "demo")


def shown_in(svg: str) -> set[str]:
    """Texts of a picture: matplotlib draws them, and notes each beside its outlines."""
    return set(re.findall(r"<!-- (.+?) -->", svg, flags=re.S))


def told_by(svg: str) -> str:
    """What a picture shows, in words and figures."""
    (words,) = xml.dom.minidom.parseString(svg).getElementsByTagName("dc:description")
    return words.firstChild.data


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    subprocess.run([sys.executable, PICTURES, "--folder", folder], check=True)
    return folder


def test_every_picture_has_a_script(made):
    assert sorted(p.stem for p in made.iterdir()) == DRAWN and len(DRAWN) == 5


@pytest.mark.parametrize("name", DRAWN)
def test_a_picture_is_what_its_script_draws(name, made):
    new, kept = ((f / f"{name}.svg").read_text() for f in (made, PICTURES))
    assert new.startswith("<?xml") and len(new) < 150_000 and len(kept) < 150_000
    assert told_by(new) == told_by(kept)
    assert shown_in(new) == shown_in(kept)


@pytest.mark.parametrize("name", [*DRAWN, "demo"])
def test_a_document_shows_the_picture(name):
    documents = [*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md"), RESULTS]
    pattern = rf"!\[[^\]]+\]\([\w./]*pictures/{name}\.svg\)"
    assert any(re.search(pattern, d.read_text()) for d in documents)


def test_what_a_token_reads_is_as_the_documents_say():
    kept = (PICTURES / "retrieval.svg").read_text()
    totals = {t for t in shown_in(kept) if t.endswith(" MB a token")}
    assert len(totals) == 2
    dense, flash = sorted((t.split()[0] for t in totals), key=float, reverse=True)
    assert re.search(rf"^dense 8-bit .*% +{dense} ", RESULTS.read_text(), re.M)
    text = (ROOT / "docs/how-it-works.md").read_text()
    assert re.search(rf"\s{flash} MB against\s+{dense} MB", text)


def test_every_head_of_the_results_is_in_the_picture():
    """By a reading of its own: the last row of each name is the one over all texts."""
    told = told_by((PICTURES / "fidelity.svg").read_text())
    ours, theirs = re.findall(
        r"Gemma-3-270M(?:, `--recipe paper`)?:\n\n```\n(.*?)```",
        RESULTS.read_text(),
        re.S,
    )
    heads = r"^((?:dense|FlashHead) \S+).*?%(.*)$"
    rows = dict(re.findall(heads, ours, re.M))
    assert {"dense 8-bit", "dense 4-bit", "FlashHead 1024", "FlashHead exact"} < {*rows}
    probing = dict(re.findall(heads.replace("\\S", "\\d"), theirs, re.M))
    assert len(probing) >= 3
    for name, row in probing.items():
        rows[name.replace("FlashHead", "the paper's recipe, p")] = row
    for name, row in rows.items():
        mb, _, _, agree, _, kl, *_ = row.split()
        assert f" {name}: {mb} MB, KL {kl}, agreement {agree} %" in told, name


def test_what_is_predicted_says_so():
    picture = (PICTURES / "predicted.svg").read_text()
    assert "Predicted, not measured" in shown_in(picture)
    text = RESULTS.read_text()
    predictions = re.findall(r"on (.+?): (.+?\))(?:; |\.$)", told_by(picture))
    assert len(predictions) >= 40
    for chips, said in predictions:
        row = (
            rf"^\| {re.escape(chips.replace(' or ', ', '))} .*\| +{re.escape(said)} \|"
        )
        assert re.search(row, text, re.M), (chips, said)


def test_every_conversion_of_the_results_is_in_the_picture():
    told = told_by((PICTURES / "conversion_time.svg").read_text())
    section = RESULTS.read_text().split("\n## Conversion\n")[1].split("\n### ")[0]
    rows = re.findall(r"^\| (.*?\d x \d.*?) \| (\d+) \| (\d+) \|", section, re.M)
    assert len(rows) >= 4
    for size, wall, processor in rows:
        assert f"{size}: {wall} s, {processor} s of processor" in told


def test_a_recording_shows_what_was_written(tmp_path):
    out = tmp_path / "recording.svg"
    code = "print('a < b' + 100 * 'x'); print('\N{DEGREE SIGN}', end='')"
    words = [sys.executable, PICTURES / "recording.py", "--out", out]
    subprocess.run([*words, sys.executable, "-c", code], check=True)
    picture = xml.dom.minidom.parse(str(out))
    command, *lines = picture.getElementsByTagName("text")
    shown = ["".join(s.firstChild.data for s in line.childNodes) for line in lines]
    assert command.firstChild.data.startswith("$ ")
    assert shown == ["a < b" + 87 * "x", 13 * "x", "\N{DEGREE SIGN}"]
