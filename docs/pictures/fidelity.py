"""What heads read, and how far they are from the unquantized one: Gemma 3 270M, by
benchmarks/RESULTS.md, "Heads against bytes"."""

from __future__ import annotations

from drawing import FAINT, FLASH, INK, READ, TAIL, Picture, legend, paper, plain, say
from matplotlib.axes import Axes
from results import evaluation, section
from retrieval import D, V

HEADING = "Heads against bytes"
MODEL = "Gemma-3-270M"
# With which all are compared, at the 16 bits that the plain model has it in.
REFERENCE = {"MB": 2 * V * D / 1e6, "KL": 0.0, "agree": 100.0}
COLUMNS = {"KL": "KL from the unquantized head, nats", "agree": "the same token, %"}
EXACT = "FlashHead exact"

Heads = dict[str, dict[str, float]]


def heads() -> tuple[Heads, Heads]:
    """Figures of all heads, and of those that the paper's recipe makes."""
    text = section(HEADING)
    ours = evaluation(text, MODEL) | {"reference, 16-bit": REFERENCE}
    return ours, evaluation(text, f"{MODEL}, `--recipe paper`")


def probing(found: Heads) -> Heads:
    """Those that probe, by the number of clusters."""
    names = [n.split() for n in found]
    return {p: found[f"FlashHead {p}"] for _, p in names if p.isdigit()}


def _panel(ax: Axes, column: str, ours: Heads, theirs: Heads) -> None:
    plain(ax, "both")
    ax.set_xscale("log")
    ticks = [5, 10, 20, 50, 100, 200, 400]
    ax.set_xticks(ticks, [f"{t}" for t in ticks])
    ax.set_xticks([], minor=True)
    ax.set_xlim(5, 520)
    ax.set_xlabel("MB of the head read for a token", color=INK)
    ax.set_title(COLUMNS[column], fontsize=11, color=INK, loc="left")
    for found, color, label in (
        (probing(theirs), TAIL, "the paper's recipe, our sampling"),
        (probing(ours), FLASH, "FlashHead, p clusters"),
    ):
        x = [h["MB"] for h in found.values()]
        y = [h[column] for h in found.values()]
        ax.plot(x, y, "o-", color=color, label=label)
    for name, head in ours.items():
        if name == EXACT:
            ax.plot(head["MB"], head[column], "D", color=READ, ms=8, label="exact")
        elif not name.startswith("FlashHead"):
            ax.plot(head["MB"], head[column], "s", color=FAINT, ms=7)
            label = name.replace(" ", "\n") + "\n"
            say(ax, head["MB"], head[column], label, va="bottom", fontsize=9)


def draw() -> Picture:
    """The picture."""
    ours, theirs = heads()
    figure = paper(10, 4.4)
    left, right = figure.subplots(1, 2)
    figure.subplots_adjust(0.06, 0.2, 0.985, 0.92, wspace=0.13)
    for ax, column in ((left, "KL"), (right, "agree")):
        _panel(ax, column, ours, theirs)
    left.set_yscale("symlog", linthresh=1e-4, linscale=0.5)
    left.set_ylim(-2e-5, 20)
    ticks = ["0", "0.0001", "0.001", "0.01", "0.1", "1", "10"]
    left.set_yticks([float(t) for t in ticks], ticks)
    for p, head in probing(ours).items():
        say(left, head["MB"], head["KL"], f"{p} ", ha="right", va="top", fontsize=8)
    right.set_ylim(None, 106)
    right.set_yticks(range(70, 101, 5))
    legend(figure, left)
    named = ours | {f"the paper's recipe, p {p}": h for p, h in probing(theirs).items()}
    said = [
        f"{name}: {h['MB']:.1f} MB, KL {h['KL']:.5f}, agreement {h['agree']:.2f} %"
        for name, h in named.items()
    ]
    return Picture(figure, f"{MODEL}. {'; '.join(said)}.")
