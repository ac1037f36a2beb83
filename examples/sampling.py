"""Sample with mlx-lm's own samplers and penalties: they draw among the candidates, and
every other token of the vocabulary is counted and can come.

    python examples/sampling.py [FOLDER] [--max-tokens N]

Without a folder: the demo model, Gemma 3 270M, converted on first use.

With Gemma 3 270M it prints (long lines wrapped):

    greedy: My favourite dish is the <strong>chicken and rice</strong>. I love the
      taste of the chicken and the rice. I love the taste of

    temperature 0.8, top-p 0.95: My favourite dish is the Shrimp and Chilly Cheese.
      We love going back to the old days when we would have to search for this dish

    temperature 1, min-p 0.1: My favourite dish is a dish with a very unique
      texture. It’s like a pasta that you can make at home. It

    top-k 20, repetition penalty 1.3: My favourite dish is the Chicken and rice in
      my family. We eat around 20-35 pieces a day, but it tastes
"""  # noqa: RUF002

import click
import mlx.core as mx
from mlx_lm import generate
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from mlx_flashhead import demo_model, load

WAYS = {
    "greedy": {},
    "temperature 0.8, top-p 0.95": {"sampler": make_sampler(0.8, top_p=0.95)},
    "temperature 1, min-p 0.1": {"sampler": make_sampler(1.0, min_p=0.1)},
    "top-k 20, repetition penalty 1.3": {
        "sampler": make_sampler(0.7, top_k=20),
        "logits_processors": make_logits_processors(repetition_penalty=1.3),
    },
}


@click.command()
@click.argument("folder", required=False)
@click.option("--max-tokens", default=24)
def main(folder: str | None, max_tokens: int) -> None:
    model, tokenizer = load(folder or demo_model.default()[0])
    prompt = "My favourite dish is"
    for name, options in WAYS.items():
        mx.random.seed(1)  # the same seed, the same text
        text = generate(model, tokenizer, prompt, max_tokens=max_tokens, **options)
        print(f"{name}: {prompt}{' '.join(text.splitlines())}\n")


if __name__ == "__main__":
    main()
