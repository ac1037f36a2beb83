"""Figures of an evaluation as a table and as a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .compare import NEAR_TIE

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
recall: the reference's best token is probed (exact: by the draft; MB: of a token that
is kept); top-10: share of its ten best; agree: the
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
                    f"{100 * x:{width}.2f}" if percent else f"{x:z{width}{form}}"
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
        figures = head["continuations"]
        differ = sum(f is not None for f in figures["first_difference"])
        median = figures["median_first_difference"]
        at = "-" if median is None else f"token {median:g}"
        ties = (
            "-" if not differ else f"{round(figures['near_ties'] * differ)} of {differ}"
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
