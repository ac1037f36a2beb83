"""How faithful a converted model is on your own text.

    python examples/evaluate_text.py [FOLDER] [--text FILE] [--tokens N]

The reference is the dense head of the folder, on the same hidden states. Without a
folder: the demo model, Gemma 3 270M, converted on first use. Without a text: the
licence of this project.

With Gemma 3 270M it prints (long lines wrapped):

    1,024 probes, 12.5 % of the rows read: on 256 tokens recall 100.00 %, same best
      token 99.61 %, KL 0.0084 nats
    2,048 probes, 18.8 % of the rows read: on 256 tokens recall 100.00 %, same best
      token 99.61 %, KL 0.0026 nats
"""

from pathlib import Path

import click
import mlx.core as mx
import numpy as np

from mlx_flashhead import demo_model, flash_heads, load
from mlx_flashhead.evaluation.fidelity import measure
from mlx_flashhead.evaluation.states import hidden_states
from mlx_flashhead.folder.section import read_section
from mlx_flashhead.integration.locate import get_module, head_table

LICENSE = Path(__file__).parents[1] / "LICENSE"


@click.command()
@click.argument("folder", required=False)
@click.option("--text", default=str(LICENSE), help="A text file.")
@click.option("--tokens", default=256, help="Tokens of it, at most.")
def main(folder: str | None, text: str, tokens: int) -> None:
    folder = folder or str(demo_model.default()[0])
    path = read_section(folder).head_path
    dense, tokenizer = load(folder, dense=True)
    ids = tokenizer.encode(Path(text).read_text(encoding="utf-8"))[: tokens + 1]
    states = hidden_states(dense, path, ids)
    weight = np.array(head_table(get_module(dense, path)).dequantize(mx.float32))
    del dense

    model, _ = load(folder)
    head = next(flash_heads(model))
    for n_probes in (head.n_probes, min(2 * head.n_probes, head.n_clusters)):
        head.n_probes = n_probes
        found = measure(head, weight, states)
        print(
            f"{n_probes:,} probes, {100 * head.rows_read() / head.vocab_size:.1f} % of "
            f"the rows read: on {len(states)} tokens recall "
            f"{100 * found.recall.mean():.2f} %, same best token "
            f"{100 * found.agreement.mean():.2f} %, KL {found.kl().mean():z.4f} nats"
        )


if __name__ == "__main__":
    main()
