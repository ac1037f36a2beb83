"""Convert a GGUF file, tokenizer and chat template included, and write with it.

    python examples/convert_gguf.py MODEL.gguf FOLDER [--max-tokens N]

@@OUTPUT@@
"""

import click
from mlx_flashhead.convert import convert
from mlx_lm import generate

from mlx_flashhead import load


@click.command()
@click.argument("gguf", type=click.Path(exists=True))
@click.argument("folder")
@click.option("--max-tokens", default=20)
def main(gguf: str, folder: str, max_tokens: int) -> None:
    print(convert(gguf_path=gguf, mlx_path=folder))
    model, tokenizer = load(folder)
    prompt = "The capital of France is"
    text = generate(model, tokenizer, prompt, max_tokens=max_tokens)
    print(f"\n{prompt} {text.strip()}")


if __name__ == "__main__":
    main()
