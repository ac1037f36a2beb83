"""Exact decoding in mlx-lm's batches and server: sequences join, leave and end between
steps, and each has the dense head's own text."""

from __future__ import annotations

import importlib
import random
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import mlx_lm
import pytest
import small_models
from mlx_flashhead.convert import convert
from mlx_lm.models import cache as caches
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from test_exact import PROMPT, SAMPLERS, drafting, stock, tokens
from test_server import chat, complete, serving

from mlx_flashhead import flash_heads, patch_decoding
from mlx_flashhead.integration import exact, exact_batch
from mlx_flashhead.integration.exact import verification
from mlx_flashhead.integration.locate import slot_of

generate = importlib.import_module("mlx_lm.generate")
# So few are probed that drafts are often undone.
pytestmark = pytest.mark.filterwarnings("ignore:.*are probed at every step")

PROMPTS = [PROMPT, "Jackdaws love my big", "Pack my box", "How vexingly quick", "Sphi"]


def varied_gemma(folder):
    """A Gemma whose rotating caches are full soon, and which does not only repeat its
    last token, as random tied models do: its layers add more than the embedding is."""
    source = small_models.write("gemma3_text", folder, 603, seed=3, sliding_window=16)
    file = str(source / "model.safetensors")
    weights, metadata = mx.load(file, return_metadata=True)
    for name, weight in weights.items():
        if name.endswith(
            ("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")
        ):
            weights[name] = weight + 30
    mx.eval(weights)
    mx.save_safetensors(file, weights, metadata)
    return source


@pytest.fixture(scope="module", params=["llama", "gemma3_text", "qwen3"])
def converted(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exact")
    if request.param == "gemma3_text":
        source = varied_gemma(folder / "source")
    else:
        source = small_models.write(request.param, folder / "source", 603)
    target = folder / "converted"
    convert(str(source), target, cluster_size=8, n_probes=40, verbose=False)
    return target


class Run:
    """A ``BatchGenerator`` whose sequences come and go at steps that are laid down.

    Args:
        inserts: For each sequence its step and its options for ``insert``; the prompt
          is that of its number.
        removes: Step at which a sequence is removed, by its number.
        reads: Steps before which all caches are extracted.
    """

    def __init__(self, model, tokenizer, inserts, removes=None, reads=(), **options):
        self.made = {i: [] for i in range(len(inserts))}
        self.logprobs = {i: [] for i in range(len(inserts))}
        self.ends, self.caches, self.extracted = {}, {}, []
        numbers = {}  # of the sequences, by uid
        batch = generate.BatchGenerator(model, **options)
        step = 0
        while step <= max(at for at, _ in inserts) or len(numbers) > len(self.ends):
            for i, (at, own) in enumerate(inserts):
                if at == step:
                    prompt = tokenizer.encode(PROMPTS[i])
                    own = {k: [v] for k, v in ({"max_tokens": 12} | own).items()}
                    (uid,) = batch.insert([prompt], **own)
                    numbers[uid] = i
            if step in reads:
                found = batch.extract_cache([u for u in numbers if u not in self.ends])
                self.extracted += [(c, list(t)) for c, t in found.values()]
            for uid, i in numbers.items():
                if (removes or {}).get(i) == step and uid not in self.ends:
                    found = batch.remove([uid], return_prompt_caches=True)
                    self.caches[i] = [(c, list(t)) for c, t in found.values()]
                    self.ends[uid] = "removed"
            for r in batch.next()[1]:
                i = numbers[r.uid]
                self.made[i].append(r.token)
                self.logprobs[i].append(r.logprobs)
                if r.finish_reason is not None:
                    self.ends[r.uid] = r.finish_reason
                    self.caches[i] = [(r.prompt_cache, list(r.all_tokens))]
            step += 1
        batch.close()

    def assert_equals(self, wanted, atol=1e-3):
        assert self.made == wanted.made and self.ends == wanted.ends
        for i, rows in self.logprobs.items():
            for a, b in zip(rows, wanted.logprobs[i], strict=True):
                assert a.shape == b.shape and mx.allclose(a, b, atol=atol)
        assert self.caches.keys() == wanted.caches.keys()
        for i, found in self.caches.items():
            same_extracts(found, wanted.caches[i])
        same_extracts(self.extracted, wanted.extracted)


def same_extracts(found, wanted):
    """Caches that were extracted, and the tokens that they hold."""
    for (got, of), (want, wanted_of) in zip(found, wanted, strict=True):
        assert of == wanted_of
        for a, b in zip(got, want, strict=True):
            assert type(a) is type(b) and a.offset == b.offset
            if b.keys is None:
                assert a.keys is None
                continue
            assert a.keys.shape == b.keys.shape
            assert getattr(a, "_idx", None) == getattr(b, "_idx", None)
            assert mx.allclose(a.keys, b.keys, atol=1e-4)
            assert mx.allclose(a.values, b.values, atol=1e-4)


def both(folder, *args, n_probes=25, verify_every=8, **options):
    """The same by stock mlx-lm with the dense head, and exactly."""
    wanted = Run(*stock(folder), *args, **options)
    patch_decoding()
    return Run(*drafting(folder, n_probes, verify_every), *args, **options), wanted


# ---- one sequence ------------------------------------------------------------------


@pytest.mark.parametrize("n_probes", [20, 30])
@pytest.mark.parametrize("verify_every", [1, 3, 16])
def test_one_sequence_is_drafted_and_has_stock_mlx_lms_text(
    converted, n_probes, verify_every
):
    one = [(0, {"max_tokens": 60})]
    with verification() as count:
        got, wanted = both(converted, one, n_probes=n_probes, verify_every=verify_every)
    got.assert_equals(wanted)
    assert count.tokens >= 60
    if verify_every == 1:
        assert count.verifications == count.tokens
    elif n_probes == 20:
        assert count.acceptance < 1  # so that something was undone
    else:
        assert count.verifications < count.tokens / 2


def test_batch_generate_of_one_prompt(untied_folder):
    texts = []
    for load in (stock, drafting):
        model, tokenizer = load(untied_folder)
        answer = mlx_lm.batch_generate(
            model,
            tokenizer,
            [tokenizer.encode(PROMPT)],
            max_tokens=30,
            return_prompt_caches=True,
            return_logprobs=True,
            return_token_ids=True,
        )
        texts.append(answer)
    wanted, got = texts
    assert got.texts == wanted.texts and got.token_ids == wanted.token_ids
    assert got.logprobs[0] == pytest.approx(wanted.logprobs[0], abs=1e-4)
    same_extracts([(got.caches[0], 0)], [(wanted.caches[0], 0)])


@pytest.mark.parametrize("options", SAMPLERS[1:], ids=str)
def test_a_seeds_text_depends_on_it_alone(untied_folder, options):
    """Nor on whether ``generate`` or a batch writes it."""

    def written(n_probes, verify_every, seed=3):
        model, tokenizer = drafting(untied_folder, n_probes, verify_every)
        mx.random.seed(seed)
        one = [(0, {"max_tokens": 24, "samplers": make_sampler(**options)})]
        return Run(model, tokenizer, one).made[0]

    texts = {tuple(written(p, k)) for p, k in ((120, 1), (90, 4), (90, 16), (30, 4))}
    model, tokenizer = drafting(untied_folder)
    texts.add(tuple(tokens(model, tokenizer, n=24, sampler=make_sampler(**options))))
    assert len(texts) == 1
    assert tuple(written(90, 4, seed=4)) not in texts


def own_functions():
    """A sampler and a processor that nobody knows, and what they were called with."""
    seen = []

    def processor(so_far, logits):
        seen.append((so_far.dtype, so_far.tolist()))
        return logits - 0.1 * (mx.arange(logits.shape[-1]) % 3)

    def sampler(logprobs):
        return mx.random.categorical(logprobs * 1.2)

    return {"samplers": sampler, "logits_processors": [processor]}, seen


def test_unknown_samplers_and_processors_are_called_as_by_stock_mlx_lm(converted):
    """In order, once for each token: the same seed gives the same text."""
    runs = []
    for load in (stock, drafting):
        mx.random.seed(5)
        options, seen = own_functions()
        run = Run(*load(converted), [(0, {"max_tokens": 30} | options)])
        runs.append((run, seen))
    (wanted, wanted_calls), (got, calls) = runs
    got.assert_equals(wanted)
    # mlx-lm makes one token more than it hands out; drafts go on a little further.
    assert calls[:31] == wanted_calls and len(calls) < 31 + 8


PENALTIES = {
    "repetition_penalty": 4.0,
    "frequency_penalty": 2.0,
    "logit_bias": {5: 3.0, 7: -4.0},
}


def test_known_processors(converted):
    made = make_logits_processors(**PENALTIES)
    got, wanted = both(converted, [(0, {"max_tokens": 30, "logits_processors": made})])
    got.assert_equals(wanted)
    assert wanted.made[0] != Run(*stock(converted), [(0, {})]).made[0]


def stops(*sequences):
    return generate.StopSequences([list(s) for s in sequences])


@pytest.mark.parametrize("at", range(2, 15, 3))
def test_stop_sequences_end_in_the_middle_of_a_chunk(converted, at):
    plain = Run(*stock(converted), [(0, {"max_tokens": 20})]).made[0]
    for length in (1, 2):
        stop = stops(plain[at - length : at])
        one = [(0, {"max_tokens": 20, "stop_sequences": stop})]
        got, wanted = both(converted, one)
        got.assert_equals(wanted)
        assert "stop" in wanted.ends.values() and len(wanted.made[0]) <= at


def test_a_cache_that_cannot_be_rolled_back_is_decoded_densely(
    untied_folder, monkeypatch
):
    monkeypatch.setattr(exact, "supported", lambda cache: False)
    with verification() as count:
        got, wanted = both(untied_folder, [(0, {"max_tokens": 20})])
    got.assert_equals(wanted)
    assert count.steps == 0


# ---- several -----------------------------------------------------------------------

STEPS = range(13)


@pytest.fixture(scope="module")
def texts_alone(converted):
    """Stock mlx-lm's text of each prompt alone."""
    model, tokenizer = stock(converted)
    return [
        tokens(model, tokenizer, n=12, prompt=tokenizer.encode(prompt))
        for prompt in PROMPTS
    ]


@pytest.mark.parametrize("step", STEPS)
def test_a_sequence_joins_at_any_step_and_the_first_ends(converted, texts_alone, step):
    """And then the second is alone, and drafted."""
    inserts = [(0, {}), (step, {"max_tokens": 26})]
    with verification() as count:
        got, wanted = both(converted, inserts)
    got.assert_equals(wanted)
    assert got.made[0] == texts_alone[0] and got.made[1][:12] == texts_alone[1]
    assert 0 < count.verifications < count.tokens


@pytest.mark.parametrize("step", STEPS)
def test_a_sequence_leaves_at_any_step(converted, texts_alone, step):
    inserts = [(0, {}), (2, {"max_tokens": 26}), (3, {})]
    for leaving in (0, 1):
        got, wanted = both(converted, inserts, {leaving: step, 2: step + 4})
        got.assert_equals(wanted)
        for i, made in got.made.items():
            assert made[:12] == texts_alone[i][: len(made)]


@pytest.mark.parametrize("reads", [range(40), range(3, 40, 3)], ids=str)
def test_caches_that_are_read_between_steps_are_stock_mlx_lms(converted, reads):
    got, wanted = both(converted, [(0, {"max_tokens": 30})], reads=reads)
    got.assert_equals(wanted)
    assert got.extracted


@pytest.mark.parametrize("seed", range(6))
def test_any_schedule(converted, texts_alone, seed):
    """With processors of every kind, whose contexts count on from where others left."""
    rng = random.Random(seed)

    def inserts():
        own, seen = own_functions()
        options = [
            {},
            {"logits_processors": make_logits_processors(**PENALTIES)},
            {"logits_processors": own["logits_processors"]},
            {"samplers": lambda x: mx.argmax(x, axis=-1)},
            {"logits_processors": make_logits_processors(presence_penalty=5.0)},
        ]
        return [
            (at, {"max_tokens": n} | each)
            for at, n, each in zip(steps, lengths, options, strict=True)
        ], seen

    steps = [0, *(rng.randrange(30) for _ in range(4))]
    lengths = [rng.randrange(1, 30) for _ in range(5)]
    removes = {rng.randrange(5): rng.randrange(40) for _ in range(2)}
    reads = [rng.randrange(40) for _ in range(3)]
    runs = []
    for load in (stock, drafting):
        given, seen = inserts()
        runs.append((Run(*load(converted), given, removes, reads), seen))
    (wanted, wanted_calls), (got, calls) = runs
    got.assert_equals(wanted)
    for i in (0, 3):
        assert got.made[i][:12] == texts_alone[i][: len(got.made[i])]
    # The one sequence's processor: called once for each of its tokens.
    assert calls[: len(wanted_calls)] == wanted_calls


@pytest.mark.parametrize("options", SAMPLERS[1::2], ids=str)
def test_a_seeds_text_does_not_depend_on_who_else_is_there(untied_folder, options):
    def written(step, n_probes=90, verify_every=8):
        model, tokenizer = drafting(untied_folder, n_probes, verify_every)
        mx.random.seed(3)
        inserts = [(0, {"samplers": make_sampler(**options)})]
        if step is not None:
            other = make_sampler(0.9, top_p=0.8)
            inserts += [(step, {"samplers": s}) for s in (other, make_sampler(1.0))]
            inserts += [(step + 2, {})]
        return Run(model, tokenizer, inserts).made

    alone = written(None)[0]
    for step in (0, 1, 4, 7):
        runs = [written(step), written(step, 60, 3)]
        assert runs[0] == runs[1] and runs[0][0] == alone
    assert runs[0][1] != runs[0][2]


def test_rows_of_equal_prompts_differ(untied_folder):
    model, tokenizer = drafting(untied_folder)
    texts = mlx_lm.batch_generate(
        model,
        tokenizer,
        [tokenizer.encode(PROMPT)] * 4,
        max_tokens=8,
        sampler=make_sampler(2.0),
    ).texts
    assert len(set(texts)) == 4


def test_an_unknown_sampler_that_all_share_is_called_once(untied_folder):
    """As by stock mlx-lm: the same seed gives the same texts."""
    runs = []
    for load in (stock, drafting):
        model, tokenizer = load(untied_folder)
        mx.random.seed(5)
        sampler = own_functions()[0]["samplers"]
        prompts = [tokenizer.encode(p) for p in PROMPTS]
        runs.append(
            mlx_lm.batch_generate(
                model, tokenizer, prompts, max_tokens=8, sampler=sampler
            ).texts
        )
    assert runs[0] == runs[1]


def test_an_extracted_cache_is_trimmed_and_continued(converted):
    """As the server's cache of prompts does."""
    ends = []
    for load in (stock, drafting):
        model, tokenizer = load(converted)
        (cache, held) = Run(model, tokenizer, [(0, {"max_tokens": 9})]).caches[0][0]
        if caches.can_trim_prompt_cache(cache):
            caches.trim_prompt_cache(cache, 4)
            held = held[:-4]
        batch = generate.BatchGenerator(model)
        batch.insert([[65, 66]], [30], caches=[cache], all_tokens=[held])
        made = []
        while responses := batch.next_generated():
            made += [r.token for r in responses]
        batch.close()
        ends.append((made, held))
    assert ends[0] == ends[1] and len(ends[0][0]) == 30


# ---- interruptions -----------------------------------------------------------------


@pytest.mark.parametrize("goes_on", [True, False])
def test_an_interruption_leaves_the_batch_at_what_was_served(
    converted, monkeypatch, goes_on
):
    wanted = Run(*stock(converted), [(0, {"max_tokens": 40})]).made[0]
    patch_decoding()
    model, tokenizer = drafting(converted)
    clustered = type(next(flash_heads(model))).clustered
    calls = []

    def interrupted(head, x):
        calls.append(len(x))
        if len(calls) == 5:  # a chunk of several, whose steps were taken
            assert len(x) > 1
            raise KeyboardInterrupt
        return clustered(head, x)

    monkeypatch.setattr(type(next(flash_heads(model))), "clustered", interrupted)
    batch = generate.BatchGenerator(model)
    prompt = tokenizer.encode(PROMPT)
    (uid,) = batch.insert([prompt], [40])
    made = []
    with pytest.raises(KeyboardInterrupt):
        while responses := batch.next_generated():
            made += [r.token for r in responses]
    assert made == wanted[: len(made)] and made
    if not goes_on:
        cache, held = batch.remove([uid], return_prompt_caches=True)[uid]
        assert held == prompt + made and cache[0].offset == len(held)
        batch.close()
        return
    while responses := batch.next_generated():
        made += [r.token for r in responses]
    batch.close()
    assert made == wanted


def test_a_generation_that_is_abandoned_disturbs_nobody(untied_folder):
    """Nobody takes its caches; the model has no state."""
    model, tokenizer = drafting(untied_folder)
    batch = generate.BatchGenerator(model)
    batch.insert([tokenizer.encode(PROMPT)], [40])
    for _ in range(6):
        batch.next()
    batch.close()
    got, wanted = both(untied_folder, [(0, {})])
    got.assert_equals(wanted)


def test_decoding_that_changes_in_the_middle(untied_folder):
    """The caches are as another decoding needs them, and what was verified is
    forgotten."""
    wanted = Run(*stock(untied_folder), [(0, {"max_tokens": 30})]).made[0]
    patch_decoding()
    model, tokenizer = drafting(untied_folder)
    slot = slot_of(model)
    batch = generate.BatchGenerator(model)
    batch.insert([tokenizer.encode(PROMPT)], [30])
    made = []
    while responses := batch.next_generated():
        made += [r.token for r in responses]
        slot.decoding = "dense" if len(made) % 8 < 3 else "exact"
    batch.close()
    assert made == wanted


# ---- the server --------------------------------------------------------------------


@pytest.fixture(scope="module")
def servers(untied_folder, tmp_path_factory):
    """Exact with few probes, and dense."""
    log = tmp_path_factory.mktemp("servers")
    few = ("--n-probes", "40", "--verify-every", "8")
    exact_words = ("mlx_flashhead.server", *few, "--model", str(untied_folder))
    dense_words = ("mlx_flashhead.server", "--dense", "--model", str(untied_folder))
    with (
        serving(*exact_words, log=log / "exact") as ours,
        serving(*dense_words, log=log / "dense") as dense,
    ):
        yield ours, dense


def entries(answer):
    return [
        (e["id"], [t["id"] for t in e["top_logprobs"]], e["logprob"])
        for e in (e.model_dump() for e in answer.choices[0].logprobs.content)
    ]


def test_the_servers_single_stream_is_the_dense_heads(servers):
    ours, dense = servers
    for n in (1, 2, 24):
        asked = {"n": n, "logprobs": True, "top_logprobs": 3}
        got, wanted = chat(ours, **asked), chat(dense, **asked)
        assert got.choices[0].message.content == wanted.choices[0].message.content
        assert got.usage.completion_tokens == wanted.usage.completion_tokens == n
        for a, b in zip(entries(got), entries(wanted), strict=True):
            assert a[:2] == b[:2] and a[2] == pytest.approx(b[2], abs=1e-4)


def test_the_servers_stream_and_its_prompt_cache(servers):
    """The second request continues from the cache that the first has left."""
    answers = []
    for client in servers:
        pieces = list(complete(client, "Once more", 24, stream=True))
        text = "".join(p.choices[0].text for p in pieces)
        again = complete(client, "Once more" + text, 24)
        only_x = {"logit_bias": {"88": 100}, "stop": ["X" * 7]}
        stopped = complete(client, "Once more", 24, **only_x)
        answers.append(
            (
                text,
                again.choices[0].text,
                again.usage.prompt_tokens_details.cached_tokens,
                stopped.choices[0].text,
                stopped.choices[0].finish_reason,
            )
        )
    assert answers[0] == answers[1]
    assert answers[0][2] > 0 and answers[0][4] == "stop"


def test_clients_of_the_server_that_come_and_go(servers):
    texts = [f"Client {i}" for i in range(6)]
    lengths = [30, 4, 17, 9, 24, 12]
    ours, dense = servers
    wanted = [
        complete(dense, text, n).choices[0].text for text, n in zip(texts, lengths)
    ]
    with ThreadPoolExecutor(3) as pool:
        got = pool.map(lambda a: complete(ours, *a), zip(texts, lengths))
        assert [answer.choices[0].text for answer in got] == wanted


# ---- what would be wrong -----------------------------------------------------------


@pytest.mark.parametrize("method", ["extend", "extract_cache"])
def test_caches_that_are_not_settled_are_noticed(untied_folder, monkeypatch, method):
    inserts = [(0, {"max_tokens": 30}), (11, {"max_tokens": 30})]
    # In the middle of a chunk the second joins; alone again, its cache is read.
    schedule = {"removes": {0: 16}, "reads": (24,)}
    wanted = Run(*stock(untied_folder), inserts, **schedule)
    patch_decoding()
    model, tokenizer = drafting(untied_folder, 90)
    Run(model, tokenizer, inserts, **schedule).assert_equals(wanted)
    settled = getattr(generate.GenerationBatch, method)

    def careless(self, *args):
        with monkeypatch.context() as patch:
            patch.setattr(exact_batch, "settle", lambda batch: None)
            return settled(self, *args)

    monkeypatch.setattr(generate.GenerationBatch, method, careless)
    with pytest.raises((AssertionError, ValueError)):
        Run(model, tokenizer, inserts, **schedule).assert_equals(wanted)


@pytest.mark.parametrize("forgets", [False, True])
def test_what_is_verified_when_another_joins_is_not_chosen_again(
    untied_folder, monkeypatch, forgets
):
    """A processor that keeps a state would notice."""
    patch_decoding()
    if forgets:
        monkeypatch.setattr(exact.ExactDecoder, "due", None)
    model, tokenizer = drafting(untied_folder, 90, 16)
    own, seen = own_functions()
    own["samplers"] = make_sampler()
    Run(model, tokenizer, [(0, {"max_tokens": 20} | own), (11, {"max_tokens": 3})])
    lengths = [len(context) for _, context in seen]
    first = len(tokenizer.encode(PROMPT))
    assert (lengths == list(range(first, first + len(lengths)))) != forgets
