"""Objects of a JSON schema, greedy and sampled.

    python examples/json_schema.py [FOLDER] [--max-tokens N]

Needs the extra ``grammar``. Where the schema leaves few tokens, only their rows are
scored; where it leaves many, within strings, FlashHead drafts within the schema and the
dense head verifies. Without a folder: the demo model, Gemma 3 270M, converted on first
use.
"""

import json

import click
import mlx.core as mx
from mlx_lm import generate
from mlx_lm.sample_utils import make_sampler

from mlx_flashhead import LLGuidanceMask, demo_model, load, verification

SCHEMA = {
    "type": "object",
    "properties": {
        "dish": {"type": "string", "minLength": 4, "maxLength": 30},
        "minutes": {"type": "integer", "minimum": 5, "maximum": 180},
        "vegetarian": {"type": "boolean"},
    },
    "required": ["dish", "minutes", "vegetarian"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}


@click.command()
@click.argument("folder", required=False)
@click.option("--max-tokens", default=80)
def main(folder: str | None, max_tokens: int) -> None:
    model, tokenizer = load(folder or demo_model.default()[0])
    mask = LLGuidanceMask(tokenizer, SCHEMA)
    with verification() as counted:
        for sampler in (None, make_sampler(0.8, top_p=0.95)):
            mx.random.seed(1)
            text = generate(
                model,
                tokenizer,
                "A recipe as JSON, its dish, minutes and whether it is vegetarian: ",
                max_tokens=max_tokens,
                sampler=sampler,
                logits_processors=[mask],
            )
            print(json.dumps(json.loads(text), ensure_ascii=False))
    print(f"{100 * counted.acceptance:.1f} % of the drafts stood")


if __name__ == "__main__":
    main()
