"""The commands: servers in processes of their own, with real clients."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from urllib.error import URLError
from urllib.request import urlopen

import mlx_lm
import openai
import pytest

from mlx_flashhead import load
from mlx_flashhead.run import run as run_here

PROMPT = "The quick brown fox"
ALL = 126  # clusters


def environment() -> dict[str, str]:
    return os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def serving(*words: str, log):
    port = free_port()
    command = [sys.executable, "-m", *words, "--host", "127.0.0.1"]
    with open(log, "w") as file:
        process = subprocess.Popen(
            [*command, "--port", str(port)],
            env=environment(),
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    client = openai.OpenAI(
        base_url=f"http://127.0.0.1:{port}/v1",
        api_key="none",
        max_retries=0,
        timeout=60,
    )
    try:
        for _ in range(600):
            if process.poll() is not None:
                raise AssertionError(log.read_text())
            try:
                urlopen(f"http://127.0.0.1:{port}/health").close()
                break
            except URLError:
                time.sleep(0.1)
        yield client
        assert process.poll() is None, log.read_text()
        # Clients that went away are the only trouble.
        text = log.read_text()
        # Threads write at the same time: a line may begin in another.
        gone = text.count("BrokenPipeError: ") + text.count("ConnectionResetError: ")
        assert text.count("Traceback") == gone, text
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="module")
def client(untied_folder, tmp_path_factory):
    """As it is used: with the converted number of probes."""
    log = tmp_path_factory.mktemp("server") / "log"
    words = ("mlx_flashhead.server", "--model", str(untied_folder))
    with serving(*words, log=log) as client:
        yield client


def complete(client, prompt=PROMPT, n=10, **options):
    options = {"temperature": 0.0} | options
    return client.completions.create(
        model="default_model", prompt=prompt, max_tokens=n, **options
    )


def chat(client, text=PROMPT, n=10, **options):
    options = {"temperature": 0.0} | options
    return client.chat.completions.create(
        model="default_model",
        messages=[{"role": "user", "content": text}],
        max_tokens=n,
        **options,
    )


def streamed(client, text=PROMPT, n=10, **options) -> str:
    chunks = chat(client, text, n, stream=True, **options)
    return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)


def test_completions_and_chats(client):
    assert len(complete(client).choices[0].text) > 3
    whole = chat(client).choices[0].message.content
    assert len(whole) > 3
    assert streamed(client) == whole
    pieces = complete(client, stream=True)
    assert (
        "".join(p.choices[0].text for p in pieces) == complete(client).choices[0].text
    )
    usage = complete(client).usage
    assert usage.completion_tokens == 10 and usage.prompt_tokens == len(PROMPT)


def test_eight_clients_at_once(client):
    """Of different kinds; the greedy ones' answers are those of single requests."""
    texts = [f"Request {i}" for i in range(4)]
    alone = [streamed(client, text, 16) for text in texts]
    others = [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 1.0, "extra_body": {"top_k": 20, "min_p": 0.02}},
        {"temperature": 1.0, "seed": 7},
    ]
    with ThreadPoolExecutor(8) as pool:
        greedy = [pool.submit(streamed, client, text, 16) for text in texts]
        drawn = [pool.submit(streamed, client, PROMPT, 16, **o) for o in others]
        assert [f.result() for f in greedy] == alone
        made = [f.result() for f in drawn]
    assert all(made) and len(set(made)) == 4


def test_seeds_reproduce(client):
    one, again, other = (
        streamed(client, temperature=1.0, n=16, seed=seed) for seed in (1, 1, 2)
    )
    assert one == again != other


def test_logprobs(client):
    asked = {"logprobs": True, "top_logprobs": 5, "temperature": 1.0}
    entries = chat(client, n=12, **asked).choices[0].logprobs.content
    entries = [e.model_dump() for e in entries]
    assert len(entries) == 12
    for entry in entries:
        top = entry["top_logprobs"]
        values = [t["logprob"] for t in top]
        assert len(top) == 5 and max(values) <= 0
        assert entry["logprob"] <= max(values) + 1e-5
        for t in top:
            if t.get("id") == entry.get("id"):
                assert t["logprob"] == pytest.approx(entry["logprob"], abs=1e-5)


def test_logit_bias_and_penalties(client):
    forced = complete(client, logit_bias={"88": 100}).choices[0].text
    assert set(forced) == {"X"}
    plain = complete(client, n=16).choices[0].text
    asked = {"logprobs": True, "top_logprobs": 1}
    for _ in range(3):
        (entry, *_) = chat(client, **asked).choices[0].logprobs.content
        best = entry.model_dump()["id"]
        assert best not in map(int, asked.get("logit_bias", {}))
        asked["logit_bias"] = asked.get("logit_bias", {}) | {str(best): -100}
    asked = {"frequency_penalty": 2.0, "presence_penalty": 2.0}
    penalized = complete(client, n=16, **asked).choices[0].text
    again = complete(client, n=16, extra_body={"repetition_penalty": 1.8})
    assert plain != penalized and plain != again.choices[0].text


def test_stop(client):
    text = complete(client, n=16, logit_bias={"88": 100}).choices[0].text
    assert text == "X" * 16
    stopped = complete(client, n=16, logit_bias={"88": 100}, stop=["XXX"]).choices[0]
    assert stopped.finish_reason == "stop" and len(stopped.text) < 3


def test_a_client_that_goes_away_disturbs_nobody(client):
    wanted = streamed(client, "Stay", 40)
    with ThreadPoolExecutor(1) as pool:
        leaving = chat(client, "Leave", 400, stream=True)
        next(iter(leaving))
        staying = pool.submit(streamed, client, "Stay", 40)
        next(iter(leaving))
        leaving.close()
        assert staying.result() == wanted
    assert streamed(client, "Stay", 40) == wanted


def test_stock_server_answers_from_the_same_folder(untied_folder, client, tmp_path):
    """Densely; all clusters probed, both choose the same tokens."""
    requests = [f"Question {i}" for i in range(3)]
    answers = []
    for words in (
        ("mlx_lm", "server"),
        ("mlx_flashhead.run", "--n-probes", str(ALL), "mlx_lm.server"),
    ):
        command = (*words, "--model", str(untied_folder))
        with serving(*command, log=tmp_path / "log") as other:
            with ThreadPoolExecutor(3) as pool:
                made = list(pool.map(lambda t: streamed(other, t, 8), requests))
            scores = chat(other, logprobs=True, n=3).choices[0].logprobs
            answers.append((made, scores is not None))
    # The rows have 8 bits here and 32 there: nearly always the same.
    same = sum(a == b for a, b in zip(answers[0][0], answers[1][0]))
    assert same >= 2 and answers[0][1] == answers[1][1]


# ---------------------------------------------------------------------------
# Other commands
# ---------------------------------------------------------------------------


def run(*words: str, stdin: str = "", code: int = 0, **env: str):
    done = subprocess.run(
        [sys.executable, "-m", *words],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        env=environment() | env,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def test_run_generates_as_the_function_does(untied_folder):
    model, tokenizer = load(untied_folder, exact=False)
    wanted = mlx_lm.generate(model, tokenizer, PROMPT, max_tokens=8)
    words = ("mlx_lm.generate", "--model", str(untied_folder), "--prompt", PROMPT)
    words += ("--max-tokens", "8", "--ignore-chat-template")
    done = run("mlx_flashhead.run", "--approximate", *words)
    assert wanted in done.stdout
    few = run("mlx_flashhead.run", "--approximate", "--n-probes", "1", *words)
    assert "Generation: 8 tokens" in few.stdout and wanted not in few.stdout
    exact = run("mlx_flashhead.run", "--n-probes", "1", *words)
    dense = run("mlx_flashhead.run", "--dense", *words)
    assert exact.stdout.split("====")[1] == dense.stdout.split("====")[1]
    off = run("mlx_flashhead.run", "--n-probes", "1", *words, MLX_FLASHHEAD="0")
    assert (
        off.stdout.split("====")[1]
        == run("mlx_flashhead.run", "--dense", *words).stdout.split("====")[1]
    )


def test_chat(untied_folder):
    words = ("--model", str(untied_folder), "--max-tokens", "5", "--seed", "3")
    done = run("mlx_flashhead.chat", *words, stdin="Hello\nr\nHello\nq\n")
    assert "Traceback" not in done.stderr
    assert len(done.stdout) > 50


@pytest.mark.parametrize(
    "words",
    [
        ("mlx_lm.nothing",),
        ("mlx_lm.utils",),
        ("json.tool", "--help"),
        ("mlx_lm.generate", "--model", "/nowhere/at/all"),
        ("mlx_lm.evaluate", "--model", "x", "--tasks", "y"),
    ],
)
def test_errors_are_one_line(words):
    done = run("mlx_flashhead.run", *words, code=1)
    lines = [x for x in done.stderr.splitlines() if not x.startswith("Note:")]
    assert len(lines) == 1 and lines[0].startswith("Error: ")


def test_a_package_that_is_missed_late(monkeypatch):
    def main():
        import no_such_package  # noqa: F401

    monkeypatch.setattr("mlx_lm.perplexity.main", main)
    with pytest.raises(ValueError, match="perplexity needs a package: .*no_such"):
        run_here("mlx_lm.perplexity", [])


def test_help_is_ours_and_theirs():
    text = run("mlx_flashhead.server", "--help").stdout
    assert "--n-probes" in text and "--decode-concurrency" in text
    assert "mlx_lm.COMMAND" in run("mlx_flashhead.run", "--help").stdout
