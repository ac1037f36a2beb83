"""Speculative decoding with a FlashHead draft.

    python examples/speculative.py [TARGET] [--draft FOLDER] [--max-tokens N]

The draft's tokens are checked by the target, so the text is the target's own. A draft
pays where it is much smaller than its target and has the same tokenizer: Qwen3-0.6B,
converted, for Qwen3-8B. Without --draft the target is its own draft, the target with
its dense head and the draft with FlashHead: that shows how often the two agree, but
gains no time. Without a folder: the demo model, Gemma 3 270M, converted on first use.

With Gemma 3 270M it prints (long lines wrapped):

    The steam engine was invented in 1768 by the French engineer Jean-Baptiste
      Lully. It was a powerful machine that could move heavy objects. It was used

    22 of 25 draft tokens were accepted
"""

import click
from mlx_lm import stream_generate

from mlx_flashhead import acceptance, demo_model, load


@click.command()
@click.argument("target", required=False)
@click.option("--draft", help="A smaller converted model with the same tokenizer.")
@click.option("--max-tokens", default=30)
def main(target: str | None, draft: str | None, max_tokens: int) -> None:
    folder = target or demo_model.default()[0]
    model, tokenizer = load(folder, dense=draft is None)
    draft_model, _ = load(draft or folder)
    prompt = "The steam engine was invented"
    print(prompt, end="")
    with acceptance() as drafts:
        for response in stream_generate(
            model,
            tokenizer,
            prompt,
            max_tokens=max_tokens,
            draft_model=draft_model,
            num_draft_tokens=3,
        ):
            print(response.text, end="", flush=True)
    print(f"\n\n{drafts.accepted} of {drafts.proposed} draft tokens were accepted")


if __name__ == "__main__":
    main()
