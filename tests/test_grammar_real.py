"""JSON schemas with real models and their tokenizers: what stock mlx-lm makes with the
dense head and the same grammar."""

from __future__ import annotations

import json

import pytest
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from test_exact import tokens

from mlx_flashhead import LLGuidanceMask, load, patch_decoding, unpatch
from mlx_flashhead.integration.exact import verification

# Whitespace as the model likes it; keys, strings, numbers, a list and an enumeration.
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 24},
        "born": {"type": "integer", "minimum": 1000, "maximum": 2020},
        "field": {"enum": ["physics", "chemistry", "music"]},
        "works": {
            "type": "array",
            "items": {"type": "string", "maxLength": 24},
            "minItems": 1,
            "maxItems": 3,
        },
    },
    "required": ["name", "born", "field", "works"],
    "additionalProperties": False,
}
PROMPT = "{} as a JSON object with name, born, field and works:\n"
PEOPLE = ["Marie Curie", "Johann Sebastian Bach", "玛丽亚·居里"]

pytestmark = pytest.mark.filterwarnings("ignore:.*are probed at every step")


@pytest.mark.parametrize(
    "name, people, n",
    [
        ("smollm", PEOPLE[:1], 40),
        pytest.param("smollm", PEOPLE, 120, marks=pytest.mark.full),
        pytest.param("gemma", PEOPLE, 120, marks=pytest.mark.full),
    ],
)
def test_objects_are_those_of_stock_mlx_lm(name, people, n, request):
    folder = request.getfixturevalue(name).folder
    (stock, tokenizer), (exact, _) = load(folder, dense=True), load(folder)
    mask = LLGuidanceMask(tokenizer, SCHEMA)
    for person in people:
        for processors in ([], make_logits_processors(repetition_penalty=1.1)):
            options = {
                "prompt": PROMPT.format(person),
                "n": n,
                "logits_processors": [mask, *processors],
            }
            unpatch()
            wanted = tokens(stock, tokenizer, **options)
            patch_decoding()
            with verification() as count:
                got = tokens(exact, tokenizer, **options)
            assert got == wanted
            # A draft that did not know of the grammar would be refused at once.
            assert count.verifications < len(got) / 3 and count.acceptance > 0.8
            if got[-1] in tokenizer.eos_token_ids:
                assert set(json.loads(tokenizer.decode(got[:-1]))) == {
                    *SCHEMA["required"]
                }
            if n < 100:
                break


@pytest.mark.full
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("name", ["smollm", "gemma"])
def test_sampled_objects_are_of_the_schema(name, exact, request):
    model, tokenizer = load(request.getfixturevalue(name).folder, exact=exact)
    mask, ended = LLGuidanceMask(tokenizer, SCHEMA), 0
    for seed in range(3):
        made = tokens(
            model,
            tokenizer,
            prompt=PROMPT.format(PEOPLE[0]),
            n=200,
            seed=seed,
            sampler=make_sampler(0.8, top_p=0.95),
            logits_processors=[mask],
        )
        if made[-1] in tokenizer.eos_token_ids:
            ended += 1
            value = json.loads(tokenizer.decode(made[:-1]))
            assert 1000 <= value["born"] <= 2020 and 1 <= len(value["works"]) <= 3
            assert value["field"] in SCHEMA["properties"]["field"]["enum"]
    assert ended
