"""What the documentation says: its sections, code blocks, tables, links and names."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
]


@dataclass
class Section:
    """A second-level section of a document, or what stands above the first.

    Attributes:
        name: The document and the heading's anchor.
        text: All of it, subsections included.
        blocks: Language and text of its fenced blocks, in order.
    """

    name: str
    text: str = ""
    blocks: list[tuple[str, str]] = field(default_factory=list)

    @property
    def commands(self) -> list[str]:
        """Commands of its bash blocks, comments left out."""
        return [c for kind, text in self.blocks if kind == "bash" for c in lines(text)]

    @property
    def prose(self) -> str:
        """The text without its blocks."""
        return re.sub(r"^```.*?^```", "", self.text, flags=re.S | re.M)

    @property
    def tables(self) -> list[list[list[str]]]:
        """Its tables: rows of cells, the head's first."""
        found: list[list[list[str]]] = []
        before = ""
        for line in self.prose.splitlines():
            if line.startswith("|"):
                if not before.startswith("|"):
                    found.append([])
                if not re.fullmatch(r"[|\s:-]+", line) or "---" not in line:
                    cells = line.strip().strip("|").split("|")
                    found[-1].append([c.strip() for c in cells])
            before = line
        return found

    @property
    def spans(self) -> list[str]:
        """Inline code."""
        return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", self.prose)


def lines(block: str) -> list[str]:
    """The commands of a bash block."""
    found = []
    for line in block.replace("\\\n", " ").splitlines():
        line = re.sub(r"(^|\s)#\s.*$", "", line).strip()
        if line:
            found.append(line)
    return found


def anchor(heading: str) -> str:
    """GitHub's anchor of a heading."""
    kept = re.sub(r"[^\w\- ]", "", heading.lower())
    return kept.replace(" ", "-")


def headings(file: Path) -> list[str]:
    text = re.sub(r"^```.*?^```", "", file.read_text("utf-8"), flags=re.S | re.M)
    return re.findall(r"^#+ (.+)$", text, flags=re.M)


def sections(file: Path) -> Iterator[Section]:
    name = str(file.relative_to(ROOT))
    section = Section(name)
    kind, block = None, ""
    for line in file.read_text("utf-8").splitlines(keepends=True):
        if kind is None and line.startswith("## "):
            yield section
            section = Section(f"{name}#{anchor(line[3:].strip())}")
        section.text += line
        if line.startswith("```"):
            if kind is None:
                kind, block = line[3:].strip(), ""
            else:
                section.blocks.append((kind, block))
                kind = None
        elif kind is not None:
            block += line
    assert kind is None, f"{name}: a block without an end"
    yield section


SECTIONS = [section for file in FILES for section in sections(file)]


def words(command: str) -> list[str]:
    return shlex.split(command, comments=True)
