"""Centroids, calibrated bonuses, the tail and fidelity against naive float64."""

from __future__ import annotations

import json

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import small_models
from mlx_flashhead.convert import calibrate, centroids, collect, pack, statistics
from mlx_flashhead.convert.clustering import cluster, directions
from mlx_flashhead.convert.collect import CalibrationError, States, read_documents
from mlx_flashhead.convert.pipeline import build_head
from mlx_flashhead.convert.recipes import RECIPES
from small_heads import implied, unpack

from mlx_flashhead import FlashHead
from mlx_flashhead.compute import linalg
from mlx_flashhead.compute.table import Table
from mlx_flashhead.evaluation.fidelity import measure, n_blocks
from mlx_flashhead.evaluation.states import hidden_states
from mlx_flashhead.head import ALWAYS
from mlx_flashhead.integration.locate import find_head

V, D, M = 299, 32, 8


class Case:
    """A head over weights that are known, and states that it is calibrated on."""

    def __init__(self, bias: bool = False, head_bits: int = 8, **options):
        rng = np.random.default_rng(1)
        self.weight = rng.standard_normal((V, D)).astype(np.float32)
        self.weight *= np.exp(0.5 * rng.standard_normal((V, 1))).astype(np.float32)
        self.bias = rng.standard_normal(V).astype(np.float32) if bias else None
        self.states = rng.standard_normal((240, D)).astype(np.float32) * 0.7
        self.fresh = rng.standard_normal((60, D)).astype(np.float32) * 0.7
        self.clusters = cluster(
            directions(self.weight, None), M, always=np.arange(16), seed=2
        )
        options = {"centroid_bits": 4, "group_size": 32, "n_probes": 6} | options
        self.packed = pack.pack(
            self.clusters,
            Table(mx.array(self.weight), bits=32),
            self.weight,
            centroids.mean_centroids(self.clusters, self.weight),
            bias=self.bias,
            head_bits=head_bits,
            **options,
        )

    def statistics(self, states: np.ndarray | None = None) -> statistics.Statistics:
        states = self.states if states is None else states
        return statistics.gather(self.clusters, self.weight, states, bias=self.bias)

    def head(self, **options) -> FlashHead:
        return calibrate.calibrate(
            self.packed,
            self.clusters,
            self.weight,
            self.statistics(),
            bias=self.bias,
            **options,
        )

    def logits(self, states: np.ndarray) -> np.ndarray:
        """The dense head's, float64 ``[n, V]``."""
        bias = 0.0 if self.bias is None else self.bias.astype(np.float64)
        return states.astype(np.float64) @ self.weight.T.astype(np.float64) + bias

    def members(self) -> list[np.ndarray]:
        return [row[row < V] for row in self.clusters.token_ids]

    def scores(self, head: FlashHead, states: np.ndarray) -> np.ndarray:
        """What the stored centroids give, float64 ``[n, C]``."""
        means = states.astype(np.float64) @ unpack(head.centroids).T
        if self.bias is None:
            return means
        return means + [self.bias[m].astype(np.float64).mean() for m in self.members()]


@pytest.fixture(scope="module", params=[False, True], ids=["no bias", "bias"])
def case(request) -> Case:
    return Case(bias=request.param)


@pytest.mark.parametrize("bias", [False, True])
def test_the_centroid_gives_the_exact_mean_logit(bias):
    case = Case(bias, head_bits=32, centroid_bits=32)
    assert V % M  # the last cluster is not full
    found = np.array(case.packed.centroid_logits(mx.array(case.fresh)))
    logits = case.logits(case.fresh)
    wanted = np.stack([logits[:, m].mean(1) for m in case.members()], axis=1)
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_fitted_centroids_are_the_ridge_regression_of_the_log_mass(case):
    found = case.statistics().fitted
    mean = centroids.mean_centroids(case.clusters, case.weight)
    logits = case.logits(case.states)
    x = case.states.astype(np.float64)
    x = x - x.mean(0)
    # The ridge as D more states, of the mean length and in all directions alike.
    more = np.sqrt((x**2).sum(1).mean()) * np.eye(D)
    for c, members in enumerate(case.members()):
        mass = np.log(np.exp(logits[:, members]).sum(1))
        lacking = mass - case.states @ mean[c]
        target = np.r_[lacking - lacking.mean(), np.zeros(D)]
        wanted = np.linalg.lstsq(np.r_[x, more], target, rcond=None)[0]
        np.testing.assert_allclose(found[c] - mean[c], wanted, atol=1e-4)


@pytest.mark.parametrize("n", [1, 5])
def test_few_states_change_centroids_little(case, n):
    found = case.statistics(case.states[:n]).fitted
    mean = centroids.mean_centroids(case.clusters, case.weight)
    assert np.isfinite(found).all()
    change = np.linalg.norm(found - mean, axis=1) / np.linalg.norm(mean, axis=1)
    assert np.median(change) < 0.5
    if n == 1:
        np.testing.assert_allclose(found, mean, atol=1e-5)


def test_unit_centroids_are_directions_of_summed_directions(case):
    found = centroids.unit_centroids(case.clusters, case.weight)
    unit = case.weight / np.linalg.norm(case.weight, axis=1, keepdims=True)
    for centroid, members in zip(found, case.members()):
        total = unit[members].sum(0)
        np.testing.assert_allclose(centroid, total / np.linalg.norm(total), atol=1e-5)


def test_packing_keeps_rows_and_order(case):
    head = case.packed
    assert np.array_equal(np.array(head.token_ids), case.clusters.token_ids)
    rows = unpack(head.rows)
    for row, members in zip(rows, case.members()):
        step = np.ptp(case.weight[members].reshape(-1, D), axis=1) / 255
        error = np.abs(row[: len(members)] - case.weight[members]).max(1)
        assert (error <= 1.01 * step).all()
    if case.bias is not None:
        stored = np.array(head.bias).reshape(-1)[:V]
        assert np.array_equal(stored, case.bias[case.clusters.order])


def test_bonus_is_mean_plus_deviation_of_the_best_logit_over_the_score(case):
    head = case.head()
    logits, scores = case.logits(case.states), case.scores(head, case.states)
    spread = np.array(head.spread)
    assert (spread[:2] == np.float32(ALWAYS)).all()
    for c, members in enumerate(case.members()):
        above = logits[:, members].max(1) - scores[:, c]
        if c >= 2:
            np.testing.assert_allclose(spread[c], above.mean() + above.std(), rtol=1e-3)


@pytest.mark.parametrize("i", range(len(statistics.TEMPERATURES)))
def test_excess_is_the_mean_log_mass_over_the_score(case, i):
    head, t = case.head(), statistics.TEMPERATURES[i]
    assert head.temperatures[i] == t
    logits, scores = case.logits(case.states) / t, case.scores(head, case.states) / t
    for c, members in enumerate(case.members()):
        best = logits[:, members].max(1)
        mass = best + np.log(np.exp(logits[:, members] - best[:, None]).mean(1))
        wanted = (mass - scores[:, c]).mean()
        np.testing.assert_allclose(np.array(head.excess)[i, c], wanted, atol=2e-3 / t)


def test_the_paper_has_no_bonus(case):
    spread = np.array(case.head(use_spread=False).spread)
    assert (spread[2:] == 0).all()
    assert np.abs(np.array(case.head().spread)[2:]).min() > 0


def test_calibration_is_repeatable(case):
    a, b = case.head(), case.head()
    for name in ("spread", "excess"):
        assert mx.array_equal(a[name], b[name])
    assert a.tail_offset == b.tail_offset


# ---------------------------------------------------------------------------
# Fidelity
# ---------------------------------------------------------------------------


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64) - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def naive_kl(case: Case, head: FlashHead, states: np.ndarray) -> np.ndarray:
    """KL(dense || FlashHead) from what ``head(x)`` returns."""
    p = log_softmax(case.logits(states))
    q = log_softmax(np.array(head(mx.array(states)[:, None]))[:, 0])
    return (np.exp(p) * (p - q)).sum(1)


def one_by_one(head: FlashHead, states: np.ndarray, f) -> np.ndarray:
    """Large batches go dense, so states are given to the head a few at a time."""
    starts = range(0, len(states), 2)
    return np.concatenate([f(head, states[i : i + 2]) for i in starts])


@pytest.fixture(params=["numpy", "mlx"])
def arrays(request, monkeypatch):
    """Large arrays in NumPy's hands, as on a CPU, or MLX's, as on a GPU."""
    monkeypatch.setattr(linalg, "on_gpu", lambda: request.param == "mlx")


def test_calibration_is_the_same_in_either_hands(case, monkeypatch):
    plain = case.head()
    monkeypatch.setattr(linalg, "on_gpu", lambda: True)
    other = case.head()
    for name in ("spread", "excess"):
        np.testing.assert_allclose(
            np.array(plain[name]), np.array(other[name]), rtol=1e-3, atol=1e-3
        )
    np.testing.assert_allclose(plain.tail_offset, other.tail_offset, atol=1e-3)


def test_measure_equals_a_naive_comparison(case, arrays):
    head = case.head()
    assert head.rows_read(2) < V
    logits = case.logits(case.fresh)
    best = logits.argmax(1)
    found = measure(head, case.weight, case.fresh, bias=case.bias, details=True)
    ids = np.array(head.candidates(mx.array(case.fresh)).ids)
    recall = (ids == best[:, None]).any(1)
    assert 0 < recall.mean() < 1
    assert np.array_equal(found.recall, recall)
    probability = np.exp(log_softmax(logits))
    mass = [probability[i, ids[i][ids[i] < V]].sum() for i in range(len(ids))]
    np.testing.assert_allclose(found.probed_mass, mass, atol=1e-5)

    def choices(head, x):
        found = head.candidates(mx.array(x))
        at = mx.argmax(found.logits, axis=-1)[:, None]
        return np.array(mx.take_along_axis(found.ids, at, axis=-1))[:, 0]

    agreement = one_by_one(head, case.fresh, choices) == best
    assert np.array_equal(found.agreement, agreement)
    kl = one_by_one(head, case.fresh, lambda h, x: naive_kl(case, h, x))
    mine = found.kl() + found.at[1.0].equal_shares
    np.testing.assert_allclose(mine, kl, atol=1e-4)
    assert (kl > -1e-6).all()


@pytest.mark.parametrize("temperature", [0.4, 0.9, 1.0, 1.7])
def test_measure_knows_the_distribution_that_sampling_implies(
    case, arrays, temperature
):
    head = case.head()
    p = np.exp(log_softmax(case.logits(case.fresh) / temperature))
    q = implied(head, case.fresh, temperature)
    np.testing.assert_allclose(q.sum(1), 1, atol=1e-6)
    found = measure(
        head,
        case.weight,
        case.fresh,
        bias=case.bias,
        temperatures=(temperature, 1.0),
        details=True,
    ).at[temperature]
    kl = (p * np.log(p / q)).sum(1)
    np.testing.assert_allclose(found.kl(), kl, atol=2e-4)
    np.testing.assert_allclose(
        found.total_variation, np.abs(p - q).sum(1) / 2, atol=1e-4
    )


def test_measure_does_not_depend_on_blocks(case, monkeypatch):
    head = case.head()
    whole = measure(head, case.weight, case.fresh, bias=case.bias)
    monkeypatch.setattr(linalg, "BLOCK", 7 * len(case.clusters.token_ids) * M)
    steps = []
    parts = measure(
        head, case.weight, case.fresh, bias=case.bias, step=lambda: steps.append(1)
    )
    assert len(steps) == n_blocks(head, len(case.fresh)) == 9
    assert np.array_equal(whole.recall, parts.recall)
    np.testing.assert_allclose(whole.kl(), parts.kl(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.55, 1.0, 1.4])
def test_the_tail_offset_has_the_least_divergence(case, temperature):
    head = case.head()
    i = statistics.TEMPERATURES.index(temperature)
    fitted = head.tail_offset
    temperatures = {"temperatures": (temperature, 1.0), "bias": case.bias}

    def at(states):
        return measure(head, case.weight, states, **temperatures).at[temperature]

    head.tail_offset = (0.0,) * len(fitted)
    found = at(case.states[:: calibrate.TAIL_STRIDE])
    best = found.fit_shift()
    grid = best + np.linspace(-2, 2, 401)
    divergences = [found.kl(b).mean() for b in grid]
    assert abs(grid[np.argmin(divergences)] - best) < 0.011
    assert np.isclose(fitted[i], best, atol=1e-3)
    # An offset is a shift of the same size.
    fresh = at(case.fresh[:20])
    head.tail_offset = tuple(best + 1 if j == i else 0.0 for j in range(len(fitted)))
    np.testing.assert_allclose(at(case.fresh[:20]).kl(), fresh.kl(best + 1), atol=1e-4)


def test_probing_everything_is_the_dense_head():
    case = Case(head_bits=32, n_probes=-(-V // M))
    head = case.head()
    found = measure(head, case.weight, case.fresh)
    assert found.recall.all() and found.agreement.all()
    np.testing.assert_allclose(found.probed_mass, 1, atol=1e-6)
    np.testing.assert_allclose(found.kl(), 0, atol=1e-5)
    assert np.isfinite(head.tail_offset).all()


def test_recipes_differ_where_they_should(case):
    states = States(case.states, case.fresh)
    table = Table(mx.array(case.weight), bits=32)
    heads = {
        name: build_head(
            table,
            case.weight,
            None,
            states,
            RECIPES[name],
            group_size=32,
            cluster_size=M,
            n_probes=20,
        )
        for name in RECIPES
    }
    paper = unpack(heads["paper"].centroids)
    assert np.allclose(np.linalg.norm(paper, axis=1), 1, atol=0.15)
    assert (np.array(heads["paper"].spread) == 0).all()
    assert (np.array(heads["default"].spread) != 0).all()


# ---------------------------------------------------------------------------
# Texts
# ---------------------------------------------------------------------------


def test_second_moment():
    h = np.random.default_rng(0).standard_normal((70, 5)).astype(np.float32)
    found = States(h, h[:0]).second_moment()
    wanted = h.T.astype(np.float64) @ h / 70
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_built_in_text_is_of_several_domains():
    documents = read_documents(None)
    assert len(documents) >= 5 * collect.HOLD_OUT
    assert sum(map(len, documents)) > 20_000
    text = "".join(documents)
    assert any("\u4e00" <= c <= "\u9fff" for c in text)
    assert "def " in text


def test_texts_that_are_read_side_by_side_are_each_its_own(tmp_path):
    small_models.write("llama", tmp_path / "source")
    model, _ = mlx_lm.load(str(tmp_path / "source"))
    rng = np.random.default_rng(0)
    lengths = (40, 17, 40, 300, 40, 40, 40, 17, 600, 2)
    texts = [rng.integers(5, 90, n).tolist() for n in lengths]
    path = find_head(model)
    found = collect.read(model, path, texts)
    for text, own in zip(texts, found, strict=True):
        assert len(own) == len(text) - 1
        np.testing.assert_allclose(own, hidden_states(model, path, text), atol=2e-4)


def test_text_files_are_split_at_blank_lines(tmp_path):
    file = tmp_path / "text.txt"
    paragraphs = [f"{i} " + "word " * 250 for i in range(12)]
    file.write_text("\n\n".join(paragraphs))
    documents = read_documents(file)
    assert len(documents) == 12
    assert [d.strip() for d in documents] == [p.strip() for p in paragraphs]
    file.write_text("\n\n".join(["short paragraph here"] * 400))
    joined = read_documents(file)
    assert 5 <= len(joined) < 20
    assert sum(d.count("short") for d in joined) == 400


def test_json_lines(tmp_path):
    file = tmp_path / "text.jsonl"
    # Strings in JSON may hold what Python takes for line breaks, raw.
    texts = [f"{i} é\u2028\x85 \n" + "x" * 1200 for i in range(6)]
    lines = [json.dumps({"text": t, "n": 1}, ensure_ascii=False) for t in texts]
    file.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    assert read_documents(file) == texts


@pytest.mark.parametrize(
    "name, content, complaint",
    [
        ("missing.txt", None, "No such file"),
        ("short.txt", b"too short", "too short"),
        ("one.txt", b"word " * 5000, "too short"),
        ("latin.txt", "é".encode("latin-1") * 9000, "UTF-8"),
        ("bad.jsonl", b"not json\n" * 900, "JSON"),
        ("field.jsonl", b'{"content": "abc"}\n' * 900, '"text" field'),
        ("number.jsonl", b'{"text": 5}\n' * 9000, '"text" field'),
        ("list.jsonl", b"[1, 2]\n" * 9000, '"text" field'),
        ("empty.txt", b"", "too short"),
    ],
)
def test_texts_that_cannot_be_used(tmp_path, name, content, complaint):
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(CalibrationError) as error:
        read_documents(file)
    message = str(error.value)
    assert complaint in message and str(file) in message
    assert "\n" not in message


def test_a_folder_is_no_text(tmp_path):
    with pytest.raises(CalibrationError, match="calibration-data"):
        read_documents(tmp_path)
