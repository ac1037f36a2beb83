"""Exact decoding of real models: the tokens of stock mlx-lm, whatever is drafted."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_flashhead.convert.collect import read_documents
from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from real_models import PASSAGES

from mlx_flashhead import flash_heads, load, patch_decoding, unpatch
from mlx_flashhead.integration import exact, rollback
from mlx_flashhead.integration.exact import ExactDecoder, verification
from mlx_flashhead.integration.keys import Keys
from mlx_flashhead.integration.locate import slot_of
from mlx_flashhead.sampling import Settings, coupled, dense_logprobs

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
# Prose, instructions, code, and nine languages.
PROMPTS = [
    json.loads(line)["prompt"]
    for line in (BENCHMARKS / "prompts.jsonl").read_text().splitlines()
]
# Prose, Python, French, Chinese.
FEW = [PROMPTS[i] for i in (1, 5, 8, 11)]
WINDOW = 512  # tokens that Gemma's sliding layers see

pytestmark = pytest.mark.filterwarnings("ignore:.*are probed at every step")

Text = list[tuple[int, mx.array]]


class Pair:
    """A converted model twice, in float32: for stock mlx-lm, and to draft.

    Args:
        folder: The converted folder.
        few: Clusters to probe where drafts are to be refused.
    """

    def __init__(self, folder: Path, few: int):
        self.few = few
        self.stock, self.tokenizer = load(folder, dense=True)
        self.exact, _ = load(folder)
        for model in (self.stock, self.exact):
            model.set_dtype(mx.float32)
        (self.head,) = flash_heads(self.exact)
        self.n_probes = self.head.n_probes

    def _text(self, model, prompt: str, n: int, seed: int = 7, **options) -> Text:
        """Tokens and log-probabilities; a token that would end a text does not."""
        generate_step = importlib.import_module("mlx_lm.generate").generate_step
        tokens = mx.array(self.tokenizer.encode(prompt))
        mx.random.seed(seed)
        return list(generate_step(tokens, model, max_tokens=n, **options))

    def wanted(self, *args, **options) -> Text:
        """What stock mlx-lm generates."""
        unpatch()
        return self._text(self.stock, *args, **options)

    def drafted(
        self, *args, n_probes: int | None = None, verify_every: int = 16, **options
    ) -> Text:
        """What exact decoding generates; with the folder's number of probes unless
        another is given."""
        patch_decoding()
        self.head.n_probes = n_probes or self.n_probes
        slot_of(self.exact).verify_every = verify_every
        return self._text(self.exact, *args, **options)


@pytest.fixture(scope="module")
def smol(smollm):
    return Pair(smollm.folder, few=72)


@pytest.fixture(scope="module")
def large(gemma):
    return Pair(gemma.folder, few=16)


def difference(got: Text, wanted: Text) -> int | None:
    """Where two texts differ first, in the token or in its log-probabilities beyond
    what the order of a float32 sum does to them; ``None`` for nowhere."""
    assert len(got) == len(wanted)
    for i, ((a, p), (b, q)) in enumerate(zip(got, wanted)):
        if a != b or not mx.allclose(p, q, rtol=0, atol=5e-4):
            return i
    return None


def tokens(text: Text) -> tuple[int, ...]:
    return tuple(token for token, _ in text)


# ---- the same text as stock mlx-lm's -----------------------------------------------


def check_identity(pair: Pair, prompts: list[str], n: int, few: int) -> None:
    """With the folder's own number of probes, which saves dense products, and with so
    few that drafts are refused."""
    wanted = [pair.wanted(prompt, n) for prompt in prompts]
    for n_probes in (None, few):
        with verification() as count:
            for prompt, text in zip(prompts, wanted):
                got = pair.drafted(prompt, n, n_probes=n_probes)
                assert difference(got, text) is None, prompt
        if n_probes == few:
            assert count.accepted < count.drafted
        else:
            assert count.verifications < count.tokens / 2


def test_smollm_writes_what_stock_mlx_lm_does(smol):
    check_identity(smol, FEW[1:], 12, smol.few)


@pytest.mark.full
def test_smollm_writes_twenty_texts_as_stock_mlx_lm_does(smol):
    assert len(PROMPTS) == 20
    check_identity(smol, PROMPTS, 40, few=128)


@pytest.mark.full
def test_gemma_writes_what_stock_mlx_lm_does(large):
    check_identity(large, FEW[1:], 40, large.few)


@pytest.fixture(scope="module")
def long_prompt(large) -> Callable[[int], str]:
    """The last tokens, about so many, of the passages with prose at their end: what
    follows prose is hard to draft."""
    prose, *others = read_documents(PASSAGES)
    whole = "\n\n".join([*others, prose])
    ids = large.tokenizer.encode(whole, add_special_tokens=False)
    return lambda n: large.tokenizer.decode(ids[-n:])


# Tokens of the prompt, and of what follows.
AROUND_THE_WINDOW = [(480, 130), (700, 40)]


@pytest.mark.full
@pytest.mark.parametrize(("before", "n"), AROUND_THE_WINDOW)
def test_gemma_past_its_sliding_window(large, long_prompt, before, n):
    """Across its border, and beyond it from the start: then the sliding layers' caches
    are full and overwrite the oldest token."""
    prompt = long_prompt(before)
    wanted = large.wanted(prompt, n)
    cache = make_prompt_cache(large.exact)
    with verification() as count:
        got = large.drafted(prompt, n, n_probes=large.few, prompt_cache=cache)
    assert difference(got, wanted) is None
    rotating = [c for c in cache if isinstance(c, RotatingKVCache)]
    assert len(rotating) == 15 and {c.max_size for c in rotating} == {WINDOW}
    assert min(c.offset for c in rotating) > 600
    assert count.accepted < count.drafted  # so that something was undone there


# ---- the seed alone decides --------------------------------------------------------

SAMPLED = {
    "top-p": ({"temp": 0.8, "top_p": 0.9}, {}),
    "min-p": ({"temp": 1.0, "min_p": 0.05, "min_tokens_to_keep": 3}, {}),
    "penalties": (
        {"temp": 0.7, "top_k": 40},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.5},
    ),
    "temperature": ({"temp": 1.0}, {}),
    "XTC": ({"temp": 1.0, "xtc_probability": 0.5, "xtc_threshold": 0.05}, {}),
    "greedy, penalties": (
        {"temp": 0.0},
        {"logit_bias": {260: -5.0}, "presence_penalty": 1.0},
    ),
}


def drafts(pair: Pair) -> list[tuple[int | None, int]]:
    """Numbers of probes, and of tokens that are verified at once."""
    return [(None, 4), (pair.few, 16), (None, 16), (256, 5)]


def check_seed(pair: Pair, prompts: list[str], n: int, name: str, ways: int) -> None:
    """Drawn from one dense product after another, or drafted in whatever way."""
    sampler, processors = SAMPLED[name]

    def text(prompt, **draft):
        options = {"sampler": make_sampler(**sampler)}
        if processors:
            options["logits_processors"] = make_logits_processors(**processors)
        return pair.drafted(prompt, n, **options, **draft)

    refused = 0
    for prompt in prompts:
        plain = text(prompt, verify_every=1)
        for n_probes, verify_every in drafts(pair)[:ways]:
            with verification() as count:
                got = text(prompt, n_probes=n_probes, verify_every=verify_every)
            refused += count.drafted - count.accepted
            assert difference(got, plain) is None, (prompt, n_probes, verify_every)
        if name == "temperature":
            assert tokens(text(prompt, seed=8)) != tokens(plain)
    assert refused


@pytest.mark.parametrize("name", ["top-p", "penalties"])
def test_a_seed_gives_one_text(smol, name):
    check_seed(smol, FEW[1:3], 20, name, 2)


@pytest.mark.full
@pytest.mark.parametrize("name", SAMPLED)
def test_a_seed_gives_one_text_whatever_is_drafted(smol, name):
    check_seed(smol, FEW[1:3], 24, name, 4)


@pytest.mark.full
@pytest.mark.parametrize("name", ["top-p", "min-p", "penalties"])
def test_a_seed_gives_one_text_of_gemma(large, name):
    check_seed(large, FEW[2:3], 20, name, 2)


def own_sampler(logprobs: mx.array) -> mx.array:
    """One that this package does not know."""
    return mx.random.categorical(logprobs * 1.25)


def test_an_unknown_sampler_draws_what_it_does_in_stock_mlx_lm(smol):
    wanted = smol.wanted(PROMPTS[0], 12, sampler=own_sampler)
    got = smol.drafted(PROMPTS[0], 12, sampler=own_sampler)
    assert difference(got, wanted) is None


@pytest.mark.full
def test_unknown_samplers_with_penalties_draw_what_they_do_in_stock_mlx_lm(smol):
    for prompt in FEW[1:3]:
        options = {"sampler": own_sampler}
        made = [make_logits_processors(repetition_penalty=1.3) for _ in range(2)]
        wanted = smol.wanted(prompt, 30, logits_processors=made[0], **options)
        got = smol.drafted(prompt, 30, logits_processors=made[1], **options)
        assert difference(got, wanted) is None


@pytest.mark.full
def test_an_unknown_sampler_draws_what_it_does_in_stock_mlx_lm_with_gemma(large):
    wanted = large.wanted(PROMPTS[0], 20, sampler=own_sampler)
    got = large.drafted(PROMPTS[0], 20, sampler=own_sampler)
    assert difference(got, wanted) is None


# ---- what would be wrong -----------------------------------------------------------


def careless(self, logits, drafts, context, masks):
    """A verification that accepts every draft."""
    last = coupled.draw(self.head, Settings(), logits[-1:], self._key(0)[None]).tokens
    chosen = [draft.item() for draft in drafts[1:]] + last.tolist()
    return [
        exact.Verified(token, dense_logprobs(self.head, row[None])[0])
        for token, row in zip(chosen, logits)
    ]


def test_accepting_every_draft_is_caught(smol, monkeypatch):
    monkeypatch.setattr(ExactDecoder, "_choose_together", careless)
    # Not for the number of drafts that stood, but for the text of one of the prompts.
    with pytest.raises(AssertionError, match="softmax|Révolution|中国"):
        check_identity(smol, FEW[1:], 12, smol.few)


def test_keys_that_depend_on_the_draft_are_caught(smol, monkeypatch):
    several = Keys.several

    def wrong(self, n, k, settings):
        self.asked = getattr(self, "asked", 0) + 1
        return several(self, n + self.asked, k, settings)

    monkeypatch.setattr(Keys, "several", wrong)
    with pytest.raises(AssertionError, match="Révolution"):
        check_seed(smol, FEW[2:3], 12, "top-p", 2)


@pytest.mark.full
def test_slots_of_a_full_window_that_are_not_put_back_are_caught(
    large, long_prompt, monkeypatch
):
    """Those that undone tokens have overwritten."""
    before, n = AROUND_THE_WINDOW[1]
    prompt = long_prompt(before)
    wanted = large.wanted(prompt, n)
    monkeypatch.setattr(rollback._Rotating, "to", rollback._Record.to)
    got = large.drafted(prompt, n, n_probes=large.few)
    assert difference(got, wanted) is not None
