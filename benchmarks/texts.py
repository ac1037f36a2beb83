"""Whole texts of several kinds: what exact decoding costs and throws away.

    python benchmarks/texts.py FOLDER

Each text is decoded with the dense head, approximately and exactly, in turn, by
mlx-lm's ``stream_generate``. Texts are compared with the dense head's; for sampled ones
that is another draw, so only greedy ones are the same. Waste is the share of the body's
steps that were thrown away. Of the first tokens, which come while chunks are still
short, the time counts, too; that of the prompt does not.
"""

from __future__ import annotations

from collections import defaultdict

import click
import mlx.core as mx
from mlx_lm import stream_generate
from mlx_lm.sample_utils import make_sampler
from samplers import SAMPLERS

from mlx_flashhead import load, verification
from mlx_flashhead.benchmarking.report import markdown_table
from mlx_flashhead.integration.exact import Verification

TEXTS = {
    "prose": [
        "The history of the steam engine begins",
        "In the middle of the night, the lighthouse keeper heard",
        "La Révolution française a commencé en",
        "Die Hauptstadt von Österreich ist Wien. Die Stadt",
        "中国的长城是世界上",
    ],
    "code": [
        'def fibonacci(n):\n    """Return the n-th Fibonacci number."""\n',
        "import numpy as np\n\ndef softmax(x, axis=-1):\n",
        "#include <stdio.h>\n\nint main(void) {\n    int numbers[] = {3, 1, 4};\n",
        "SELECT customers.name, SUM(orders.total)\nFROM customers\n",
    ],
    "chat": [
        "How do I keep bread fresh for longer?",
        "Explain to a child why the sky is blue.",
        "Write a Python function that reverses a linked list.",
        "Wie schreibe ich eine höfliche Absage?",
    ],
}


@click.command(context_settings={"show_default": True})
@click.argument("folder")
@click.option("--max-tokens", default=128)
@click.option("--samplers", default="greedy,top-p", help=f"Of {', '.join(SAMPLERS)}.")
@click.option("--kinds", default=",".join(TEXTS), help="Of texts.")
@click.option(
    "--n-probes", type=int, help="Of the draft, instead of the stored number."
)
@click.option("--verify-every", type=int, help="Instead of the stored number.")
@click.option("--repeats", default=1, help="Times that each text is decoded.")
def main(folder, max_tokens, samplers, kinds, n_probes, verify_every, repeats):
    """Decode whole texts with the dense head, approximately and exactly."""
    exact = {"n_probes": n_probes, "verify_every": verify_every}
    ways = {
        "dense": load(folder, dense=True),
        "approximate": load(folder, exact=False),
        "exact": load(folder, **exact),
    }
    seconds = defaultdict(float)
    tokens, same, verified = defaultdict(int), defaultdict(int), {}
    for sampler in samplers.split(","):
        for kind in kinds.split(","):
            cell = verified[sampler, kind] = Verification()
            for i, text in enumerate(TEXTS[kind] * repeats):
                texts = {}
                for way, (model, tokenizer) in ways.items():
                    mx.random.seed(i)
                    with verification() as count:
                        texts[way] = decode(
                            model,
                            tokenizer,
                            prompt_of(tokenizer, kind, text),
                            max_tokens,
                            SAMPLERS[sampler],
                        )
                    if way == "exact":
                        cell += count
                    seconds[sampler, kind, way] += texts[way][1]
                    tokens[sampler, kind, way] += len(texts[way][0])
                    same[sampler, kind, way] += texts[way][0] == texts["dense"][0]
            verified[sampler, kind] = cell
    head = ["sampler", "texts", *(f"{way}, tokens/s" for way in ways)]
    head += ["exact / dense", "exact / approximate", "same as dense: approximate"]
    table = [[*head, "exact", "drafts that stood", "thrown away"]]
    for (sampler, kind), count in verified.items():
        speed = {w: tokens[sampler, kind, w] / seconds[sampler, kind, w] for w in ways}
        n = len(TEXTS[kind]) * repeats
        shown = ("approximate", "exact") if sampler == "greedy" else ()
        equal = [f"{same[sampler, kind, w]} of {n}" for w in shown] or ["-", "-"]
        table.append(
            [
                *(sampler, f"{kind} ({n})", *(f"{s:.1f}" for s in speed.values())),
                f"{speed['exact'] / speed['dense']:.2f}",
                f"{speed['exact'] / speed['approximate']:.2f}",
                *equal,
                f"{100 * count.acceptance:.2f} %",
                f"{100 * count.waste:.1f} %",
            ]
        )
    click.echo(markdown_table(table, left=2))


def prompt_of(tokenizer, kind: str, text: str):
    """The prompt of a text; a chat's in the model's own template, where it has one."""
    if kind != "chat":
        return text
    if not tokenizer.has_chat_template:
        return f"User: {text}\nAssistant:"
    message = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(message, add_generation_prompt=True)


def decode(model, tokenizer, prompt, max_tokens, options) -> tuple[list[int], float]:
    """The tokens, and the seconds that they took after the prompt."""
    found, last = [], None
    for last in stream_generate(
        model,
        tokenizer,
        prompt,
        max_tokens=max_tokens,
        sampler=make_sampler(**options),
    ):
        found.append(last.token)
    return found, last.generation_tokens / last.generation_tps


if __name__ == "__main__":
    main()
