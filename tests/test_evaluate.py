"""``mlx_flashhead.evaluate`` against independent computations in float64."""

from __future__ import annotations

import json
import tracemalloc
from importlib import import_module
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import small_models
from click.testing import CliRunner
from mlx_flashhead.convert import convert
from mlx_lm import utils
from small_heads import Made, expected, implied, make_head, random_states, unpack
from test_gguf import gguf_tensors, reference_model, write_gguf

from mlx_flashhead import cli, load
from mlx_flashhead import evaluate as command
from mlx_flashhead.compute import linalg
from mlx_flashhead.compute.table import Table
from mlx_flashhead.evaluation.compare import (
    MEASURES,
    Comparison,
    Reference,
    Sums,
    ladder,
)
from mlx_flashhead.folder.section import read_section
from mlx_flashhead.head import ALWAYS
from mlx_flashhead.head.transform import Transform

TEXT = "The quick brown fox jumps over the lazy dog; 3 + 4 = 7, and so on. " * 9
OTHER = "def f(x):\n    return [y ** 2 for y in range(x) if y % 3]\n\n" * 7
PROBES = (2, 5, 20)


def case(bias: bool = False, transform: Transform | None = None) -> tuple:
    """A FlashHead, a reference that differs from it by noise, states and tokens."""
    made: Made = make_head(n_probes=5, bias=bias)
    head = made.head
    if transform is not None:
        head.transform = transform
    rng = np.random.default_rng(7)
    weight = unpack(made.table)
    weight = (weight + 0.05 * rng.standard_normal(weight.shape)).astype(np.float32)
    reference = Reference("made", Table(mx.array(weight), bits=32), made.bias)
    states = random_states(48) * 0.6
    return head, reference, states, rng.integers(0, head.vocab_size, len(states))


def log_softmax(x: np.ndarray) -> np.ndarray:
    return x - np.logaddexp.reduce(x, axis=-1, keepdims=True)


def naive(log_p, log_q, choice, probed, tokens) -> dict[str, float]:
    """Figures from two distributions over the vocabulary ``[n, V]``, the head's choice
    ``[n]`` and which tokens it scored ``[n, V]``."""
    p, q, rows = np.exp(log_p), np.exp(log_q), np.arange(len(tokens))
    top = np.argsort(-p, axis=1)[:, :10]
    nll, of_reference = -log_q[rows, tokens].mean(), -log_p[rows, tokens].mean()
    return {
        "recall": probed[rows, top[:, 0]].mean(),
        "top10_recall": np.take_along_axis(probed, top, 1).mean(),
        "agreement": (choice == top[:, 0]).mean(),
        "probed_mass": (p * probed).sum(1).mean(),
        "kl": (p * (log_p - log_q)).sum(1).mean(),
        "total_variation": np.abs(p - q).sum(1).mean() / 2,
        "perplexity": np.exp(nll),
        "perplexity_ratio": np.exp(nll - of_reference),
    }


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("transform", [Transform(), Transform(0.8, 6.0)])
def test_figures_are_those_of_an_independent_computation(bias, transform):
    head, reference, states, tokens = case(bias, transform)
    comparison = Comparison(head, reference, PROBES)
    found = comparison.measure(states, tokens).figures()
    h = states.astype(np.float64)
    offset = 0 if reference.bias is None else reference.bias.astype(np.float64)

    def logits(rows):
        return transform(h @ rows.T + offset)

    weight = np.array(reference.table.weight).astype(np.float64)
    log_p = log_softmax(logits(weight))
    wanted = {}
    for bits in (8, 4):
        rows = unpack(Table.from_dense(reference.table.weight, bits, 64))
        log_q = log_softmax(logits(rows))
        everything = np.ones(log_q.shape, bool)
        choice = log_q.argmax(1)
        wanted[f"dense {bits}-bit"] = naive(log_p, log_q, choice, everything, tokens)
    clusters = np.array(head.token_ids)
    for n in PROBES:
        head.n_probes = n
        want = expected(head, states)
        probed = np.zeros(log_p.shape, bool)
        for b, chosen in enumerate(want.probes):
            ids = clusters[sorted(chosen)].reshape(-1)
            probed[b, ids[ids < head.vocab_size]] = True
        choice = np.where(probed, want.dense, -np.inf).argmax(1)
        log_q = np.log(implied(head, states, 1.0))
        wanted[f"FlashHead {n}"] = naive(log_p, log_q, choice, probed, tokens)
    assert list(found["heads"]) == list(wanted)
    assert 0 < wanted["FlashHead 5"]["recall"] < 1
    assert wanted["dense 4-bit"]["agreement"] < 1
    for name, figures in wanted.items():
        assert found["heads"][name] == pytest.approx(figures, rel=2e-4, abs=1e-5), name
    of_text = np.exp(-log_p[np.arange(len(tokens)), tokens].mean())
    assert found["reference"]["perplexity"] == pytest.approx(of_text, rel=1e-4)
    assert found["tokens"] == len(states)


def test_heads_say_what_they_read():
    head, reference, _, _ = case()
    heads = {h.name: h for h in Comparison(head, reference, PROBES).heads}
    v, d = reference.table.weight.shape
    # float32 scales and biases, one of each for 64 weights.
    assert heads["dense 8-bit"].bytes_read == v * (d + 8 * d // 64)
    assert heads["dense 4-bit"].bytes_read == v * (d // 2 + 8 * d // 64)
    assert heads["dense 4-bit"].rows_read == v
    for n in PROBES:
        made = heads[f"FlashHead {n}"]
        assert made.rows_read == head.n_clusters + n * head.cluster_size
        assert made.stored == (n == 5) and made.n_probes == n
    assert head.n_probes == 5


def test_blocks_and_windows_change_nothing(monkeypatch):
    head, reference, states, tokens = case(bias=True)
    comparison = Comparison(head, reference, PROBES)
    whole = comparison.measure(states, tokens).figures()
    monkeypatch.setattr(linalg, "BLOCK", 7 * head.n_clusters * head.cluster_size)
    parts = Sums()
    for s in (slice(0, 20), slice(20, 21), slice(21, 48)):
        parts.add(comparison.measure(states[s], tokens[s]))
    parts = parts.figures()
    assert parts["tokens"] == whole["tokens"] == 48
    assert parts["reference"] == pytest.approx(whole["reference"], rel=1e-5)
    for name, figures in whole["heads"].items():
        assert parts["heads"][name] == pytest.approx(figures, rel=1e-4, abs=1e-6)


def test_the_default_numbers_of_probes_leave_some_for_each_state():
    head = make_head(vocab_size=4096, n_probes=64).head
    assert ladder(head) == [16, 32, 64, 128, 256]
    head.spread[:20] = ALWAYS
    assert ladder(head) == [64, 128, 256]
    head.n_probes = 400
    assert ladder(head) == [100, 200, 400, 512]


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("texts")
    for name, text in (("prose", TEXT), ("code", OTHER)):
        (folder / f"{name}.txt").write_text(text)
    return [folder / "prose.txt", folder / "code.txt"]


@pytest.fixture(scope="module")
def softcapped(tmp_path_factory) -> Path:
    """A converted model that caps its logits."""
    folder = tmp_path_factory.mktemp("gemma2")
    source = small_models.write("gemma2", folder / "source", 1003)
    convert(str(source), folder / "made", cluster_size=8, n_probes=40, verbose=False)
    return folder / "made"


@pytest.mark.parametrize("kind", ["tied", "untied", "softcapped"])
def test_the_reference_is_the_model(kind, texts, request):
    """Its perplexity is stock mlx-lm's, window by window."""
    name = kind if kind == "softcapped" else f"{kind}_folder"
    folder = request.getfixturevalue(name)
    result = command.evaluate(folder, texts, tokens=400, verbose=False)
    model, tokenizer = utils.load(str(folder))
    model.set_dtype(mx.float32)
    total = 0
    for text in texts:
        ids = tokenizer.encode(text.read_text())[:402]
        # States of the first window, and of the second after the first token.
        windows = [ids[:257], [ids[0], *ids[257:401]]]
        wanted, after = 0.0, ids[2:]
        for window in windows:
            logits = np.array(model(mx.array([window]))[0, 1:], np.float64)
            here, after = after[: len(logits)], after[len(logits) :]
            wanted -= log_softmax(logits)[np.arange(len(here)), here].sum()
        figures = result["domains"][text.stem]
        n = len(ids) - 2
        assert not after and figures["tokens"] == n
        found = figures["reference"]["perplexity"]
        assert found == pytest.approx(np.exp(wanted / n), rel=1e-4)
        total += n
    assert result["overall"]["tokens"] == total


def test_overall_weighs_tokens(tied_folder, texts):
    result = command.evaluate(tied_folder, texts, tokens=300, verbose=False)
    tokens = [d["tokens"] for d in result["domains"].values()]
    for name, figures in result["overall"]["heads"].items():
        for key in MEASURES:
            each = [d["heads"][name][key] for d in result["domains"].values()]
            assert figures[key] == pytest.approx(np.average(each, weights=tokens))
        logs = [
            np.log(d["heads"][name]["perplexity"]) for d in result["domains"].values()
        ]
        wanted = np.exp(np.average(logs, weights=tokens))
        assert figures["perplexity"] == pytest.approx(wanted)


def greedy(model, prompt: list[int], n: int) -> list[int]:
    """What mlx-lm's own decoding gives, patched where there is a FlashHead."""
    generate = import_module("mlx_lm.generate")
    steps = generate.generate_step(mx.array(prompt), model, max_tokens=n)
    return [int(token) for token, _ in steps]


def test_continuations_differ_where_real_decoding_does(untied_folder):
    prompts = [TEXT[i : i + 12] for i in range(0, 120, 12)]
    n, p = 24, 20
    result = command.evaluate(
        untied_folder,
        [__file__],
        tokens=4,
        n_probes=[p],
        prompts=prompts,
        max_tokens=n,
        verbose=False,
    )
    heads = {h["name"]: h["continuations"] for h in result["heads"]}
    dense, tokenizer = load(untied_folder, dense=True)
    for name, probes in ((f"FlashHead {p}", p), ("FlashHead 90", None)):
        flash, _ = load(untied_folder, n_probes=probes, exact=False)
        firsts = []
        for prompt in prompts:
            ids = tokenizer.encode(prompt)
            pairs = zip(greedy(dense, ids, n), greedy(flash, ids, n), strict=True)
            firsts.append(
                next((i for i, (a, b) in enumerate(pairs, 1) if a != b), None)
            )
        assert heads[name]["first_difference"] == firsts, name
        differing = [f for f in firsts if f is not None]
        assert heads[name]["identical"] == 1 - len(differing) / len(prompts)
    figures = heads[f"FlashHead {p}"]
    assert any(f is not None for f in figures["first_difference"])
    differing = [f for f in figures["first_difference"] if f is not None]
    assert figures["median_first_difference"] == np.median(differing)
    for first, gap in zip(figures["first_difference"], figures["gap"], strict=True):
        assert (first is None) == (gap is None)
        assert gap is None or gap > 0


def test_a_near_tie_is_within_the_margin(untied_folder):
    """The gap is what the dense model's logits say."""
    prompts = [TEXT[i : i + 9] for i in range(0, 90, 9)]
    result = command.evaluate(
        untied_folder,
        [__file__],
        tokens=4,
        n_probes=[10],
        prompts=prompts,
        max_tokens=8,
        verbose=False,
    )
    figures = next(h for h in result["heads"] if h["n_probes"] == 10)["continuations"]
    dense, tokenizer = load(untied_folder, dense=True)
    flash, _ = load(untied_folder, n_probes=10, exact=False)
    gaps = []
    for prompt, first in zip(prompts, figures["first_difference"], strict=True):
        if first is None:
            continue
        ids = tokenizer.encode(prompt)
        theirs, mine = greedy(dense, ids, 8), greedy(flash, ids, 8)
        before = mx.array([ids + theirs[: first - 1]])
        logits = np.array(dense(before)[0, -1].astype(mx.float32))
        gaps.append(logits[theirs[first - 1]] - logits[mine[first - 1]])
    found = [g for g in figures["gap"] if g is not None]
    assert len(found) >= 2
    np.testing.assert_allclose(found, gaps, atol=1e-3)
    margin = figures["near_tie_margin"]
    assert figures["near_ties"] == np.mean([g <= margin for g in found])


def test_the_folder_of_a_quantized_body_needs_a_reference(
    tied_source, tied_folder, texts, tmp_path
):
    folder = tmp_path / "made"
    convert(
        str(tied_source),
        folder,
        quantize=True,
        cluster_size=8,
        n_probes=90,
        verbose=False,
    )
    with pytest.raises(ValueError, match=r"8 bits.*--reference"):
        command.evaluate(folder, texts, tokens=8, verbose=False)
    options = {"tokens": 60, "verbose": False, "reference": str(tied_source)}
    found = command.evaluate(folder, texts[:1], **options)
    assert found["overall"]["reference"]["name"] == str(tied_source)
    assert found["overall"]["reference"]["bits"] == 16
    # The folder's own head, where it has it, is the source's.
    mine = command.evaluate(tied_folder, texts[:1], tokens=60, verbose=False)
    theirs = command.evaluate(tied_folder, texts[:1], **options)
    assert mine["domains"] == theirs["domains"]


def test_a_gguf_file_is_a_reference(tmp_path):
    model = reference_model("llama")
    file = write_gguf(tmp_path / "m.gguf", "llama", gguf_tensors("llama", model))
    folder = tmp_path / "made"
    convert(gguf_path=str(file), mlx_path=folder, n_probes=4, verbose=False)
    text = tmp_path / "a.txt"
    text.write_text(TEXT)
    options = {"tokens": 40, "verbose": False}
    own = command.evaluate(folder, [text], **options)
    other = command.evaluate(folder, [text], reference=str(file), **options)
    assert own["domains"] == other["domains"]
    assert other["overall"]["reference"]["name"] == str(file)


def run(*arguments) -> tuple[int, str]:
    result = CliRunner().invoke(command.main, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.output


def test_the_command_writes_table_json_and_plot(tied_folder, texts, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "The quick"}\n\n{"prompt": "A\u2028b"}\n')
    figures, picture = tmp_path / "out.json", tmp_path / "out.png"
    options = ["--model", tied_folder, "--tokens", 50, "--n-probes", "30,60"]
    options += ["--generate", prompts, "--max-tokens", 5]
    options += ["--json", figures, "--plot", picture]
    code, output = run(*options, "--text", texts[0], "--text", texts[1])
    assert code == 0, output
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "out.json",
        "out.png",
        "prompts.jsonl",
    ]
    found = json.loads(figures.read_text())
    assert list(found) == ["domains", "overall", "heads"]
    assert list(found["domains"]) == ["prose", "code"]
    names = ["dense 8-bit", "dense 4-bit", "FlashHead 30", "FlashHead 60"]
    names += ["FlashHead 90", "FlashHead exact"]
    assert [h["name"] for h in found["heads"]] == names
    assert [h["stored"] for h in found["heads"]] == [False] * 4 + [True, True]
    for part in (*found["domains"].values(), found["overall"]):
        assert set(part) == {"tokens", "reference", "heads"}
        assert list(part["heads"]) == names
        for each in part["heads"].values():
            assert set(each) == {*MEASURES, "perplexity", "perplexity_ratio"}
            assert all(isinstance(x, float) for x in each.values())
    for head in found["heads"]:
        assert head["continuations"]["prompts"] == 2
    for name in ("prose", "code", "overall", *names):
        assert name in output
    # The folder's own rows decide, and they are the reference.
    exact = found["overall"]["heads"]["FlashHead exact"]
    assert exact["agreement"] == 1 and abs(exact["kl"]) < 1e-6
    assert found["heads"][-1]["continuations"]["identical"] == 1
    # Its recall is that of its drafts.
    draft = read_section(tied_folder).draft
    assert found["heads"][-1]["n_probes"] == draft.n_probes
    code, without = run(*options, "--text", texts[0], "--approximate")
    assert code == 0 and "FlashHead exact" not in without
    kl = found["overall"]["heads"]["FlashHead 30"]["kl"]
    assert f"{kl:.5f}" in output and " of 2" in output
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 9999


def test_a_plain_run_needs_no_plot_and_no_prompts(tied_folder, texts):
    code, output = run("--model", tied_folder, "--text", texts[0], "--tokens", 20)
    assert code == 0 and "overall" not in output and "continuations" not in output


BAD = {
    "no folder": (["--model", "/nowhere/at/all"], "no such folder"),
    "plain folder": (["--model", "{source}"], "has no FlashHead"),
    "missing text": (["--text", "{tmp}/none.txt"], "none.txt"),
    "binary text": (["--text", "{tmp}/binary.txt"], "UTF-8"),
    "short text": (["--text", "{tmp}/short.txt"], "too short"),
    "missing reference": (["--reference", "no/such/model"], "--reference no/such"),
    "missing gguf": (["--reference", "{tmp}/none.gguf"], "none.gguf"),
    "other sizes": (["--reference", "{tmp}/smaller"], "600 x 64"),
    "quantized": (["--reference", "{tmp}/quantized"], "is quantized (4 bits)"),
    "a file": (["--reference", "{tmp}/short.txt"], "--reference"),
    "probes": (["--n-probes", "90,9999"], "n_probes"),
    "no prompts": (["--generate", "{tmp}/empty.jsonl"], "no prompts"),
    "bad prompts": (["--generate", "{tmp}/short.txt"], "line 1"),
    "json nowhere": (["--json", "/nowhere/a.json"], "--json"),
    "plot kind": (["--plot", "{tmp}/a.txt"], "--plot"),
}


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    (folder / "binary.txt").write_bytes(b"\xff\xfe\x00\x81")
    (folder / "short.txt").write_text("a")
    (folder / "empty.jsonl").write_text("\n")
    small_models.write("llama", folder / "smaller", 600)
    how = {"group_size": 64, "bits": 4}
    small_models.write("llama-tied", folder / "quantized", 1003, quantize=how)
    return folder


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gives_one_line(name, tied_source, tied_folder, texts, bad_files):
    bad, complaint = BAD[name]
    bad = [b.format(tmp=bad_files, source=tied_source) for b in bad]
    arguments = {"--model": tied_folder, "--text": texts[0], "--tokens": 8}
    arguments |= dict([bad])
    code, output = run(*(x for pair in arguments.items() for x in pair))
    lines = [line for line in output.splitlines() if not line.startswith("Note")]
    assert code == 1, output
    assert lines[-1].startswith("Error: ") and complaint in lines[-1]
    assert not any("Traceback" in line for line in lines)


def test_without_matplotlib_the_plot_is_refused_first(
    tied_folder, texts, tmp_path, monkeypatch
):
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    options = ["--model", tied_folder, "--text", texts[0], "--plot", tmp_path / "a.png"]
    code, output = run(*options)
    assert code == 1 and "pip install" in output.splitlines()[-1]


def test_memory_does_not_grow_with_the_text(tied_folder, tmp_path, monkeypatch):
    text = tmp_path / "long.txt"
    text.write_text(TEXT * 20)
    # So that the blocks do not hide what is kept.
    monkeypatch.setattr(linalg, "BLOCK", 64 * 1008)

    def peak(tokens: int) -> int:
        tracemalloc.start()
        command.evaluate(tied_folder, [text], tokens=tokens, verbose=False)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(300)
    short, long = peak(512), peak(2560)
    # The logits of one state take 4 kB, so those of the rest would take 8 MB.
    assert long < short + 1_000_000
