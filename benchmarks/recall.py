"""Recall of both recipes of a model on your own texts.

    python benchmarks/recall.py --gguf-path model.gguf --text a.txt --text b.txt

Clusters the head twice, by the default recipe and by the paper's, and measures both
on the same hidden states of the same texts: recall (the unquantized dense head's best
token is probed), agreement (and is chosen), KL(dense || FlashHead) in nats per token.
"""

from __future__ import annotations

import itertools
import json
import tempfile
import time
from pathlib import Path

import click
import mlx.core as mx
import numpy as np
from mlx_flashhead.convert import collect
from mlx_flashhead.convert.pipeline import build_head
from mlx_flashhead.convert.recipes import RECIPES
from mlx_flashhead.convert.source import open_gguf, open_hf

from mlx_flashhead.evaluation.fidelity import measure
from mlx_flashhead.evaluation.states import hidden_states
from mlx_flashhead.integration.locate import find_head, get_module, head_table


@click.command(context_settings={"show_default": True})
@click.option("--gguf-path", help="A GGUF file.")
@click.option("--hf-path", help="A Hugging Face id or a local folder.")
@click.option("--text", "texts", multiple=True, required=True, help="A text file.")
@click.option("--tokens", default=10_500, help="Tokens of each text, at most.")
@click.option("--cluster-size", default=16)
@click.option("--rows", "shares", multiple=True, type=float, help="Rows read, in %.")
@click.option("--seed", "seeds", multiple=True, type=int, default=[0])
@click.option("--recipe", "recipes", multiple=True, default=list(RECIPES))
@click.option("--centroid-bits", "bits", multiple=True, type=int, default=[4])
@click.option(
    "--leave-out",
    multiple=True,
    help="Domain of the built-in calibration text to do without.",
)
@click.option("--json", "json_path", help="Write the figures here, too.")
def main(
    gguf_path,
    hf_path,
    texts,
    tokens,
    cluster_size,
    shares,
    seeds,
    recipes,
    bits,
    leave_out,
    json_path,
):
    with tempfile.TemporaryDirectory() as workspace:
        if gguf_path:
            source = open_gguf(gguf_path, Path(workspace), None)
        else:
            source = open_hf(hf_path, None, False)
        model, tokenizer, _ = source.load(None)
        path = find_head(model)
        table = head_table(get_module(model, path))
        runner = source.load_for_calibration()
        states = collect.collect(runner, tokenizer, path, _documents(leave_out))
        sets = {"held out": states.held_out}
        for text in texts:
            ids = tokenizer.encode(Path(text).read_text())[: tokens + 1]
            sets[Path(text).name] = hidden_states(runner, path, ids)
        del runner
        weight = np.array(table.dequantize(mx.float32))
    stops = list(tokenizer.eos_token_ids)
    figures = []
    header = (
        "| recipe | seed | bits | rows read | text | tokens | recall | agreement | KL |"
    )
    click.echo(f"{header}\n{'| --- ' * 9}|")
    for recipe in recipes:
        for seed, centroid_bits in itertools.product(seeds, bits):
            start = time.perf_counter()
            head = build_head(
                table,
                weight,
                None,
                states,
                RECIPES[recipe],
                cluster_size=cluster_size,
                centroid_bits=centroid_bits,
                seed=seed,
                stop_tokens=stops,
            )
            seconds = time.perf_counter() - start
            for probes in _probes(head, shares):
                head.n_probes = probes
                for name, h in sets.items():
                    f = measure(head, weight, h)
                    row = {
                        "recipe": recipe,
                        "seed": seed,
                        "centroid_bits": centroid_bits,
                        "rows_read": head.rows_read() / head.vocab_size,
                        "text": name,
                        "tokens": len(h),
                        "recall": float(f.recall.mean()),
                        "agreement": float(f.agreement.mean()),
                        "kl": float(f.kl().mean()),
                    }
                    figures.append(row)
                    click.echo(
                        f"| {recipe} | {seed} | {centroid_bits} | "
                        f"{100 * row['rows_read']:.1f} % | {name} "
                        f"| {len(h):,} | {100 * row['recall']:.2f} | "
                        f"{100 * row['agreement']:.2f} | {row['kl']:.4f} |"
                    )
            click.echo(f"(clustered in {seconds:.0f} s)", err=True)
    if json_path:
        Path(json_path).write_text(json.dumps(figures, indent=1))


def _documents(leave_out):
    """The built-in calibration text without some domains."""
    documents = []
    for line in collect.DEFAULT_TEXT.read_text().split("\n"):
        if line.strip():
            document = json.loads(line)
            if document["domain"].split("-")[0] not in leave_out:
                documents.append(document["text"])
    return documents


def _probes(head, shares):
    """Numbers of probes that read at most the given shares of the rows, in per cent."""
    if not shares:
        return [head.n_probes]
    rows = [share / 100 * head.vocab_size - head.n_clusters for share in shares]
    return [max(1, int(r // head.cluster_size)) for r in rows]


if __name__ == "__main__":
    main()
