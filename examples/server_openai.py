"""Serve a converted model and talk to it with the `openai` client.

    pip install openai
    python examples/server_openai.py [FOLDER] [--max-tokens N]

Without a folder: the demo model, Gemma 3 270M, converted on first use.

With Gemma 3 270M it prints (long lines wrapped):

    The lighthouse keeper's wife, who was a member of the family, was a member of
      the family.

    The family was in

    Once upon a time there was a dream.

    There had been dreams before.

    There were dreams before.

    Dream of something big.
"""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.error import URLError
from urllib.request import urlopen

import click
from openai import OpenAI

from mlx_flashhead import demo_model


@contextmanager
def serving(folder: str) -> Iterator[str]:
    """The address of a server of this model, which runs within the ``with`` block."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    # What you would type: mlx_flashhead.server --model FOLDER --port 8080
    command = [sys.executable, "-m", "mlx_flashhead.server", "--model", folder]
    server = subprocess.Popen([*command, "--port", str(port)])
    try:
        for _ in range(600):
            if server.poll() is not None:
                raise SystemExit("the server did not start")
            try:
                urlopen(f"http://127.0.0.1:{port}/health").close()
                break
            except URLError:
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait()


@click.command()
@click.argument("folder", required=False)
@click.option("--max-tokens", default=24)
def main(folder: str | None, max_tokens: int) -> None:
    with serving(str(folder or demo_model.default()[0])) as address:
        client = OpenAI(base_url=address, api_key="none")
        whole = client.completions.create(
            model="default_model",
            prompt="The lighthouse keeper",
            max_tokens=max_tokens,
            temperature=0.0,
        )
        print(f"The lighthouse keeper{whole.choices[0].text}\n")
        pieces = client.completions.create(
            model="default_model",
            prompt="Once upon a time",
            max_tokens=max_tokens,
            temperature=0.8,
            top_p=0.95,
            stream=True,
        )
        print("Once upon a time", end="")
        for piece in pieces:
            print(piece.choices[0].text, end="", flush=True)
        print()


if __name__ == "__main__":
    main()
