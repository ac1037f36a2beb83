"""Every script in examples/ runs, on small made models, and writes what the models
write."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.sample_utils import make_sampler
from test_gguf import gguf_tensors, reference_model, write_gguf

from mlx_flashhead import attach, load, patch_decoding

pytestmark = pytest.mark.full

EXAMPLES = Path(__file__).parents[1] / "examples"
N = 6


def run(name: str, *words: object) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *map(str, words)],
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def written(folder: Path, prompt: str, sampler=None, **options) -> str:
    """The prompt and what follows it."""
    model, tokenizer = load(folder, **options)
    mx.random.seed(1)
    return prompt + mlx_lm.generate(
        model, tokenizer, prompt, max_tokens=N, sampler=sampler
    )


def test_python_api(untied_folder):
    text = run("python_api.py", untied_folder, "--max-tokens", N)
    prompt = "The lighthouse keeper"
    wanted = "90 of 126 clusters are probed per token\n\n"
    wanted += written(untied_folder, prompt)
    wanted += f"\n\n126 probes: {written(untied_folder, prompt, n_probes=126)}\n\n"
    assert text.startswith(wanted)
    assert re.fullmatch(r"[\d.]+ tokens per second\n", text[len(wanted) :])


def test_sampling(untied_folder):
    text = run("sampling.py", untied_folder, "--max-tokens", N)
    for name, sampler in (
        ("greedy", None),
        ("temperature 0.8, top-p 0.95", make_sampler(0.8, top_p=0.95)),
        ("temperature 1, min-p 0.1", make_sampler(1.0, min_p=0.1)),
    ):
        dish = written(untied_folder, "My favourite dish is", sampler)
        assert f"{name}: {' '.join(dish.splitlines())}\n\n" in text
    assert "top-k 20, repetition penalty 1.3: My favourite dish is" in text


@pytest.mark.parametrize("way", ["--exact", "--approximate"])
def test_own_loop(untied_folder, way):
    text = run("own_loop.py", untied_folder, way, "--max-tokens", N)
    sampler = make_sampler(0.8, top_p=0.95)
    # The rows are the plain model's, in exact decoding as in approximate.
    model, tokenizer = mlx_lm.load(str(untied_folder))
    attach(model, untied_folder, exact=way == "--exact")
    patch_decoding()
    mx.random.seed(1)
    prompt = "The lighthouse keeper"
    stream = mlx_lm.stream_generate(
        model, tokenizer, prompt, max_tokens=N, sampler=sampler
    )
    responses = list(stream)
    each = "".join(tokenizer.decode([r.token]) for r in responses)
    assert text.startswith(prompt + each)
    nats = -sum(r.logprobs[r.token].item() for r in responses) / N
    (said,) = re.findall(r"\n\n([\d.]+) nats a token\n$", text)
    assert float(said) == pytest.approx(nats, abs=2e-3)


def test_json_schema(untied_folder):
    text = run("json_schema.py", untied_folder, "--max-tokens", 120)
    first, second = (json.loads(line) for line in text.splitlines()[:2])
    for made in (first, second):
        assert set(made) == {"dish", "minutes", "vegetarian"}
        assert 5 <= made["minutes"] <= 180
    assert re.fullmatch(r"[\d.]+ % of the drafts stood", text.splitlines()[2])


def test_server_openai(untied_folder):
    text = run("server_openai.py", untied_folder, "--max-tokens", N)
    keeper = written(untied_folder, "The lighthouse keeper")
    assert text.startswith(f"{keeper}\n\nOnce upon a time")


def test_speculative(untied_folder):
    """The text is the target's own."""
    text = run("speculative.py", untied_folder, "--max-tokens", N)
    wanted = written(untied_folder, "The steam engine was invented", dense=True)
    assert text.startswith(f"{wanted}\n\n")
    accepted, proposed = re.match(
        r"(\d+) of (\d+) draft tokens", text[len(wanted) + 2 :]
    ).groups()
    assert 0 <= int(accepted) <= int(proposed) > 0


def test_evaluate_text(untied_folder):
    lines = run("evaluate_text.py", untied_folder, "--tokens", 40).splitlines()
    assert "90 probes" in lines[0] and "126 probes" in lines[1]
    # With every cluster probed nothing is missed.
    assert all("on 40 tokens" in line for line in lines)
    assert "recall 100.00 %" in lines[1] and "KL 0.00" in lines[1]


def test_convert_gguf(tmp_path):
    tensors = gguf_tensors("llama", reference_model("llama"))
    source = write_gguf(tmp_path / "small.gguf", "llama", tensors)
    folder = tmp_path / "converted"
    text = run("convert_gguf.py", source, folder, "--max-tokens", N)
    assert text.startswith("Vocabulary    267 tokens x 64, in 17 clusters of 16; ")
    prompt = "The capital of France is"
    follows = written(folder, prompt).removeprefix(prompt).strip()
    assert text.endswith(f"\n\n{prompt} {follows}\n")


def test_every_example_has_a_test():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert {f"test_{name}" for name in names} <= set(globals())
