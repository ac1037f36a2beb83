"""Tokens per second through the real server, over HTTP, streaming and not.

    python benchmarks/server.py --model FOLDER

Each way of decoding has a server, a process of its own; all are up from the beginning
and are asked in turn, one client at a time. Every request is timed as a whole. With
``--checkout`` the servers are those of other checkouts of this repository, too.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.client import HTTPConnection
from itertools import product
from pathlib import Path
from typing import Any

import click
from samplers import SAMPLERS

from mlx_flashhead.benchmarking.latency import spread
from mlx_flashhead.benchmarking.report import markdown_table

ROOT = Path(__file__).parents[1]
PROMPTS = ROOT / "benchmarks/prompts.jsonl"
WAYS = {"dense": ["--dense"], "approximate": ["--approximate"], "exact": []}
# As the server calls what make_sampler calls otherwise.
_NAMES = {"temp": "temperature"}


@contextmanager
def serving(checkout: Path, model: str, options: list[str]) -> Iterator[int]:
    """A server's port, once it has loaded its model."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "mlx_flashhead.server", *options]
    command += ["--model", model, "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(
        command,
        cwd=checkout,  # whose packages come first
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        stderr=subprocess.DEVNULL,
    )
    try:
        while True:
            if process.poll() is not None:
                raise click.ClickException(f"{' '.join(command)} ends at once")
            try:
                ask(port, "Hello", 4, {}, stream=False)
                break
            except OSError:
                time.sleep(0.2)
        yield port
    finally:
        process.terminate()
        process.wait()


def ask(
    port: int, prompt: str, n_tokens: int, sampler: dict[str, float], stream: bool
) -> tuple[int, float]:
    """Tokens of a completion, and the seconds that it took."""
    body: dict[str, Any] = {"prompt": prompt, "max_tokens": n_tokens, "stream": stream}
    body |= {_NAMES.get(name, name): value for name, value in sampler.items()}
    if stream:
        body["stream_options"] = {"include_usage": True}
    connection = HTTPConnection("127.0.0.1", port)
    begin = time.perf_counter()
    connection.request(
        "POST",
        "/v1/completions",
        json.dumps(body),
        {"Content-Type": "application/json"},
    )
    response = connection.getresponse()
    answer = response.read().decode()
    seconds = time.perf_counter() - begin
    connection.close()
    if response.status != 200:
        raise click.ClickException(f"the server answers {answer[:300]}")
    if stream:
        lines = [x[6:] for x in answer.splitlines() if x.startswith("data: {")]
        (usage,) = (u for x in lines if (u := json.loads(x).get("usage")))
    else:
        usage = json.loads(answer)["usage"]
    return usage["completion_tokens"], seconds


@click.command(context_settings={"show_default": True})
@click.option("--model", required=True, help="A converted folder.")
@click.option("--tokens", "n_tokens", default=64, help="Tokens of each completion.")
@click.option("--repeats", default=3, help="Prompts of each cell.")
@click.option("--samplers", default="greedy,top-p", help="Which, by name.")
@click.option("--answers", default="whole,streaming", help="How they are given.")
@click.option("--ways", default=",".join(WAYS), help="Which, by name.")
@click.option(
    "--checkout",
    "checkouts",
    multiple=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=[ROOT],
    help="Folder of a checkout whose servers take part; can be given again.",
)
def main(
    model: str,
    n_tokens: int,
    repeats: int,
    samplers: str,
    answers: str,
    ways: str,
    checkouts: tuple[Path, ...],
) -> None:
    """Time completions of the server."""
    model = str(Path(model).resolve())
    lines = PROMPTS.read_text().splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines[: repeats + 1]]
    with ExitStack() as stack:
        ports = {
            (checkout, way): stack.enter_context(serving(checkout, model, WAYS[way]))
            for checkout, way in product(checkouts, ways.split(","))
        }
        cells = list(product(samplers.split(","), answers.split(",")))
        speeds: dict[Any, list[float]] = {}
        for i, prompt in enumerate(prompts):
            for (sampler, answer), server in product(cells, ports):
                n = n_tokens if i > 0 else 8  # the first warms up
                asked = prompt, n, SAMPLERS[sampler], answer == "streaming"
                made, seconds = ask(ports[server], *asked)
                if i > 0:
                    key = (*server, sampler, answer)
                    speeds.setdefault(key, []).append(made / seconds)
    rows = []
    for (sampler, answer), server in product(cells, ports):
        found = spread(speeds[*server, sampler, answer])
        checkout, way = server
        dense = speeds.get((checkout, "dense", sampler, answer))
        rows.append(
            [
                *([checkout.resolve().name] if len(checkouts) > 1 else []),
                sampler,
                answer,
                way,
                f"{found['median']:.1f} ({found['min']:.1f} to {found['max']:.1f})",
                f"{found['median'] / spread(dense)['median']:.2f}" if dense else "",
            ]
        )
    header = ["sampler", "answer", "decoding", "tokens/s (min to max)", "x dense"]
    named = ["checkout"] if len(checkouts) > 1 else []
    click.echo(markdown_table([[*named, *header], *rows], left=len(named) + 3))


if __name__ == "__main__":
    main()
