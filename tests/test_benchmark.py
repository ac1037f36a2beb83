"""``mlx_flashhead.benchmark`` and what it measures with. No timing is asserted."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from mlx_lm.sample_utils import make_sampler

from mlx_flashhead import benchmark as command
from mlx_flashhead.benchmarking import (
    competitors,
    conditions,
    decoding,
    energy,
    loading,
)
from mlx_flashhead.benchmarking.latency import chain, chained, copy_bandwidth, spread
from mlx_flashhead.benchmarking.matrix import CPU, GPU, Cell, cells
from mlx_flashhead.integration.decode import hidden_state
from mlx_flashhead.integration.locate import set_module

DATA = Path(__file__).parent / "data"


def invoke(*words):
    return CliRunner().invoke(command.main, [str(w) for w in words])


@pytest.fixture(scope="module")
def outputs(tied_folder, untied_source, tmp_path_factory):
    """Everything the command writes, for a small model and another beside it."""
    out = tmp_path_factory.mktemp("benchmark")
    patched = pytest.MonkeyPatch()
    patched.setattr(conditions, "warnings", lambda before=True: ["the fan is off"])
    words = ["--model", tied_folder, "--against", untied_source]
    words += ["--prompt-tokens", "8,40", "--batch-sizes", "1,3"]
    words += ["--max-tokens", 4, "--repeats", 2, "--no-load"]
    words += ["--json", out / "b.json", "--markdown", out / "b.md"]
    result = invoke(*words, "--plot", out / "b.png")
    patched.undo()
    assert result.exit_code == 0, result.output
    return result, json.loads((out / "b.json").read_text()), out


def test_terminal_and_markdown(outputs):
    result, _, out = outputs
    text = (out / "b.md").read_text()
    assert "dense 16-bit" in text or "dense 32-bit" in text
    for part in ("dense 8-bit", "dense 4-bit", "FlashHead 8-bit", "source", "greedy"):
        assert part in text and part in result.output
    assert text.count("## Batch 1, prompt of 8 tokens") == 1
    assert text.count("## Batch 3, prompt of 40 tokens") == 1
    tables = [line for line in text.splitlines() if line.startswith("|")]
    # Four cells of two samplers and five heads.
    assert len(tables) == 4 * (2 + 10)
    assert text.rstrip().endswith("b.png\n```")
    assert f"mlx {mx.__version__}" in text
    assert "Warning: the fan is off." in text
    assert "Left out" not in text
    assert (out / "b.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_json(outputs):
    _, found, _ = outputs
    rows = found["rows"]
    assert len(rows) == 4 * 2 * 5
    kinds = [r["kind"] for r in rows[:5]]
    assert kinds == ["16", "8", "4", "flash", "model"]
    for r in rows:
        assert r["max_tokens"] == 4 and len(r["runs"]) == 2
        for name in ("tokens_per_second", "first_token_seconds"):
            s = r[name]
            assert 0 < s["min"] <= s["median"] <= s["max"]
        assert r["head_seconds_per_token"]["median"] > 0 and r["head_share"] > 0
        # Energy is nobody's here.
        assert r["joules_per_token"] is None
    # A head of fewer bits in the same body needs less memory.
    peak = {r["kind"]: r["peak_bytes"] for r in rows[:4]}
    assert peak["4"] < peak["8"] < peak["16"]
    assert found["warnings"] == ["the fan is off"]
    assert found["command"].count("mlx_flashhead.benchmark --model") == 1
    assert found["load"] == [] and found["left_out"] == []
    assert any("Energy: left out" in note for note in found["notes"])


def test_the_command_it_prints_repeats_it(outputs):
    import shlex

    words = shlex.split(outputs[1]["command"])
    words = words[words.index("mlx_flashhead.benchmark") + 1 :]
    params = command.main.make_context("benchmark", words).params
    assert params["prompt_tokens"] == (8, 40) and params["repeats"] == 2
    assert len(params["against"]) == 1 and params["plot"].endswith("b.png")


def test_heads_differ_in_the_head_alone(tied_folder, untied_folder):
    """Embeddings and hidden states are equal; logits are near; each is decoded with."""
    ids = mx.array([[3, 70, 9, 401]])
    for folder in (tied_folder, untied_folder):
        made, note = competitors.heads(folder, competitors.HEADS)
        assert "Only the head differs" in note
        assert [c.kind for c in made] == list(competitors.HEADS)
        logits = [np.array(c.place()(ids).astype(mx.float32)) for c in made]
        for c, each in zip(made, logits, strict=True):
            limit = {"16": 0, "4": 0.6}.get(c.kind, 0.06) * np.abs(logits[0]).max()
            assert np.abs(each - logits[0]).max() <= limit, c.name
        assert np.abs(logits[2] - logits[0]).max() > 0
        states = hidden_state(made[3].head, made[3].place(), ids)
        for c in made:
            c.place()
            assert c.states(2).shape == (2, states.shape[-1])
        # Of its own, the model with FlashHead says the same.
        set_module(made[0].model, made[0].path, made[0].module)


def test_head_steps_are_what_decoding_does(untied_folder):
    """A step of the head alone finds the token that decoding does."""
    made, _ = competitors.heads(untied_folder, ("16", "flash"), n_probes=126)
    greedy = make_sampler(0.0)
    for c in made:
        prompt = decoding.prompts(c.tokenizer, 12, 1)[0]
        model = c.place()
        want = model(mx.array([prompt]))[0, -1].argmax().item()
        with competitors.watching(model, c.path) as states:
            model(mx.array([prompt]))
        h = states[-1][:, -1]
        token = c.step(greedy)(h, mx.random.key(0)).item()
        assert token == want, c.name


def test_runs_count_what_was_asked_for(tied_folder):
    made, _ = competitors.heads(tied_folder, ("8", "flash"))
    calls = []
    for c in made:
        model, tokenizer = c.place(), c.tokenizer
        for n in (1, 3):
            texts = decoding.prompts(tokenizer, 10, n)
            assert [len(t) for t in texts] == [10] * n
            assert n == 1 or texts[0] != texts[1]

            def sampler(logprobs):
                calls.append(logprobs.shape[0])
                return mx.argmax(logprobs, axis=-1)

            found = decoding.run(model, texts, sampler, 5, parameter_bytes=1 << 40)
            assert found.step > 0 and found.first_token > 0
            assert found.end - found.begin == pytest.approx(4 * found.step)
            assert (1 << 40) <= found.peak_bytes < (1 << 40) + (1 << 30)
            # Five are asked for, and a step or two is begun beyond them.
            assert sum(calls) in (5 * n, 6 * n, 7 * n)
            # FlashHead asks samplers that it does not know for one sequence at a time.
            assert set(calls) == {1 if c.kind == "flash" else n}
            calls.clear()


def test_prompts_have_the_length_and_the_beginning(tied_folder):
    made, _ = competitors.heads(tied_folder, ("flash",))
    tokenizer = made[0].tokenizer
    for n in (2, 37, 5000):
        for text in decoding.prompts(tokenizer, n, 2):
            assert len(text) == n


def test_what_is_left_out():
    chosen, left = cells(None, None, CPU)
    assert chosen == [Cell(1, 32), Cell(1, 512)] and len(left) == 7
    chosen, left = cells(None, None, GPU)
    assert left == [Cell(16, 4096)] and len(chosen) == 8
    # What is named is measured.
    assert cells((16,), (4096,), CPU) == ([Cell(16, 4096)], [])
    assert cells((4,), None, CPU)[0] == [Cell(4, 32)]
    assert cells(None, (4096,), CPU)[0] == [Cell(1, 4096)]
    chosen, left = cells(None, None, None)
    assert len(chosen) == 9 and not left


def test_load(tied_folder, tmp_path, monkeypatch):
    """In processes of their own; a first round is dropped."""
    for way in (*loading.WAYS, "flash, lazy"):
        found = loading.measure(str(tied_folder), way)
        assert found["seconds"] > 0 and found["tokenizer"] > 0
    found = loading.in_turn([str(tied_folder)], ["flash"], 1)
    assert [len(each) for each in found.values()] == [1]
    with pytest.raises(RuntimeError, match="missing does not open"):
        loading.in_turn([str(tmp_path / "missing")], ["flash"], 1)

    def in_turn(folders, ways, repeats):
        return {(f, w): [{"seconds": 0.5}] * repeats for f in folders for w in ways}

    monkeypatch.setattr(loading, "in_turn", in_turn)
    words = ["--heads", "flash", "--samplers", "greedy", "--quick", "--repeats", 1]
    words += ["--max-tokens", 3, "--json", tmp_path / "b.json"]
    result = invoke("--model", tied_folder, *words)
    assert result.exit_code == 0, result.output
    assert "FlashHead, mlx_flashhead.load" in result.output
    assert "Left out on this device: prompt tokens at batch 1" in result.output
    for row in json.loads((tmp_path / "b.json").read_text())["load"]:
        assert row["seconds"] == {"median": 0.5, "min": 0.5, "max": 0.5}


@pytest.mark.parametrize(
    "words, message",
    [
        (["--heads", "16,5"], "'5' is not one of 16, 8, 4, flash"),
        (["--samplers", "best"], "'best' is not one of greedy, top-p"),
        (["--prompt-tokens", "1"], "'1' is not a whole number from 2"),
        (["--batch-sizes", "0"], "'0' is not a whole number from 1"),
        (["--max-tokens", "1"], "1 is not in the range x>=3"),
        (["--json", "nowhere/a.json"], "is no folder to write to"),
        (["--markdown", "."], "is a folder; give a file's name"),
        (["--plot", "a.wav"], "must end in .png, .svg or .pdf"),
        (
            ["--n-probes", "9999", "--no-load"],
            "n_probes must be an integer from 1 to 126",
        ),
    ],
)
def test_bad_options(tied_folder, words, message):
    result = invoke("--model", tied_folder, *words)
    assert result.exit_code and message in result.output
    assert result.output.count("Error:") == 1 and "Traceback" not in result.output


def test_bad_models(tied_source, tied_folder, tmp_path):
    result = invoke("--model", tied_source)
    assert result.exit_code and "has no FlashHead; make one" in result.output
    result = invoke("--model", tmp_path / "missing")
    assert result.exit_code and "no such folder" in result.output
    words = ["--model", tied_folder, "--against", tmp_path / "missing"]
    result = invoke(*words)
    assert result.exit_code and "--against" in result.output


def test_without_matplotlib(tied_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("mlx_flashhead.cli.find_spec", lambda name: None)
    result = invoke("--model", tied_folder, "--plot", tmp_path / "a.png")
    assert result.exit_code and "pip install matplotlib" in result.output


def test_a_head_that_is_stored_quantized_is_named(untied_folder, tmp_path):
    """The unquantized head is then made of it, and the notes say so."""
    import small_models
    from mlx_flashhead.convert import convert

    quantize = {"group_size": 32, "bits": 4}
    source = small_models.write("llama", tmp_path / "q", 600, quantize=quantize)
    convert(str(source), tmp_path / "c", cluster_size=8, verbose=False)
    made, note = competitors.heads(tmp_path / "c", ("16", "4"))
    assert "has 4 bits" in note
    assert made[0].head.rows.bits in (16, 32)


def answers(**given):
    """A machine that answers commands: by their last word, or the first."""

    def ask(words):
        return given.get(words[-1].strip("-"), given.get(words[0].split("-")[0], ""))

    return ask


def seen(ask, **options):
    options = {"system": "Darwin", "load": lambda: (0.1, 0, 0), "cores": 8} | options
    return conditions.warnings(ask, **options)


def test_conditions_of_a_mac():
    plugged = "Now drawing from 'AC Power'\n -InternalBattery-0 (id=1)\t80%; charging"
    calm = "Note: No thermal warning level has been recorded\n"
    assert seen(answers(batt=plugged, therm=calm, g=" lowpowermode         0")) == []
    battery = "Now drawing from 'Battery Power'\n -InternalBattery-0\t62%; discharging"
    assert seen(answers(batt=battery)) == ["running on battery power"]
    hot = "CPU Power notify\n\tCPU_Scheduler_Limit \t= 100\n\tCPU_Speed_Limit \t= 72\n"
    assert "held to 72 %" in seen(answers(therm=hot))[0]
    full = "CPU Power notify\n\tCPU_Speed_Limit \t= 100\n"
    assert seen(answers(therm=full)) == []
    for name in ("lowpowermode", "powermode"):
        assert seen(answers(g=f" {name}         1")) == ["low power mode is on"]


def test_a_busy_machine():
    busy = {"load": lambda: (3.5, 1, 1)}
    assert "busy: load average 3.5 on 8 cores" in seen(answers(), **busy)[0]
    # Afterwards the load is the benchmark's own.
    assert seen(answers(), **busy, before=False) == []


def test_conditions_of_linux(tmp_path):
    def supply(name, **files):
        (tmp_path / name).mkdir()
        for file, text in files.items():
            (tmp_path / name / file).write_text(f"{text}\n")

    options = {"system": "Linux", "power_supply": tmp_path}
    supply("AC", type="Mains", online="0")
    supply("mouse", type="Battery", status="Discharging", scope="Device")
    supply("BAT0", type="Battery", status="Full")
    assert seen(answers(), **options) == []
    supply("BAT1", type="Battery", status="Discharging")
    assert seen(answers(), **options) == ["running on battery power"]
    missing = options | {"power_supply": tmp_path / "none"}
    assert seen(answers(), **missing) == []


def test_a_slowed_gpu():
    def ask(words):
        if "--query-gpu=clocks_throttle_reasons.active" not in words:
            return ""  # an older driver knows only this
        return "0x0000000000000001\n0x0000000000000024\n"

    assert seen(ask) == ["GPU 1 is slowed: power cap, heat, software"]


def test_commands_that_are_missing_or_fail():
    assert conditions.ask(["no-such-command-here"]) == ""
    assert conditions.ask([sys.executable, "-c", "raise SystemExit(1)"]) == ""
    assert conditions.ask([sys.executable, "-c", "print(5)"]) == "5\n"


def recorded():
    """Lines in the form of powermetrics, each with the moment when it is printed."""
    now = 100.0
    for line in (DATA / "powermetrics.txt").read_text().splitlines(keepends=True):
        if line.startswith("*** Sampled"):
            now += 0.1
        yield now, line


def test_powermetrics():
    samples = list(energy.read_powermetrics(recorded()))
    assert [s.watts for s in samples] == [6.471, 8.005, 0.142]
    assert samples[0].end - samples[0].begin == pytest.approx(0.10343)
    assert samples[1].end == pytest.approx(100.2)
    # Without the combined line: what the chip's parts say, each once.
    apart = [(t, x) for t, x in recorded() if not x.startswith("Combined")]
    samples = list(energy.read_powermetrics(apart))
    assert [s.watts for s in samples] == pytest.approx([6.471, 8.005, 0.142])
    # A sample that was cut off in its header or before its power is none.
    whole = list(recorded())
    assert len(list(energy.read_powermetrics(whole[:8]))) == 0
    assert list(energy.read_powermetrics([])) == []


def test_thermal_pressure():
    power = energy.Meter("powermetrics", "", energy.read_powermetrics)
    power._lines = [(0.0, "Current pressure level: Nominal\n")]
    assert power.warnings() == []
    power._lines.append((1.0, "Current pressure level: Heavy\n"))
    assert power.warnings() == ["thermal pressure: Heavy"]


def test_nvidia_power():
    lines = [(1.0, "100.5\n"), (1.1, "200.0\n"), (1.2, "[N/A]\n"), (1.3, "300\n")]
    samples = list(energy.read_nvidia(lines))
    assert [(s.begin, s.end, s.watts) for s in samples] == [
        (1.0, 1.1, 200.0),
        (1.1, 1.3, 300.0),
    ]


def test_joules():
    samples = [energy.Sample(i, i + 1, 10.0 * i) for i in range(5)]
    assert energy.joules(samples, 1, 3) == pytest.approx(10 + 20)
    assert energy.joules(samples, 1.5, 2.5) == pytest.approx(5 + 10)
    # Half of it is seen, at 40 W.
    assert energy.joules(samples, 4, 6) == pytest.approx(80)
    assert energy.joules(samples, 4, 7) is None
    assert energy.joules(samples, 8, 9) is None
    assert energy.joules([], 0, 1) is None


def fake_command(script, parse=energy.read_nvidia):
    return lambda: ("fake", [sys.executable, "-u", "-c", script], parse)


def test_meter(monkeypatch):
    script = "import time\nwhile True: print(50.0); time.sleep(0.02)"
    monkeypatch.setattr(energy, "command", fake_command(script))
    with energy.meter() as power:
        assert power.source == "fake"
        samples = power.samples()
        assert len(samples) > 3 and {s.watts for s in samples} == {50.0}
        spent = energy.joules(samples, samples[0].begin, samples[-1].end)
        assert spent == pytest.approx(
            50 * (samples[-1].end - samples[0].begin), rel=1e-3
        )
    with energy.meter(False) as power:
        assert power.source is None and power.samples() == []


def test_meter_that_needs_a_password(monkeypatch):
    """What fails at once, says nothing or is not there leaves energy out."""
    for script in ("raise SystemExit(1)", "import time; time.sleep(30)"):
        monkeypatch.setattr(energy, "command", fake_command(script))
        with energy.meter() as power:
            assert power.source is None and "left out; fake gives" in power.note
            assert power.samples() == []
    gone = ("fake", ["no-such-command-here"], energy.read_nvidia)
    monkeypatch.setattr(energy, "command", lambda: gone)
    with energy.meter() as power:
        assert "left out; fake is not there" in power.note


def test_power_is_asked_for_without_a_password(monkeypatch):
    monkeypatch.setattr(energy.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(energy.os, "geteuid", lambda: 501)
    name, words, parse = energy.command()
    assert name == "powermetrics" and words[:3] == ["sudo", "-n", "powermetrics"]
    assert parse is energy.read_powermetrics
    monkeypatch.setattr(energy.os, "geteuid", lambda: 0)
    assert energy.command()[1][0] == "powermetrics"


def test_chains_depend_on_their_steps():
    """Every step sees the state that the token before it made, compiled or not."""
    start = mx.zeros((2, 4))
    for compiled in (False, True) if shutil.which("c++") else (False,):
        states = []

        def step(h, key, states=states, compiled=compiled):
            if not compiled:
                states.append(h)
            return (h.sum(-1) * 1000 + 3).round().astype(mx.uint32)

        assert chained(step, start, 4, compiled=compiled)() > 0
        if states:
            # Warmed by one step: 0, then four more from 0.
            sums = [float(h.sum(-1)[0]) for h in states]
            assert sums == pytest.approx([0, 0, 0.012, 0.004, 0], abs=1e-6)
    assert chain(step, start, 2, repeats=2, compiled=False) > 0


def test_spread_and_bandwidth():
    assert spread([3, 1, 2]) == {"median": 2, "min": 1, "max": 3}
    assert spread([4, 1, 2, 3])["median"] == 2.5
    assert copy_bandwidth(1 << 20) > 0
