"""``mlx_flashhead.evaluate``: how faithful FlashHead and dense quantized heads are.

All heads get the same hidden states of the same body, and each is compared with the
unquantized head: dense heads as ``mlx_lm.convert -q`` makes them, of 8 and of 4 bits,
and the FlashHead at several numbers of probes.

The figures, as :func:`evaluate` returns and ``--json`` writes them::

    {
      "domains": {NAME: {                 one for each text, by its file's name
        "tokens": int,
        "reference": {"perplexity": float},
        "heads": {HEAD: {
          "recall": float,                share of tokens whose best token is probed
          "top10_recall": float,          share of the ten best tokens that are probed
          "agreement": float,             share of tokens with the same best token
          "probed_mass": float,           the reference's probability of what is probed
          "kl": float,                    KL(reference || head), nats per token
          "total_variation": float,       mean of sum |p - q| / 2
          "perplexity": float,            of the text, by the head's distribution
          "perplexity_ratio": float       over the reference's
        }}
      }},
      "overall": {...},                   the same over all tokens of all texts;
                                          "reference" also has "name", "bits",
                                          "rows_read" and "bytes_read"
      "heads": [{
        "name": HEAD,
        "kind": "dense" or "flashhead",
        "bits": int,                      of its rows
        "n_probes": int or null,
        "stored": bool,                   the FlashHead as it is in the folder
        "rows_read": int,                 per token, centroids included
        "bytes_read": int,                per token
        "continuations": {                with --generate
          "prompts": int,
          "identical": float,             share of prompts
          "median_first_difference": float or null,   from 1
          "near_ties": float or null,     share of first differences where the gap of
                                          the reference's logits is within the margin
          "near_tie_margin": float,
          "first_difference": [int or null],
          "gap": [float or null]
        }
      }]
    }

A dense head probes everything. The distribution of a FlashHead is the
one that sampling at temperature 1 draws from, the whole vocabulary's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np
from tqdm import tqdm

from .cli import Listed, check_outputs, one_line_errors
from .compute.device import blas_hint, disable_tf32
from .evaluation.compare import (
    NEAR_TIE,
    Comparison,
    Continuations,
    Sums,
    continue_greedily,
    own_reference,
    read_reference,
)
from .evaluation.states import stream_states
from .folder.format import load_head
from .folder.section import read_section
from .integration.locate import find_transform
from .load import load

TOKENS = 2000
MAX_TOKENS = 64


def evaluate(
    folder: str | Path,
    texts: Sequence[str | Path],
    *,
    tokens: int = TOKENS,
    reference: str | None = None,
    n_probes: Sequence[int] | None = None,
    prompts: Sequence[str] = (),
    max_tokens: int = MAX_TOKENS,
    verbose: bool = True,
) -> dict[str, Any]:
    """Compare heads; memory does not grow with the number of tokens.

    Args:
        folder: A converted folder.
        texts: Text files.
        tokens: Tokens of each text, at most.
        reference: Where the unquantized head is: a Hugging Face id, a folder or a GGUF
          file. Default: the folder's own dense head.
        n_probes: Numbers of probes beside the stored one. Default: a quarter to four
          times it.
        prompts: To be continued greedily.
        max_tokens: Longest continuation.
        verbose: Whether to show progress, on standard error.

    Returns:
        The figures; see the module.

    Raises:
        ValueError, OSError: One line that says what cannot be used.
    """
    section = read_section(folder)
    if section is None:
        reason = "has no FlashHead; make one with mlx_flashhead.convert"
        if not Path(folder).is_dir():
            reason = "is no folder; give one that mlx_flashhead.convert made"
        raise ValueError(f"{folder} {reason}")
    names = _names(texts)
    contents = [_read(path) for path in texts]
    path = section.head_path
    model, tokenizer = load(folder, dense=True)
    head = load_head(folder, section, find_transform(model, path))
    if reference is None:
        standard = own_reference(folder, path)
    else:
        standard = read_reference(reference, head)
    comparison = Comparison(head, standard, n_probes)

    ids = [
        _encode(tokenizer, text, tokens, name)
        for text, name in zip(contents, texts, strict=True)
    ]
    domains: dict[str, Sums] = {}
    overall = Sums()
    with _bar(sum(len(i) - 2 for i in ids), "tok", verbose) as bar:
        for name, text in zip(names, ids, strict=True):
            sums = domains[name] = Sums()
            bar.set_description(name)
            for states in stream_states(model, path, text[:-1]):
                # The tokens after those that the states follow.
                start = 2 + sums.tokens
                following = np.array(text[start : start + len(states)])
                sums.add(comparison.measure(states, following))
                bar.update(len(states))
            overall.add(sums)

    heads = [asdict(h) for h in comparison.heads]
    if prompts:
        found = {h.name: Continuations() for h in comparison.heads}
        with _bar(len(prompts), "prompt", verbose) as bar:
            for prompt in prompts:
                _, states = continue_greedily(
                    model,
                    path,
                    tokenizer.encode(prompt),
                    comparison.best,
                    max_tokens=max_tokens,
                    stop_tokens=list(tokenizer.eos_token_ids),
                )
                for name, choices in comparison.choose(states).items():
                    found[name].add(choices)
                bar.update()
        for each in heads:
            each["continuations"] = found[each["name"]].figures()
    total = overall.figures()
    total["reference"] |= {
        "name": standard.name,
        "bits": standard.table.bits,
        "rows_read": head.vocab_size,
        "bytes_read": standard.table.nbytes,
    }
    return {
        "domains": {name: sums.figures() for name, sums in domains.items()},
        "overall": total,
        "heads": heads,
    }


def _bar(total: int, unit: str, verbose: bool) -> tqdm[Any]:
    return tqdm(total=total, unit=unit, disable=not verbose, dynamic_ncols=True)


def _names(texts: Sequence[str | Path]) -> list[str]:
    """Names of the files without what is the same for all; whole where they clash."""
    stems = [Path(t).stem for t in texts]
    return [
        s if stems.count(s) == 1 else str(t) for s, t in zip(stems, texts, strict=True)
    ]


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a UTF-8 text file") from None
    except OSError as e:
        raise ValueError(f"{path}: {e.strerror or 'cannot be read'}") from None


def _encode(tokenizer: Any, text: str, tokens: int, path: str | Path) -> list[int]:
    """Ids of a text: one before the first state, and one after the last."""
    ids = tokenizer.encode(text)[: tokens + 2]
    if len(ids) < 3:
        raise ValueError(f"--text {path}: too short; give three tokens or more")
    return ids


def read_prompts(path: str | Path) -> list[str]:
    """Prompts of a file of JSON lines, each with a ``prompt``.

    Raises:
        ValueError: It is not such a file.
    """
    prompts = []
    # Not splitlines(), which also splits at separators inside a string.
    for i, line in enumerate(_read(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError):
            prompt = None
        if not isinstance(prompt, str) or not prompt:
            raise ValueError(
                f'--generate {path}, line {i}: each must be JSON with a "prompt"'
            )
        prompts.append(prompt)
    if not prompts:
        raise ValueError(f"--generate {path} holds no prompts")
    return prompts


# Title, width and format of the columns; shares are shown in per cent.
_COLUMNS = {
    "recall": ("recall", 8, "percent"),
    "top10_recall": ("top-10", 8, "percent"),
    "agreement": ("agree", 8, "percent"),
    "probed_mass": ("mass", 8, "percent"),
    "kl": ("KL", 9, ".5f"),
    "total_variation": ("TV", 8, ".4f"),
    "perplexity_ratio": ("ppl x", 8, ".4f"),
}

_LEGEND = """\
recall: the reference's best token is probed; top-10: share of its ten best; agree: the
same token is chosen; mass: probability of what is probed; all in per cent. KL in nats,
TV, ppl x (perplexity over the reference's): of the distribution over the whole
vocabulary that sampling draws from. * as stored in the folder."""


def table(result: dict[str, Any]) -> str:
    """The figures as text: a table for each domain, the overall one last."""
    reference = result["overall"]["reference"]
    v = reference["rows_read"]
    lines = [
        f"Reference: {reference['name']}, {reference['bits']} bits, {v:,} rows, "
        f"{reference['bytes_read'] / 1e6:.1f} MB a token",
    ]
    titles = "".join(f"{title:>{width}}" for title, width, _ in _COLUMNS.values())
    named = {**result["domains"], "overall": result["overall"]}
    if len(result["domains"]) == 1:
        del named["overall"]
    wide = max(len(_label(h)) for h in result["heads"])
    for name, figures in named.items():
        perplexity = figures["reference"]["perplexity"]
        lines.append(
            f"\n{name}: {figures['tokens']:,} tokens, perplexity {perplexity:.4g}"
        )
        lines.append(f"{'head':{wide}}{'rows':>8}{'MB':>7}{titles}")
        for head in result["heads"]:
            values = figures["heads"][head["name"]]
            cells = [f"{_label(head):{wide}}{100 * head['rows_read'] / v:7.1f}%"]
            cells.append(f"{head['bytes_read'] / 1e6:7.1f}")
            for key, (_, width, form) in _COLUMNS.items():
                x = values[key]
                percent = form == "percent"
                cells.append(
                    f"{100 * x:{width}.2f}" if percent else f"{x:{width}{form}}"
                )
            lines.append("".join(cells))
    lines.append(f"\n{_LEGEND}")
    if "continuations" in result["heads"][0]:
        lines += ["", *_continuations(result["heads"], wide)]
    return "\n".join(lines)


def _label(head: dict[str, Any]) -> str:
    return head["name"] + (" *" if head["stored"] else "")


def _continuations(heads: list[dict[str, Any]], wide: int) -> list[str]:
    n = heads[0]["continuations"]["prompts"]
    lines = [
        f"Greedy continuations of {n} prompts. Near-tie: the reference's logits of the "
        f"two tokens\nare no more than {NEAR_TIE} apart.",
        f"{'head':{wide}}{'identical':>14}{'median first difference':>26}"
        f"{'near-ties':>14}",
    ]
    for head in heads:
        found = head["continuations"]
        differ = sum(f is not None for f in found["first_difference"])
        median = found["median_first_difference"]
        at = "-" if median is None else f"token {median:g}"
        ties = (
            "-" if not differ else f"{round(found['near_ties'] * differ)} of {differ}"
        )
        same = f"{n - differ} of {n}"
        lines.append(f"{_label(head):{wide}}{same:>14}{at:>26}{ties:>14}")
    return lines


def plot(result: dict[str, Any], path: str | Path, title: str) -> None:
    """Recall and KL against the bytes that a token reads: the FlashHead's numbers of
    probes as a line, overall and thinner for each domain; dense heads as points."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    figure = Figure((10, 4.4), layout="constrained")
    panels = figure.subplots(1, 2)
    flash = [h for h in result["heads"] if h["kind"] == "flashhead"]
    dense = [h for h in result["heads"] if h["kind"] == "dense"]
    for panel, key, label in zip(
        panels,
        ("recall", "kl"),
        ("recall, %", "KL(reference || head), nats"),
        strict=True,
    ):

        def values(
            figures: dict[str, Any], heads: list[dict[str, Any]], key: str = key
        ) -> list[float]:
            scale = 100 if key == "recall" else 1
            return [scale * figures["heads"][h["name"]][key] for h in heads]

        megabytes = [h["bytes_read"] / 1e6 for h in flash]
        if len(result["domains"]) > 1:
            for i, (name, figures) in enumerate(result["domains"].items(), 1):
                y = values(figures, flash)
                panel.plot(megabytes, y, lw=1, alpha=0.6, color=f"C{i}", label=name)
        y = values(result["overall"], flash)
        panel.plot(megabytes, y, "o-", color="black", label="FlashHead, overall")
        for head, x in zip(flash, y, strict=True):
            if head["stored"]:
                at = [head["bytes_read"] / 1e6]
                panel.plot(at, [x], "o", ms=11, mfc="none", color="black")
        for i, head in enumerate(dense):
            at, y = [head["bytes_read"] / 1e6], values(result["overall"], [head])
            panel.plot(at, y, "s^vD"[i % 4], color="C7", ms=8, label=head["name"])
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter(ScalarFormatter())
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.set_xlabel("head bytes read per token, MB")
        panel.set_ylabel(label)
        panel.grid(alpha=0.3, which="both")
        panel.spines[["top", "right"]].set_visible(False)
    panels[1].set_yscale("log")
    figure.suptitle(f"{title} (circled: as stored)", fontsize=11)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=9)
    figure.savefig(path, dpi=160)


def _write(path: str, save: Callable[[Path], object]) -> None:
    """Write a file whole: ``save(other)`` makes it aside."""
    target = Path(path)
    aside = target.with_name(f".{os.getpid()}.{target.name}")
    try:
        save(aside)
        os.replace(aside, target)
    finally:
        aside.unlink(missing_ok=True)


@click.command(
    context_settings={"show_default": True, "help_option_names": ["-h", "--help"]}
)
@click.option("--model", "folder", required=True, help="A converted folder.")
@click.option("--text", "texts", multiple=True, required=True, help="A text file.")
@click.option(
    "--tokens",
    type=click.IntRange(min=1),
    default=TOKENS,
    help="Tokens of each text, at most.",
)
@click.option(
    "--reference",
    help="Where the unquantized head is: a Hugging Face id, a folder or a GGUF file."
    "  [default: the folder's own dense head]",
)
@click.option(
    "--n-probes",
    type=Listed(int),
    help="Numbers of probes beside the stored one.  [default: 1/4 to 4 times it]",
)
@click.option(
    "--generate", "prompts_path", help='Continue prompts: JSON lines with "prompt".'
)
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    default=MAX_TOKENS,
    help="Longest continuation.",
)
@click.option("--json", "json_path", help="Write the figures here, too.")
@click.option("--plot", "plot_path", help="Draw recall and KL against bytes here.")
def main(
    folder: str,
    texts: tuple[str, ...],
    prompts_path: str | None,
    json_path: str | None,
    plot_path: str | None,
    **options: Any,
) -> None:
    """Compare FlashHead and dense quantized heads with the unquantized head.

    \b
    mlx_flashhead.evaluate --model FOLDER --text a.txt --text b.txt
    """
    if message := blas_hint():
        click.echo(message, err=True)
    disable_tf32()
    with one_line_errors():
        check_outputs({"--json": json_path, "--plot": plot_path})
        prompts = [] if prompts_path is None else read_prompts(prompts_path)
        result = evaluate(folder, texts, prompts=prompts, **options)
        click.echo(table(result))
        if json_path:
            text = json.dumps(result, indent=2) + "\n"
            _write(json_path, lambda p: p.write_text(text, encoding="utf-8"))
        if plot_path:
            _write(plot_path, lambda p: plot(result, p, Path(folder).name))


if __name__ == "__main__":
    main(prog_name="mlx_flashhead.evaluate")
