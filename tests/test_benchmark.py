"""``mlx_flashhead.benchmark`` and what it measures with. No timing is asserted."""

from __future__ import annotations

import json
import shutil
import sys
import time
from importlib.machinery import ModuleSpec
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from mlx_lm.sample_utils import make_sampler
from test_community import script as community

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
from mlx_flashhead.integration.locate import set_module
from mlx_flashhead.integration.slots import hidden_state


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
    # Four cells of two samplers and six heads.
    assert len(tables) == 4 * (2 + 12)
    assert text.count("b.png\n```") == 1
    assert f"mlx {mx.__version__}" in text
    assert "Warning: the fan is off." in text
    assert "Left out" not in text
    assert (out / "b.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_its_end_can_be_shared(outputs):
    text = (outputs[2] / "b.md").read_text()
    shared = community.read(text)
    assert text.rstrip().endswith("```") and len(shared["rows"]) == 4 * 2 * 6
    assert shared["warnings"] == ["the fan is off"]
    assert shared["rows"][0]["tokens_per_second"][0] > 0


def test_json(outputs):
    _, found, _ = outputs
    rows = found["rows"]
    assert len(rows) == 4 * 2 * 6
    kinds = [r["kind"] for r in rows[:6]]
    assert kinds == ["16", "8", "4", "flash", "exact", "model"]
    for r in rows:
        assert r["max_tokens"] == 4 and len(r["runs"]) == 2
        for name in ("tokens_per_second", "first_token_seconds"):
            s = r[name]
            assert 0 < s["min"] <= s["median"] <= s["max"]
        if r["kind"] != "exact":
            assert r["head_seconds_per_token"]["median"] > 0 and r["head_share"] > 0
        # Several sequences are verified without a draft.
        drafts = r["kind"] == "exact" and r["batch_size"] == 1
        assert (r["acceptance"] is not None) == drafts
        assert not drafts or (0 <= r["acceptance"] <= 1 and 0 <= r["waste"] < 1)
        known = r["kind"] != "model" and r["batch_size"] == 1
        assert (r["head_bytes_per_token"] is not None) == known
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

    def in_turn(folders, ways, repeats, flashhead=None):
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
        (["--heads", "16,5"], "'5' is not one of 16, 8, 4, flash, exact"),
        (["--heads", "exact", "--approximate"], "--heads names only what"),
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


@pytest.fixture
def machine(monkeypatch):
    """Stand-ins for psutil and pynvml: eight cores at rest, no battery, no GPU."""
    psutil = SimpleNamespace(
        sensors_battery=lambda: None,
        getloadavg=lambda: (0.1, 0, 0),
        cpu_count=lambda: 8,
    )

    class NVMLError(Exception):
        pass

    def init():
        raise NVMLError("NVML Shared Library Not Found")

    pynvml = SimpleNamespace(NVMLError=NVMLError, nvmlInit=init)
    for name, module in (("psutil", psutil), ("pynvml", pynvml)):
        module.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(conditions.platform, "system", lambda: "Linux")
    return SimpleNamespace(psutil=psutil, pynvml=pynvml)


def test_a_machine_at_rest(machine):
    assert conditions.warnings() == [] and conditions.missing() == []


def test_command_buffers_are_noted_on_metal(machine, monkeypatch):
    monkeypatch.delenv("MLX_MAX_MB_PER_BUFFER", raising=False)
    monkeypatch.setattr(conditions, "on_gpu", lambda: False)
    assert conditions.command_buffers() == []
    monkeypatch.setattr(conditions, "on_gpu", lambda: True)
    monkeypatch.setattr(conditions.mx.metal, "is_available", lambda: True)
    assert "device's default" in conditions.command_buffers()[0]
    monkeypatch.setenv("MLX_MAX_MB_PER_BUFFER", "1000")
    assert "MLX_MAX_MB_PER_BUFFER=1000" in conditions.command_buffers()[0]


@pytest.mark.parametrize("plugged, said", [(False, 1), (True, 0), (None, 0)])
def test_battery(machine, plugged, said):
    battery = SimpleNamespace(percent=62, power_plugged=plugged)
    machine.psutil.sensors_battery = lambda: battery
    assert conditions.warnings() == ["running on battery power"][:said]


def test_a_system_without_power_supplies(machine):
    def battery():
        raise FileNotFoundError("/sys/class/power_supply")

    machine.psutil.sensors_battery = battery
    assert conditions.warnings() == []


def test_a_busy_machine(machine):
    machine.psutil.getloadavg = lambda: (3.5, 1, 1)
    assert "busy: load average 3.5 on 8 cores" in conditions.warnings()[0]
    # Afterwards the load is the benchmark's own.
    assert conditions.warnings(before=False) == []


def test_a_hot_mac(machine, monkeypatch):
    monkeypatch.setattr(conditions.platform, "system", lambda: "Darwin")
    calm = "Note: No thermal warning level has been recorded\n"
    seen = conditions.warnings
    assert seen(answers(therm=calm, g=" lowpowermode         0")) == []
    hot = "CPU Power notify\n\tCPU_Scheduler_Limit \t= 100\n\tCPU_Speed_Limit \t= 72\n"
    assert "held to 72 %" in seen(answers(therm=hot))[0]
    full = "CPU Power notify\n\tCPU_Speed_Limit \t= 100\n"
    assert seen(answers(therm=full)) == []
    for name in ("lowpowermode", "powermode"):
        assert seen(answers(g=f" {name}         1")) == ["low power mode is on"]


REASONS = {
    "nvmlClocksEventReasonSwPowerCap": 0x04,
    "nvmlClocksEventReasonHwSlowdown": 0x08,
    "nvmlClocksEventReasonSwThermalSlowdown": 0x20,
    "nvmlClocksEventReasonHwThermalSlowdown": 0x40,
    "nvmlClocksEventReasonHwPowerBrakeSlowdown": 0x80,
}


@pytest.mark.skipif(sys.platform != "linux", reason="the extra has it on Linux only")
def test_the_stand_in_for_pynvml_has_the_librarys_names():
    import pynvml

    assert {name: getattr(pynvml, name) for name in REASONS} == REASONS
    for name in ("nvmlInit", "nvmlDeviceGetCount", "nvmlDeviceGetHandleByIndex"):
        assert callable(getattr(pynvml, name))
    for name in ("CurrentClocksEventReasons", "TotalEnergyConsumption"):
        assert callable(getattr(pynvml, f"nvmlDeviceGet{name}"))


def test_a_slowed_gpu(machine):
    reasons = [0x1, 0x24]
    vars(machine.pynvml).update(
        REASONS,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda i: i,
        nvmlDeviceGetCurrentClocksEventReasons=lambda gpu: reasons[gpu],
    )
    assert conditions.warnings() == ["GPU 1 is slowed: power cap, heat, software"]


def test_what_is_not_installed_is_said_in_one_line(machine, monkeypatch):
    for name in ("psutil", "pynvml", "zeus_apple_silicon"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    (line,) = conditions.missing()
    assert line == (
        "not looked at: battery, load, whether the GPU is slowed, energy; "
        "pip install 'mlx-flashhead[bench]'"
    )
    monkeypatch.setattr(conditions.platform, "system", lambda: "Darwin")
    assert "battery, load, energy;" in conditions.missing()[0]
    assert "battery, load;" in conditions.missing(energy=False)[0]
    assert conditions.warnings(answers()) == []


def test_commands_that_are_missing_or_fail():
    assert conditions.ask(["no-such-command-here"]) == ""
    assert conditions.ask([sys.executable, "-c", "raise SystemExit(1)"]) == ""
    assert conditions.ask([sys.executable, "-c", "print(5)"]) == "5\n"


class Clock:
    """Time and a counter of 50 watts, which moves ten times a second."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(energy.time, "perf_counter", lambda: self.now)

    def joules(self) -> float:
        return 50 * (self.now * 10 // 1 / 10)

    def wait(self, seconds: float) -> bool:
        self.now += seconds
        return self.now > 103


def test_joules(monkeypatch):
    clock = Clock(monkeypatch)
    meter = energy.Meter("", clock.joules)
    meter._watch(clock.joules, clock)
    assert 29 <= len(meter._readings) <= 31
    assert meter.joules(101, 102) == pytest.approx(50, rel=0.1)
    assert meter.joules(101.03, 101.96) == pytest.approx(0.93 * 50, rel=0.1)
    # Too short, before the first reading, beyond the last.
    assert meter.joules(101, 101.2) is None
    assert meter.joules(10, 12) is None
    assert meter.joules(102, 104) is None


def test_a_counter_that_fails_is_read_no_more(monkeypatch):
    clock = Clock(monkeypatch)

    def joules():
        if clock.now > 101:
            raise RuntimeError("lost")
        return clock.joules()

    meter = energy.Meter("", joules)
    meter._watch(joules, clock)
    assert meter.joules(100.2, 100.8) is not None
    assert meter.joules(101, 102) is None


def test_apples_counter(monkeypatch):
    """Of what the chip counts: an older one has no memory's."""
    spent = SimpleNamespace(cpu_total_mj=1500, gpu_mj=2000, ane_mj=0, dram_mj=None)
    monitor = SimpleNamespace(get_cumulative_energy=lambda: spent)
    package = SimpleNamespace(AppleEnergyMonitor=lambda: monitor)
    monkeypatch.setitem(sys.modules, "zeus_apple_silicon", package)
    monkeypatch.setattr(energy.platform, "system", lambda: "Darwin")
    name, opened = energy.source()
    assert name == "zeus-apple-silicon" and opened()() == 3.5
    spent.dram_mj = 250
    assert opened()() == 3.75


def test_nvidias_counter(machine, monkeypatch):
    vars(machine.pynvml).update(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda i: f"gpu {i}",
        nvmlDeviceGetTotalEnergyConsumption={"gpu 0": 69_388}.__getitem__,
    )
    assert energy.nvidia_counter()() == 69.388


def test_meter(monkeypatch):
    monkeypatch.setattr(energy, "INTERVAL", 0.01)
    start = time.perf_counter()
    counter = lambda: 50 * (time.perf_counter() - start)  # noqa: E731
    monkeypatch.setattr(energy, "source", lambda: ("fake", lambda: counter))
    with energy.meter() as meter:
        begin = time.perf_counter()
        time.sleep(0.2)
        end = time.perf_counter()
        meter.settle()
        assert meter.joules(begin, end) > 0 and "from fake" in meter.note
    with energy.meter(False) as meter:
        assert meter.joules(begin, end) is None and "left out" in meter.note


def test_what_does_not_tell_leaves_energy_out(machine, monkeypatch):
    """A package that is not there, and a GPU that does not count."""
    source = ("nvidia-ml-py", energy.nvidia_counter)
    monkeypatch.setattr(energy, "source", lambda: source)
    with energy.meter() as meter:
        assert "nvidia-ml-py does not tell it (NVML Shared" in meter.note
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with energy.meter() as meter:
        assert "nvidia-ml-py does not tell it" in meter.note
        assert meter.joules(0, 1) is None


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
