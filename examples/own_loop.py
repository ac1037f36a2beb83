"""A loop of your own around a model that mlx-lm has loaded: tokens in, the next token
and its log-probability out.

    python examples/own_loop.py [FOLDER] [--approximate] [--max-tokens N]

Without a folder: the demo model, Gemma 3 270M, converted on first use.
"""

import click
import mlx.core as mx
import mlx_lm
from mlx_lm.sample_utils import make_sampler

from mlx_flashhead import Decoder, attach, demo_model


@click.command()
@click.argument("folder", required=False)
@click.option("--exact/--approximate", default=True)
@click.option("--max-tokens", default=24)
def main(folder: str | None, exact: bool, max_tokens: int) -> None:
    folder = str(folder or demo_model.default()[0])
    model, tokenizer = mlx_lm.load(folder)  # or whatever loads the model
    attach(model, folder, exact=exact)

    mx.random.seed(1)
    decoder = Decoder(model, sampler=make_sampler(0.8, top_p=0.95))
    tokens = tokenizer.encode("The lighthouse keeper")
    print(tokenizer.decode(tokens), end="", flush=True)
    nats = []
    for _ in range(max_tokens):
        tokens, logprobs = decoder.step(tokens)
        nats.append(-logprobs.item())
        if tokens.item() in tokenizer.eos_token_ids:
            break
        print(tokenizer.decode(tokens.tolist()), end="", flush=True)
    decoder.close()  # the cache now holds these tokens, and no drafts
    print(f"\n\n{sum(nats) / len(nats):.3f} nats a token")


if __name__ == "__main__":
    main()
