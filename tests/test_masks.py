"""Logits processors that are masks: what they allow is scored, drafted and drawn, and
texts are those of the dense head with the same mask."""

from __future__ import annotations

import importlib
import itertools

import mlx.core as mx
import numpy as np
import pytest
import small_models
from mlx_flashhead.convert import convert
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from small_heads import make_head, random_states
from test_candidates import p_value
from test_exact import SAMPLERS, drafting, stock, stock_probabilities, text, tokens

from mlx_flashhead import TokenMask, flash_heads, load, patch_decoding, unpatch
from mlx_flashhead.integration.exact import verification
from mlx_flashhead.integration.samplers import read_processors, read_sampler
from mlx_flashhead.sampling import Settings, coupled, masked
from mlx_flashhead.sampling.masks import allowed


def packed(bits: np.ndarray) -> np.ndarray:
    """bool ``[V]`` as uint32 ``[ceil(V / 32)]``."""
    whole = np.zeros(-(-len(bits) // 32) * 32, bool)
    whole[: len(bits)] = bits
    return np.packbits(whole, bitorder="little").view(np.uint32)


def bits_of(ids, vocab_size: int) -> np.ndarray:
    bits = np.zeros(vocab_size, bool)
    bits[ids] = True
    return bits


# Not "from mlx_lm import generate": that name is a function's.
generate = importlib.import_module("mlx_lm.generate")


class Fixed(TokenMask):
    """The same tokens always."""

    def __init__(self, ids, vocab_size: int):
        self._words = packed(bits_of(ids, vocab_size))

    def allowed(self, tokens):
        return self._words


class Fickle(TokenMask):
    """One, few or many tokens, by the two tokens before."""

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size
        self.asked: list[list[int]] = []

    def allowed(self, tokens):
        self.asked.append(list(tokens))
        rng = np.random.default_rng(tokens[-2:])
        n = rng.choice([1, 4, 100, self.vocab_size // 2, self.vocab_size - 9])
        ids = rng.choice(self.vocab_size, n, replace=False)
        return packed(bits_of(ids, self.vocab_size))


# ---- one position ------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 3, 40, 150])
@pytest.mark.parametrize("bias", [False, True])
def test_few_tokens_are_drawn_as_by_the_dense_head(n, bias):
    """Of many, what is drawn is allowed; their probabilities sum to one."""
    head = make_head(230, 32, 8, 6, bias=bias).head
    ids = np.random.default_rng(n).choice(230, n, replace=False)
    mask = Fixed(ids, 230)
    may_come = allowed(head, [mask], [1])
    assert masked.sure(head, may_come) == (n < 48)
    assert sorted(may_come.ids) == sorted(ids) and may_come.n == n
    x = mx.array(0.35 * random_states(1, 32, 100))
    dense = mask(mx.array([1]), head.dense(x))
    wanted_row = dense - mx.logsumexp(dense)
    row = mx.where(may_come.clustered, head.clustered(x), -mx.inf)
    for options, i in itertools.product(SAMPLERS, range(6)):
        settings, key = read_sampler(make_sampler(**options)), mx.array([7, i])
        key = key.astype(mx.uint32)
        choice = masked.choose(head, settings, x, key, may_come)
        token, logprobs = choice.tokens.item(), choice.logprobs()
        assert token in ids and logprobs.shape == (1, 230)
        finite = np.array(logprobs[0]) > -np.inf
        assert (finite == bits_of(ids, 230)).all()
        assert mx.exp(logprobs).sum().item() == pytest.approx(1, abs=1e-4)
        if n < 48:
            drawn = coupled.draw(head, settings, row, key[None])
            assert token == drawn.tokens.item()
            assert mx.allclose(logprobs, wanted_row, atol=1e-4)


@pytest.mark.parametrize("options", SAMPLERS[1:], ids=str)
def test_masked_draws_follow_mlx_lms_dense_sampler(options):
    """5,000 draws of the dense head's, among few tokens and among many."""
    options = {k: 1.0 if k == "xtc_probability" else v for k, v in options.items()}
    head = make_head(230, 32, 8, 6).head
    x = mx.array(0.35 * random_states(1, 32, 100))
    sampler = make_sampler(**options)
    settings = read_sampler(sampler)
    for n in (12, 120):
        mask = Fixed(np.random.default_rng(n).choice(230, n, replace=False), 230)
        may_come = allowed(head, [mask], [1])
        logits = np.array(mask(mx.array([1]), head.dense(x))[0])
        wanted = stock_probabilities(sampler, logits)
        row = mx.where(may_come.clustered, head.clustered(x), -mx.inf)
        rows = mx.repeat(row, 1000, axis=0)
        drawn = []
        for start in range(0, 5000, 1000):
            keys = mx.array([[start + 1, i] for i in range(1000)], dtype=mx.uint32)
            drawn.append(np.array(coupled.draw(head, settings, rows, keys).tokens))
        assert p_value(np.concatenate(drawn), wanted) > 1e-4


def test_clusters_that_are_not_probed_are_drawn_by_their_allowed_mass():
    """1,000 draws of many tokens, against the clusters' probabilities."""
    head = make_head(230, 32, 8, 6).head
    x = mx.array(0.35 * random_states(1, 32, 100))
    ids = np.random.default_rng(1).choice(230, 150, replace=False)
    may_come, settings = allowed(head, [Fixed(ids, 230)], [1]), Settings(temp=1.0)
    place = np.array(head.positions) // 8
    probed = masked._MaskedHead(head, may_come).centroid_logits(x)
    probes = np.array(head.select(probed))
    drawn = []
    for i in range(1000):
        key = mx.array([9, i], dtype=mx.uint32)
        choice = masked.choose(head, settings, x, key, may_come)
        drawn.append(choice.tokens)
        if place[choice.tokens.item()] in probes:
            # Of the others, that which is drawn counts exactly.
            logprobs = choice.logprobs()[0]
    tokens = np.array(mx.concatenate(drawn))
    assert np.isin(tokens, ids).all()
    wanted = np.bincount(place, np.exp(np.array(logprobs)))
    assert p_value(place[tokens], wanted) > 1e-4
    assert 50 < (~np.isin(place[tokens], probes)).sum() < 1000


PROCESSORS = [
    {"repetition_penalty": 4.0},
    {"logit_bias": {5: 3.0, 7: -4.0}, "presence_penalty": 20.0},
    {"frequency_penalty": 9.0, "frequency_context_size": 7},
]


@pytest.mark.parametrize("options", PROCESSORS, ids=str)
def test_penalties_of_few_tokens(options):
    """Those of the allowed count, be they seen, biased or neither."""
    head = make_head(230, 32, 8, 6).head
    ids = np.append(np.random.default_rng(0).choice(230, 20, replace=False), [5, 9])
    context = [5, 9, 9, 100, 101, 5, int(ids[0])]
    processors = make_logits_processors(**options)
    x = mx.array(0.35 * random_states(1, 32, 100))
    wanted = head.dense(x)
    for processor in [Fixed(ids, 230), *processors]:
        wanted = processor(mx.array(context), wanted)
    wanted = wanted - mx.logsumexp(wanted)
    for n_probes, places in ((6, set(ids)), (29, set(ids))):
        head.n_probes = n_probes
        choice = masked.choose(
            head,
            read_sampler(None),
            x,
            mx.zeros((2,), mx.uint32),
            allowed(head, [Fixed(ids, 230)], context),
            read_processors(processors, 230),
            context,
        )
        assert choice.tokens.item() == mx.argmax(wanted).item() in places
        assert mx.allclose(choice.logprobs(), wanted, atol=1e-4)


# ---- whole texts -------------------------------------------------------------------


@pytest.fixture(scope="module", params=["untied_folder", "tied_folder"])
def folder(request):
    return request.getfixturevalue(request.param)


def approximate(folder, n_probes=20):
    return load(folder, exact=False, n_probes=n_probes)


@pytest.mark.filterwarnings("ignore:.*are probed at every step")
@pytest.mark.parametrize(
    "n_probes, verify_every, options",
    [(60, 1, {}), (4, 8, {}), (60, 8, PROCESSORS[0]), (60, 8, PROCESSORS[1])],
    ids=str,
)
def test_exact_texts_are_those_of_stock_mlx_lm(folder, n_probes, verify_every, options):
    def made():
        return {"logits_processors": [Fickle(1003), *make_logits_processors(**options)]}

    wanted = text(*stock(folder), n=40, **made())
    patch_decoding()
    with verification() as count:
        got = text(*drafting(folder, n_probes, verify_every), n=40, **made())
    assert [t for t, _ in got] == [t for t, _ in wanted]
    for (_, a), (_, b) in zip(got, wanted):
        assert a.shape == b.shape and mx.allclose(a, b, atol=1e-3)
    if verify_every > 1 and n_probes == 4:
        assert count.acceptance < 1
    elif verify_every > 1:
        assert count.verifications < count.tokens


def test_a_mask_is_asked_once_for_each_position_of_a_draft(untied_folder):
    mask = Fickle(1003)
    with verification() as count:
        tokens(*drafting(untied_folder, 60), n=40, logits_processors=[mask])
    assert len(mask.asked) == count.steps < 60


def test_few_tokens_need_no_dense_product(untied_folder, monkeypatch):
    mask = Fixed(range(100, 130), 1003)
    wanted = tokens(*stock(untied_folder), n=24, logits_processors=[mask])
    patch_decoding()
    model, tokenizer = drafting(untied_folder)
    head = next(flash_heads(model))
    positions = []
    clustered = type(head).clustered
    monkeypatch.setattr(
        type(head),
        "clustered",
        lambda self, x: positions.append(x.shape) or clustered(self, x),
    )
    with verification() as count:
        assert tokens(model, tokenizer, n=24, logits_processors=[mask]) == wanted
    # The prompt's piece is the only one.
    assert len(positions) == 1 and count.acceptance == 1 and count.waste == 0
    assert set(wanted) <= set(range(100, 130))


@pytest.mark.parametrize("options", SAMPLERS[1:], ids=str)
def test_sampled_texts_depend_on_the_seed_alone(untied_folder, options):
    """Not on what is drafted, on how many at once, nor on whether few are scored."""
    texts = {
        tuple(
            tokens(
                *drafting(untied_folder, n_probes, verify_every),
                n=24,
                sampler=make_sampler(**options),
                logits_processors=[Fickle(1003)],
            )
        )
        for n_probes, verify_every in ((120, 1), (90, 4), (20, 16))
    }
    assert len(texts) == 1


@pytest.mark.parametrize("sampler", [None, make_sampler(0.8)])
def test_approximate_texts_keep_to_the_mask(folder, sampler):
    """Where few are allowed, or all clusters are probed, they are the dense head's."""
    mask = Fickle(1003)
    for n_probes in (20, 126):
        model, tokenizer = approximate(folder, n_probes)
        prompt = tokenizer.encode("The quick")
        got = tokens(
            model,
            tokenizer,
            prompt=prompt,
            n=40,
            sampler=sampler,
            logits_processors=[mask],
        )
        for i, token in enumerate(got):
            words = mask.allowed([*prompt, *got[:i]])
            assert words[token // 32] >> token % 32 & 1
    if sampler is None:
        wanted = tokens(
            *load(folder, exact=False, dense=True),
            prompt=prompt,
            n=40,
            logits_processors=[mask],
        )
        assert got == wanted


def test_short_prompts_in_approximate_texts(untied_folder):
    """A piece of one token is no step: nothing is asked for it."""
    mask = Fickle(1003)
    model, tokenizer = approximate(untied_folder)
    tokens(model, tokenizer, prompt=[5, 7], n=3, logits_processors=[mask])
    assert [len(asked) for asked in mask.asked] == [2, 3, 4, 5]


@pytest.mark.parametrize("exact", [True, False])
def test_batches(untied_folder, exact):
    """Each sequence has its mask or none. Exact, texts are those of stock mlx-lm."""
    prompts = [[5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15, 16]]

    def run(model, tokenizer):
        tokenizer.eos_token_ids = {1002}
        generator = generate.BatchGenerator(model, stop_tokens=[[1002]], max_tokens=20)
        masks = [Fickle(1003), None, Fixed([4, 9, 77, 200], 1003)]
        uids = generator.insert(
            prompts, logits_processors=[[m] if m else [] for m in masks]
        )
        made = {uid: [] for uid in uids}
        while responses := generator.next_generated():
            for r in responses:
                made[r.uid].append(r.token)
        generator.close()
        return [made[uid] for uid in uids], masks

    wanted, _ = run(*stock(untied_folder))
    patch_decoding()
    model, tokenizer = load(untied_folder, exact=exact, n_probes=60)
    got, masks = run(model, tokenizer)
    if exact:
        assert got == wanted
    assert set(got[2]) <= {4, 9, 77, 200}
    for i, token in enumerate(got[0]):
        words = masks[0].allowed([*prompts[0], *got[0][:i]])
        assert words[token // 32] >> token % 32 & 1


def test_samplers_and_processors_of_the_users_own_beside_a_mask(folder):
    def own():
        return {
            "sampler": lambda logprobs: mx.random.categorical(logprobs * 1.2),
            "logits_processors": [
                lambda so_far, logits: logits - 0.1 * (mx.arange(1003) % 3),
                Fickle(1003),
            ],
        }

    wanted = tokens(*stock(folder), **own())
    patch_decoding()
    assert tokens(*drafting(folder), **own()) == wanted


def test_two_masks_are_both_kept_to(untied_folder):
    options = {
        "logits_processors": [Fixed(range(500), 1003), Fixed(range(450, 900), 1003)]
    }
    wanted = tokens(*stock(untied_folder), **options)
    assert set(wanted) <= set(range(450, 500))
    patch_decoding()
    assert tokens(*drafting(untied_folder), **options) == wanted


def test_continuations_of_a_tiny_vocabulary_are_as_likely_as_they_should_be(tmp_path):
    """All allowed sequences of three tokens, against the product of the dense head's
    probabilities within the mask."""
    source = small_models.write("llama", tmp_path / "source", 300)
    convert(str(source), tmp_path / "c", cluster_size=4, n_probes=30, verbose=False)
    model, tokenizer = load(tmp_path / "c", exact=True, verify_every=3)
    prompt = tokenizer.encode("ab")
    sampler = make_sampler(0.6, top_k=6)
    of_length = {0: [3, 4, 5], 1: range(200), 2: [7, 250]}

    class ByLength(TokenMask):
        def allowed(self, tokens):
            ids = of_length.get(len(tokens) - len(prompt), range(300))
            return packed(bits_of(list(ids), 300))

    mask = ByLength()

    def step(sequence):
        so_far = [*prompt, *sequence]
        logits = mask(mx.array(so_far), model(mx.array([so_far]))[:, -1])
        return stock_probabilities(sampler, np.array(logits[0]))

    wanted = {}
    for a in np.nonzero(p1 := step([]))[0].tolist():
        for b in np.nonzero(p2 := step([a]))[0].tolist():
            for c in np.nonzero(p3 := step([a, b]))[0].tolist():
                wanted[a, b, c] = p1[a] * p2[b] * p3[c]
    assert len(wanted) == 36 and sum(wanted.values()) == pytest.approx(1)
    order = {sequence: i for i, sequence in enumerate(wanted)}
    options = {"n": 3, "prompt": prompt, "sampler": sampler}
    drawn = [
        tokens(model, tokenizer, seed=i, logits_processors=[mask], **options)
        for i in range(200)
    ]
    places = np.array([order[tuple(sequence)] for sequence in drawn])
    assert p_value(places, np.array(list(wanted.values()))) > 1e-4


# ---- bad input ---------------------------------------------------------------------


class Wrong(TokenMask):
    def __init__(self, words):
        self._words = words

    def allowed(self, tokens):
        return self._words


@pytest.mark.parametrize("way", ["exact", "approximate", "stock"])
@pytest.mark.parametrize(
    "words, says",
    [
        (np.zeros(31, np.uint32), "Wrong.allowed gave uint32 [31] where the model's"),
        (np.ones(32, np.int64), "need uint32 [32]: return one bit for each"),
        (np.zeros(32, np.uint32), "allows no token after 45 tokens, and the text has"),
        (np.full(32, 1 << 11, np.uint32) * (np.arange(32) == 31), "allows no token"),
    ],
)
def test_masks_that_cannot_be_used(untied_folder, way, words, says):
    model, tokenizer = load(untied_folder, exact=way == "exact")
    if way == "stock":
        unpatch()
    n = len(tokenizer.encode("The quick brown fox jumps over the lazy dog"))
    says = says.replace("45", str(n))
    with pytest.raises(ValueError) as caught:
        tokens(model, tokenizer, n=4, logits_processors=[Wrong(words)])
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_masks_that_contradict_each_other(untied_folder):
    masks = [Fixed([1, 2], 1003), Fixed([3], 1003)]
    with pytest.raises(ValueError, match="Fixed and Fixed together allow no token"):
        tokens(*drafting(untied_folder), n=4, logits_processors=masks)


@pytest.mark.parametrize("exact", [True, False])
def test_nothing_is_asked_of_a_mask_at_the_end_of_a_text(untied_folder, exact):
    """mlx-lm takes one step more than it yields."""

    class Ends(TokenMask):
        def allowed(self, tokens):
            bits = np.zeros(1003, bool)
            if tokens[-1] != 77:
                bits[[77, 78] if len(tokens) > 12 else [78]] = True
                bits[78] &= len(tokens) < 16
            return packed(bits)

    model, tokenizer = load(untied_folder, exact=exact, n_probes=20, verify_every=8)
    tokenizer.eos_token_ids = {77}
    from mlx_flashhead.integration.locate import slot_of

    slot_of(model).stop_tokens = frozenset([77])
    made = tokens(model, tokenizer, n=40, prompt=[1, 2, 3], logits_processors=[Ends()])
    assert made[-1] == 77 and set(made[:-1]) == {78} and 10 <= len(made) <= 14


def test_a_draft_that_leads_to_a_dead_end_is_not_the_end(untied_folder):
    """The mask knows nothing that follows a token which only drafts have."""
    model, tokenizer = drafting(untied_folder, 20)
    plain = Fixed(range(1003), 1003)
    wanted = tokens(model, tokenizer, n=30, logits_processors=[plain])
    taken = set()

    class DeadEnds(TokenMask):
        def allowed(self, so_far):
            answer = list(so_far)[n_prompt:]
            ok = answer == wanted[: len(answer)]
            taken.add(ok)
            return packed(np.full(1003, ok))

    n_prompt = len(tokenizer.encode("The quick brown fox jumps over the lazy dog"))
    got = tokens(model, tokenizer, n=30, logits_processors=[DeadEnds()])
    assert got == wanted and taken == {True, False}
