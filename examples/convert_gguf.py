"""Convert a GGUF file, tokenizer and chat template included, and write with it.

    pip install 'mlx-flashhead[gguf]'
    python examples/convert_gguf.py MODEL.gguf FOLDER [--max-tokens N]

With SmolLM2-135M-Instruct it prints (long lines wrapped):

    Vocabulary    49,152 tokens x 576, in 3,072 clusters of 16; 256 probed
    Read a token  3.5 MB (8-bit rows, 4-bit centroids); dense 16-bit 56.6 MB; 16.1
      times less
    Held-out text 776 tokens: recall 99.10 %, same best token 97.04 %, KL 0.0675
      nats
    Took          76 s
    Folder        smollm2-flash
    Try           python -m mlx_flashhead.generate --model smollm2-flash --prompt
      "Once upon a time"

    The capital of France is Paris.

    The answer is: 2018-01-22
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
