"""Tables, plot and what stands below them."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

import mlx.core as mx

from ..compute.device import on_gpu
from ..kernels import doctor
from .conditions import ask
from .latency import Spread
from .matrix import Row


class LoadRow(TypedDict):
    """Seconds that it took to open what is named."""

    name: str
    seconds: Spread


class Machine(TypedDict):
    """What was measured on.

    Attributes:
        device: Name of the GPU, or of the CPU where that computes.
        cpu: Name of the CPU.
        memory_bytes: The device's memory; ``None`` where MLX does not tell it.
        backend: Of the kernels; ``"CPU"`` where that computes.
        os: Operating system and its version.
        versions: By package.
    """

    device: str
    cpu: str
    memory_bytes: int | None
    backend: str
    os: str
    versions: dict[str, str]


def baseline(rows: Sequence[Row]) -> str | None:
    """Name of the head that the others are compared with: dense, of 8 bits if there,
    else the first dense one."""
    dense = {r["kind"]: r["head"] for r in rows if r["kind"].isdigit()}
    return dense.get("8", next(iter(dense.values()), None))


def cell_table(rows: Sequence[Row]) -> str:
    """A markdown table of the rows of one cell, aligned to be read as it is."""
    base = baseline(rows)
    speed = {(r["sampler"], r["head"]): r["tokens_per_second"]["median"] for r in rows}
    energy = any(r["joules_per_token"] for r in rows)
    header = ["sampler", "head", "tokens/s (min to max)"]
    if base is not None:
        header.append(f"x {base}")
    drafts = any(r["acceptance"] is not None for r in rows)
    header += ["first token, ms", "head, ms/token", "share", "head MB/token"]
    header += ["drafts that stood", "thrown away"] * drafts + ["peak GB"]
    header += ["J/token"] * energy
    table = [header]
    for r in rows:
        s = r["tokens_per_second"]
        row = [r["sampler"], r["head"]]
        row.append(f"{s['median']:.1f} ({s['min']:.1f} to {s['max']:.1f})")
        if base is not None:
            row.append(f"{s['median'] / speed[r['sampler'], base]:.2f}")
        row.append(f"{1e3 * r['first_token_seconds']['median']:.1f}")
        head = r["head_seconds_per_token"]
        row.append("-" if head is None else f"{1e3 * head['median']:.3g}")
        share = r["head_share"]
        row.append("-" if share is None else f"{100 * share:.0f} %")
        read = r["head_bytes_per_token"]
        row.append("-" if read is None else f"{read / 1e6:.1f}")
        for rate in (r["acceptance"], r["waste"]) if drafts else ():
            row.append("-" if rate is None else f"{100 * rate:.1f} %")
        row.append(f"{r['peak_bytes'] / 1e9:.2f}")
        if energy:
            joules = r["joules_per_token"]
            row.append("-" if joules is None else f"{joules['median']:.3f}")
        table.append(row)
    return markdown_table(table, left=2)


def load_table(rows: Sequence[LoadRow]) -> str:
    """A markdown table of how long what is named took to open."""
    table = [["to load", "seconds (min to max)"]]
    for r in rows:
        s = r["seconds"]
        table.append(
            [r["name"], f"{s['median']:.2f} ({s['min']:.2f} to {s['max']:.2f})"]
        )
    return markdown_table(table)


def markdown_table(table: Sequence[Sequence[str]], left: int = 1) -> str:
    """Rows of cells as markdown, the first the header; columns from ``left`` on are
    aligned to the right."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]

    def line(row: Sequence[str]) -> str:
        padded = (
            cell.ljust(w) if i < left else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        return f"| {' | '.join(padded)} |"

    rule = ["-" * w if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join([line(table[0]), line(rule), *map(line, table[1:])])


def machine() -> Machine:
    """Device, operating system and versions."""
    environment = doctor.report(run=False)
    mac = platform.system() == "Darwin"
    if mac:
        cpu = ask(["sysctl", "-n", "machdep.cpu.brand_string"]).strip()
        os_name = f"macOS {platform.mac_ver()[0]}"
    else:
        info = Path("/proc/cpuinfo")
        lines = info.read_text().splitlines() if info.exists() else []
        names = [n.split(":", 1)[1].strip() for n in lines if n.startswith("model na")]
        cpu = f"{names[0]}, {len(names)} cores" if names else platform.processor()
        os_name = platform.platform()
    device = mx.device_info(mx.default_device())
    memory = device.get("memory_size") or device.get("total_memory")
    return {
        "device": environment["device"] if on_gpu() else cpu,
        "cpu": cpu,
        "memory_bytes": None if memory is None else int(memory),
        "backend": environment["backend"] if on_gpu() else "CPU",
        "os": os_name,
        "versions": environment["versions"],
    }


def footer(machine: Machine, command: str) -> str:
    """The machine, its versions and the command that repeats the benchmark."""
    memory = machine["memory_bytes"]
    where = [machine["device"]]
    if machine["cpu"] != machine["device"]:
        where.append(machine["cpu"])
    if memory:
        where.append(f"{memory / 2**30:.0f} GB")
    where += [machine["backend"], machine["os"]]
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items())
    return f"{'; '.join(where)}\n{versions}\n\n```bash\n{command}\n```"


def plot(rows: Sequence[Row], path: str, title: str) -> None:
    """Tokens per second as bars, with their spread: a panel per cell."""
    from matplotlib.figure import Figure

    cells = list(dict.fromkeys((r["batch_size"], r["prompt_tokens"]) for r in rows))
    samplers = list(dict.fromkeys(r["sampler"] for r in rows))
    heads = list(dict.fromkeys(r["head"] for r in rows))
    across = min(3, len(cells))
    down = -(-len(cells) // across)
    figure = Figure((4.2 * across, 1.2 + 3 * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).flatten()
    for panel in panels[len(cells) :]:
        panel.set_visible(False)
    width = 0.8 / len(heads)
    for panel, (b, n) in zip(panels, cells, strict=False):
        for i, head in enumerate(heads):
            for j, sampler in enumerate(samplers):
                s = next(
                    r["tokens_per_second"]
                    for r in rows
                    if (r["batch_size"], r["prompt_tokens"]) == (b, n)
                    and (r["head"], r["sampler"]) == (head, sampler)
                )
                error = [[s["median"] - s["min"]], [s["max"] - s["median"]]]
                panel.bar(
                    j + (i + 0.5) * width - 0.4,
                    s["median"],
                    0.92 * width,
                    yerr=error,
                    capsize=2,
                    color=f"C{i}",
                    label=head if j == 0 else None,
                )
        panel.set_xticks(range(len(samplers)), samplers)
        panel.set_title(f"batch {b}, prompt of {n:,} tokens", fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[::across]:
        panel.set_ylabel("tokens per second")
    figure.suptitle(title)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=9)
    figure.savefig(path, dpi=160)
