"""What people run in 2026: small made models of mlx-lm's own classes, each converted
and decoded in every way.

``python tests/test_models.py`` writes what came of it into docs/models.md; the tests
find the same.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import tempfile
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest
import small_models
from mlx_flashhead.convert import convert
from mlx_lm.models.cache import make_prompt_cache
from small_models import CURRENT

from mlx_flashhead import load, unpatch
from mlx_flashhead.integration.exact import verification
from mlx_flashhead.integration.locate import slot_of
from mlx_flashhead.sampling import LogProbs

# Not "from mlx_lm import generate": that name is a function's.
generate = importlib.import_module("mlx_lm.generate")

DOCUMENT = Path(__file__).parents[1] / "docs/models.md"
PROMPTS = ["The quick brown fox", "Many a little makes a mickle"]
N_TOKENS = 40
CLUSTER = 8
# Clusters probed, of 75: for drafts, of which some then fall, and for candidates.
FEW, MANY = 40, 55

# What is not made small here, and why.
ELSEWHERE = {
    "Muse Spark": (
        "muse_spark",
        "`lm_head`",
        "not tested: mlx-lm has it for Apple's GPUs alone, with Metal kernels",
    )
}
# Those that the default suite runs: one of each kind of head, cache and body.
QUICK = (
    *("Llama 3.2", "Gemma 3n", "Gemma 4", "Qwen 3.5", "LFM 2", "Granite 4, hybrid"),
    *("MiniCPM, tied", "Seed-OSS, tied", "Muse Glimmer"),
)


@dataclass(frozen=True)
class Row:
    """Of the table, as it is written."""

    model: str
    module: str
    head: str
    convert: str = ""
    approximate: str = ""
    exact: str = ""
    batch: str = ""
    prompt_cache: str = ""
    notes: str = ""

    def __str__(self) -> str:
        return f"| {' | '.join(astuple(self))} |"


HEADER = Row(
    *("model", "mlx-lm's class", "head", "convert", "approximate", "exact", "batch"),
    *("prompt cache", "notes"),
)


def row(name: str, folder: Path) -> tuple[Row, list[Exception]]:
    """A model's row, and what went wrong."""
    module, config, path = CURRENT[name]
    tied = "tied" if path.rpartition(".")[2] != "lm_head" else "`lm_head`"
    found, errors = Row(name, f"`{module}`", tied), []
    checks = {
        "convert": converts,
        "approximate": decodes_among_candidates,
        "exact": decodes_exactly,
        "batch": decodes_batches,
        "prompt_cache": leaves_prompt_caches,
    }
    source = small_models.write(name, folder / "source", seed=1)
    for column, check in checks.items():
        try:
            check(source, folder / "converted")
            found = replace(found, **{column: "yes"})
        except Exception as e:
            errors.append(e)
            reason = " ".join(str(e).replace(f"{folder}/", "").split()) or repr(e)
            found = replace(found, **{column: "no"}, notes=found.notes or reason[:160])
            if column == "convert":
                break
        finally:
            unpatch()
    return found, errors


def stock(folder: Path):
    """mlx-lm's own, with the dense head."""
    model, tokenizer = mlx_lm.load(str(folder))
    return model, tokenizer


def flash(folder: Path, n_probes: int, **options):
    model, tokenizer = load(folder, n_probes=n_probes, **options)
    assert slot_of(model) is not None
    return model, tokenizer


def steps_of(model, tokenizer, prompt=PROMPTS[0], **options):
    options = {"max_tokens": N_TOKENS} | options
    return generate.generate_step(mx.array(tokenizer.encode(prompt)), model, **options)


def converts(source: Path, folder: Path) -> None:
    text = folder.with_name("text.txt")
    text.write_text("\n\n".join(f"{p} " * 50 for p in [*PROMPTS * 2, PROMPTS[0]]))
    convert(
        str(source),
        folder,
        cluster_size=CLUSTER,
        n_probes=FEW,
        calibration_data=text,
        verbose=False,
    )


def decodes_among_candidates(source: Path, folder: Path) -> None:
    """Greedily the dense head's tokens as long as these are probed."""
    wanted = [token for token, _ in steps_of(*stock(folder))]
    made = list(steps_of(*flash(folder, MANY, exact=False)))
    assert len(made) == N_TOKENS and all(type(p) is LogProbs for _, p in made)
    assert [token for token, _ in made][:3] == wanted[:3]


def decodes_exactly(source: Path, folder: Path) -> None:
    """Token for token what mlx-lm makes of the source, drafted with few probes."""
    wanted = [token for token, _ in steps_of(*stock(source))]
    with verification() as count:
        made = [token for token, _ in steps_of(*flash(folder, FEW))]
    assert made == wanted
    assert count.verifications < count.tokens  # drafts stood


def decodes_batches(source: Path, folder: Path) -> None:
    """Several sequences at once, of different lengths, and one alone."""
    texts = []
    for model, tokenizer in (stock(source), flash(folder, FEW)):
        prompts = [tokenizer.encode(p) for p in PROMPTS]
        options = {"return_token_ids": True}
        several = mlx_lm.batch_generate(
            model, tokenizer, prompts, **options | {"max_tokens": [9, 14]}
        )
        alone = mlx_lm.batch_generate(
            model, tokenizer, prompts[:1], max_tokens=20, **options
        )
        texts.append(several.token_ids + alone.token_ids)
    assert texts[0] == texts[1] and list(map(len, texts[0])) == [9, 14, 20]


def leaves_prompt_caches(source: Path, folder: Path) -> None:
    """A generation that is left in the middle is continued with its prompt cache."""
    texts = []
    for model, tokenizer in (stock(source), flash(folder, FEW)):
        cache, made = make_prompt_cache(model), []
        for prompt in PROMPTS:
            with contextlib.closing(
                steps_of(model, tokenizer, prompt, prompt_cache=cache)
            ) as steps:
                made += [token for token, _ in itertools.islice(steps, 11)]
        texts.append(made)
    assert texts[0] == texts[1]


# ---- the document ------------------------------------------------------------------


def rows_of_document() -> dict[str, str]:
    """The table's rows as they stand in the document, by the model's name."""
    lines = DOCUMENT.read_text().splitlines()
    rows = [line for line in lines if line.startswith("| ")][2:]
    return {line.split(" | ")[0][2:]: line for line in rows}


def elsewhere() -> list[Row]:
    return [Row(n, f"`{m}`", h, notes=note) for n, (m, h, note) in ELSEWHERE.items()]


def write() -> None:
    """Write the table into the document."""
    rows = [HEADER, Row(*["---"] * len(fields(Row)))]
    for name in CURRENT:
        with (
            tempfile.TemporaryDirectory() as folder,
            contextlib.redirect_stdout(io.StringIO()),
        ):
            found, _ = row(name, Path(folder))
        print(found)
        rows.append(found)
    rows += elsewhere()
    text = DOCUMENT.read_text()
    begin, end = text.index("| model"), text.rindex("|\n") + 2
    table = "".join(f"{line}\n" for line in rows)
    DOCUMENT.write_text(text[:begin] + table + text[end:])


def quick_or_full(name: str):
    return name if name in QUICK else pytest.param(name, marks=pytest.mark.full)


@pytest.mark.parametrize("name", [*map(quick_or_full, CURRENT)])
def test_the_document_says_what_works(name, tmp_path):
    found, errors = row(name, tmp_path)
    written = rows_of_document().get(name)
    assert str(found) == written, (
        "python tests/test_models.py writes it anew"
        + "".join(f"\n{type(e).__name__}: {e}" for e in errors)
    )


def test_the_document_has_every_model_and_no_other():
    rows = rows_of_document()
    assert list(rows) == [*CURRENT, *ELSEWHERE] and set(QUICK) <= CURRENT.keys()
    assert [rows[r.model] for r in elsewhere()] == [str(r) for r in elsewhere()]


@pytest.mark.skipif(mx.metal.is_available(), reason="Metal is there")
@pytest.mark.parametrize("name", ELSEWHERE)
def test_what_is_not_tested_cannot_be(name):
    module = importlib.import_module(f"mlx_lm.models.{ELSEWHERE[name][0]}")
    common = small_models._COMMON | small_models._MUSE | {"vocab_size": 64}
    config = common | {
        "rope_parameters": {"rope_theta": 10000.0},
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "moe_hidden_size": 32,
        "moe_intermediate_size": 32,
    }
    args = {"model_type": ELSEWHERE[name][0], "text_config": config}
    model = module.Model(module.ModelArgs.from_dict(args))
    with pytest.raises(RuntimeError, match="No Metal back-end"):
        model(mx.array([[1, 2]]))


if __name__ == "__main__":
    write()
