"""Load a converted model and write with it, whole or as it comes.

    python examples/python_api.py [FOLDER] [--max-tokens N]

Without a folder: the demo model, Gemma 3 270M, converted on first use.

With Gemma 3 270M it prints (long lines wrapped):

    1,024 of 16,384 clusters are probed per token

    The lighthouse keeper's wife, who was a member of the family, was a member of
      the family.

    The family was in the process of moving to the

    2,048 probes: The lighthouse keeper's wife, who was a member of the family, was
      a member of the family.

    The family was in the process of moving to the

    9.3 tokens per second
"""

import click
from mlx_lm import generate, stream_generate

from mlx_flashhead import demo_model, flash_heads, load


@click.command()
@click.argument("folder", required=False)
@click.option("--max-tokens", default=30)
def main(folder: str | None, max_tokens: int) -> None:
    model, tokenizer = load(folder or demo_model.default()[0])
    head = next(flash_heads(model))
    print(f"{head.n_probes:,} of {head.n_clusters:,} clusters are probed per token\n")

    prompt = "The lighthouse keeper"
    # Any function of mlx-lm's decodes with FlashHead, greedily if not told otherwise.
    print(prompt + generate(model, tokenizer, prompt, max_tokens=max_tokens))

    # More probes are closer to the dense head, and slower. Any time will do.
    head.n_probes = min(2 * head.n_probes, head.n_clusters)
    print(f"\n{head.n_probes:,} probes: {prompt}", end="")
    for response in stream_generate(model, tokenizer, prompt, max_tokens=max_tokens):
        print(response.text, end="", flush=True)
    print(f"\n\n{response.generation_tps:.1f} tokens per second")


if __name__ == "__main__":
    main()
