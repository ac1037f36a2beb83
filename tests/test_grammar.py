"""Grammars: JSON schemas of llguidance, and the processors of outlines and xgrammar,
decode to what stock mlx-lm makes with the dense head and the same grammar."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from llguidance import LLMatcher
from llguidance.hf import from_tokenizer
from mlx_lm.sample_utils import make_sampler
from outlines.backends.llguidance import LLGuidanceLogitsProcessor
from outlines.backends.outlines_core import OutlinesCoreLogitsProcessor
from outlines_core import Guide, Index, Vocabulary
from test_exact import drafting, stock, tokens

from mlx_flashhead import GrammarMask, LLGuidanceMask, load, patch_decoding
from mlx_flashhead.integration.exact import verification
from mlx_flashhead.integration.grammar import Processors
from mlx_flashhead.sampling.masks import TokenMask

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {
            "type": "array",
            "items": {"enum": ["red", "green", "blue"]},
            "maxItems": 3,
        },
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
PROMPT = "A person as JSON: "


def decoded(model, tokenizer, **options):
    made = tokens(model, tokenizer, prompt=PROMPT, n=120, **options)
    assert made[-1] in tokenizer.eos_token_ids
    return made, json.loads(tokenizer.decode(made[:-1]))


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("sampler", [None, make_sampler(1.0, top_p=0.95)])
def test_a_json_schema(untied_folder, exact, sampler):
    """What comes out is an object of the schema, and greedy it is the dense head's."""
    model, tokenizer = load(untied_folder, exact=exact, n_probes=90, verify_every=8)
    mask = LLGuidanceMask(tokenizer, SCHEMA)
    options = {"sampler": sampler, "logits_processors": [mask]}
    with verification() as count:
        made, value = decoded(model, tokenizer, **options)
    assert set(value) == {"name", "age", "tags"} and 0 <= value["age"] <= 150
    assert len(value["name"]) <= 12 and {*value["tags"]} <= {"red", "green", "blue"}
    if exact:
        assert count.verifications < count.tokens
    if sampler is None and exact:
        wanted, _ = decoded(*stock(untied_folder), **options)
        assert made == wanted
    # The same object again, and again unpatched: it begins behind each prompt.
    assert decoded(model, tokenizer, **options) == (made, value)


def test_a_mask_is_shared_by_the_sequences_of_a_batch(untied_folder):
    model, tokenizer = load(untied_folder, verify_every=8)
    mask = LLGuidanceMask(tokenizer, SCHEMA)
    prompts = [tokenizer.encode(PROMPT), tokenizer.encode("Another:"), [5]]
    from mlx_lm import batch_generate

    wanted = [
        tokens(model, tokenizer, prompt=p, n=60, logits_processors=[mask])
        for p in prompts
    ]
    options = {"max_tokens": 60, "logits_processors": [mask]}
    texts = batch_generate(model, tokenizer, prompts, **options).texts
    for text, made in zip(texts, wanted):
        end = made[-1] in tokenizer.eos_token_ids
        assert text == tokenizer.decode(made[:-1] if end else made)


def words(bits) -> list[int]:
    bits = np.unpackbits(np.asarray(bits).view(np.uint8), bitorder="little")
    return np.flatnonzero(bits).tolist()


def test_a_grammars_state_is_a_function_of_the_tokens(untied_folder):
    """In whatever order it is asked; drafts that do not stand are taken back."""
    _, tokenizer = load(untied_folder)
    grammar = LLMatcher.grammar_from_regex("[ab]{2}c(d|e+)")
    mask = LLGuidanceMask(tokenizer, grammar)
    prompt = [70, 71]
    after = {
        "": "ab",
        "a": "ab",
        "ab": "c",
        "abc": "de",
        "abce": "e$",
        "bbc": "de",
        "abcd": "$",
        "b": "ab",
        "bb": "c",
        "bbce": "e$",
    }

    def ids(text):
        end = max(tokenizer.eos_token_ids)
        return [end if c == "$" else tokenizer.encode(c)[0] for c in text]

    for text in ("", "a", "ab", "abc", "abce", "abc", "abcd", "", "b", "bb", "bbc"):
        assert words(mask.allowed(prompt + ids(text))) == sorted(ids(after[text]))
    for text in ("bbcd", "bbcd$", "bbcd$$"):
        assert words(mask.allowed(prompt + ids(text))) == ids("$")
    assert words(mask.allowed(prompt + ids("bbce"))) == sorted(ids("e$"))
    # Another prompt, and the first one again.
    assert words(mask.allowed([9, 9, 9])) == sorted(ids("ab"))
    assert words(mask.allowed([9, 9, 9, *ids("a")])) == sorted(ids("ab"))
    assert words(mask.allowed(prompt + ids("bb"))) == ids("c")


def test_another_logits_size_than_the_tokenizers(untied_folder):
    """Tokens that the tokenizer has not are not allowed; none is beyond the logits."""
    _, tokenizer = load(untied_folder)
    mask = LLGuidanceMask(tokenizer, LLMatcher.grammar_from_regex("(.|\n)*"))
    for size in (1100, 300):
        row = mask(mx.array([65]), mx.zeros((1, size)))
        assert row.shape == (1, size)
        assert (np.array(row[0, min(size, 1003) :]) == -np.inf).all()
        assert row[0, 66].item() == 0


# ---- processors of other packages --------------------------------------------------


class Reference(TokenMask):
    """A regular expression, by a guide that is made anew for each question."""

    def __init__(self, index, n_prompt):
        self._index, self._n = index, n_prompt

    def allowed(self, so_far):
        guide = Guide(self._index)
        for token in so_far[self._n :]:
            if guide.accepts_tokens([token]):
                guide.advance(token_id=token, return_tokens=False)
        mask = np.zeros(-(-1003 // 32), np.int32)
        guide.write_mask_into(mask.ctypes.data, mask.size, mask.itemsize)
        return mask


@pytest.fixture(scope="module")
def index():
    vocabulary = Vocabulary(257, {chr(i): [i] for i in range(32, 127)})
    return Index(r'\{"name": "[a-z]{3,9}", "n": [0-9]{2}\}', vocabulary)


@pytest.mark.parametrize("exact", [True, False])
def test_outlines_core(untied_folder, index, exact):
    """Its processor would need a Metal kernel; here it is not even called."""
    model, tokenizer = load(untied_folder, exact=exact, n_probes=100, verify_every=40)
    processor = OutlinesCoreLogitsProcessor(index, "mlx")
    got, value = decoded(model, tokenizer, logits_processors=[processor])
    assert processor.is_first_token and set(value) == {"name", "n"}
    dense, tokenizer = stock(untied_folder)
    reference = Reference(index, len(tokenizer.encode(PROMPT)))
    wanted, _ = decoded(dense, tokenizer, logits_processors=[reference])
    assert got == wanted or not exact
    patch_decoding()
    assert decoded(model, tokenizer, logits_processors=[processor])[0] == got


def test_llguidance_in_outlines(untied_folder):
    model, tokenizer = drafting(untied_folder)
    grammar = LLMatcher.grammar_from_json_schema(SCHEMA)
    of_tokens = from_tokenizer(tokenizer._tokenizer)
    processor = LLGuidanceLogitsProcessor(grammar, of_tokens, "mlx")
    wanted = decoded(
        model, tokenizer, logits_processors=[LLGuidanceMask(tokenizer, SCHEMA)]
    )
    assert decoded(model, tokenizer, logits_processors=[processor]) == wanted


class Matcher:
    """xgrammar's ``GrammarMatcher`` has these methods, as its 0.2.8 documents them; it
    needs PyTorch, so its place is taken by a guide of outlines-core."""

    stop_token_ids = (257,)

    def __init__(self, index):
        self._index, self._guide = index, Guide(index, 500)

    def accept_token(self, token):
        if not self._guide.accepts_tokens([token]):
            return False
        self._guide.advance(token_id=token, return_tokens=False)
        return True

    def rollback(self, n=1):
        self._guide.rollback_state(n)

    def fill_next_token_bitmask(self, bitmask, index=0):
        row = bitmask[index]
        self._guide.write_mask_into(row.ctypes.data, row.size, row.itemsize)
        return True

    def fork(self):
        twin = Matcher(self._index)
        twin._guide = Guide(self._index, 500)
        return twin

    def reset(self):
        self._guide.reset()


def xgrammar_processors(index):
    class Mine:
        def __init__(self):
            self.matcher, self.vocab_size = Matcher(index), 1003

        def __call__(self, so_far, logits):
            raise AssertionError("called")

    Mine.__module__, Mine.__qualname__ = (
        "xgrammar.contrib.mlxlm",
        "XGrammarLogitsProcessor",
    )

    class Outlines:
        def __init__(self):
            self.xgr = SimpleNamespace(GrammarMatcher=lambda grammar: Matcher(index))
            info = SimpleNamespace(vocab_size=1003)
            self.compiled_grammar = SimpleNamespace(tokenizer_info=info)

    Outlines.__module__, Outlines.__qualname__ = (
        "outlines.backends.xgrammar",
        "XGrammarLogitsProcessor",
    )
    return [Mine(), Outlines()]


def test_xgrammar(untied_folder, index):
    dense, tokenizer = stock(untied_folder)
    reference = Reference(index, len(tokenizer.encode(PROMPT)))
    wanted = decoded(dense, tokenizer, logits_processors=[reference])
    patch_decoding()
    model, tokenizer = drafting(untied_folder)
    for processor in xgrammar_processors(index):
        assert decoded(model, tokenizer, logits_processors=[processor]) == wanted


def test_processors_that_only_look_alike_are_left_alone(index):
    class Mine(OutlinesCoreLogitsProcessor):
        pass

    mine = Mine(index, "mlx")
    older = xgrammar_processors(index)[0]
    del older.matcher
    for processor in (mine, older):
        read = Processors([processor], 1003)
        assert read.all == [processor] and not read.masks and read.readable is None
    known = OutlinesCoreLogitsProcessor(index, "mlx")
    a, b = (Processors([known], 1003).masks[0] for _ in range(2))
    assert a is b and isinstance(a, GrammarMask)


# ---- bad input ---------------------------------------------------------------------


def one_line(e, says):
    assert says in str(e.value) and "\n" not in str(e.value)


def test_grammars_that_are_none(untied_folder):
    _, tokenizer = load(untied_folder)
    for grammar in (
        {"type": "nonsense"},
        "start: (",
        LLMatcher.grammar_from_regex("("),
    ):
        with pytest.raises(ValueError) as e:
            LLGuidanceMask(tokenizer, grammar)
        one_line(e, "the grammar cannot be used: ")


def test_tokens_that_a_grammar_has_not(untied_folder):
    """Something else than the mask chose."""
    _, tokenizer = load(untied_folder)
    mask = LLGuidanceMask(tokenizer, LLMatcher.grammar_from_regex("ab"))
    mask.allowed([1, 2])
    with pytest.raises(ValueError) as e:
        mask.allowed([1, 2, tokenizer.encode("x")[0]])
    one_line(e, "the grammar has no token 120 after 0 tokens of the answer: make it")


def test_a_grammar_that_allows_nothing(untied_folder, index):
    """Its tokenizer is another's, and what it allows are no tokens of the model's."""
    model, tokenizer = drafting(untied_folder)
    other = Vocabulary(257, {chr(i): [i + 5000] for i in range(32, 127)})
    processor = OutlinesCoreLogitsProcessor(Index("[ab]c", other), "mlx")
    with pytest.raises(ValueError) as e:
        decoded(model, tokenizer, logits_processors=[processor])
    one_line(e, "allows no token after")


def test_without_llguidance(untied_folder, monkeypatch):
    _, tokenizer = load(untied_folder)
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ImportError) as e:
        LLGuidanceMask(tokenizer, SCHEMA)
    one_line(e, "install mlx-flashhead[grammar]")


def test_speculative_decoding(untied_folder):
    """mlx-lm's own, with the mask for draft and target: the text is the same."""
    model, tokenizer = load(untied_folder)
    draft, _ = load(untied_folder, exact=False)
    options = {"logits_processors": [LLGuidanceMask(tokenizer, SCHEMA)]}
    wanted = decoded(model, tokenizer, **options)
    assert decoded(model, tokenizer, draft_model=draft, **options) == wanted
