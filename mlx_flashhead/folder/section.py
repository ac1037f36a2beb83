"""The section ``flashhead``: what it says of a FlashHead and of how it was made.

It stands in the metadata of ``flashhead.safetensors``, which is whole by itself, and
in the ``config.json`` of a converted folder, there with the digests of the folder's
weight files. Versions before 4 had it in ``config.json`` alone, and always stored the
rows. Version 2 had neither ``files`` nor ``sha256``. Version 1 had one temperature, 1,
and a single ``tail_offset``. What is unknown in a section is ignored, but for its
digest.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import numpy as np
from safetensors import SafetensorError, safe_open

FORMAT_VERSION = 4
CONFIG_KEY = "flashhead"
HEAD_FILE = "flashhead.safetensors"
# Positions that one dense product verifies, where a folder does not say it. On Apple's
# GPUs MLX reads the rows once for all from 6 to 12 positions on.
VERIFY_EVERY = 16
# MLX's other modes of quantization, with their bits and group sizes. Scales are uint8.
MODES = (("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16))
_MAX_CONFIG_BYTES = 1 << 26
_MAX_SECTION_CHARACTERS = 1 << 20
_MAX_REAL = float(np.finfo(np.float32).max)


class FormatError(ValueError):
    """A FlashHead is damaged, another model's, or of a version that is not known."""


@dataclass(frozen=True)
class TableForm:
    """Bits, group size and mode of a table; the group size is 0 where it is dense."""

    bits: int
    group_size: int
    mode: str = "affine"


@dataclass(frozen=True)
class Measured:
    """What the converter measured on held-out text.

    Attributes:
        recall: Share of states whose best token is probed.
        agreement: Share on which the FlashHead's best token is the dense head's.
        kl: Mean KL(dense || FlashHead) over the whole vocabulary, nats per token.
        held_out_tokens: Number of states.
    """

    recall: float
    agreement: float
    kl: float
    held_out_tokens: int


@dataclass(frozen=True)
class Draft:
    """How exact decoding drafts and verifies, as the converter chose it.

    Attributes:
        n_probes: Clusters probed for a drafted token.
        verify_every: Tokens that one dense product verifies.
        acceptance: Share of the drafted tokens that is expected to stand, greedy.
        rows: Whose rows decide: ``"model"`` for those of the plain model's head,
            ``"stored"`` for the FlashHead's own, in a file or not.
    """

    n_probes: int
    verify_every: int
    acceptance: float
    rows: str = "model"


@dataclass(frozen=True)
class Section:
    """A section, its values checked against each other.

    Attributes:
        head_path: Module of the model that the FlashHead stands for.
        vocab_size, hidden_size, n_clusters, cluster_size, n_probes: Sizes.
        temperatures, tail_offset: As :class:`mlx_flashhead.FlashHead` has them.
        rows, centroids: Bits of the two tables.
        stored_rows: Whether the file has the rows; else they are made of the model's.
        head_sha256: Digest of the dense head's rows.
        tensors_sha256: Digest of the file's tensors; before version 4 there was none.
        recipe, seed, calibration, clusters: What it was made with; ``clusters`` only
            where they were published ones.
        measured: What the converter measured.
        draft: How exact decoding drafts; folders of before have none.
        files: SHA-256 of each weight file of a folder, by its name; none in a file.
        format_version: That of the folder or file.
        intact: Whether the section's own digest was the right one.
    """

    head_path: str
    vocab_size: int
    hidden_size: int
    n_clusters: int
    cluster_size: int
    n_probes: int
    temperatures: tuple[float, ...]
    tail_offset: tuple[float, ...]
    rows: TableForm
    centroids: TableForm
    stored_rows: bool = True
    head_sha256: str | None = None
    tensors_sha256: str | None = None
    recipe: str | None = None
    seed: int | None = None
    calibration: str | None = None
    measured: Measured | None = None
    clusters: str | None = None
    draft: Draft | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    intact: bool = True

    @property
    def drafting(self) -> Draft:
        """How exact decoding drafts; folders of before say nothing of it."""
        return self.draft or Draft(self.n_probes, VERIFY_EVERY, 1.0)

    @classmethod
    def from_json(cls, stored: Any) -> Self:
        """Read a section of any version.

        Raises:
            FormatError: It is of another version, or its values are not possible.
        """
        if not isinstance(stored, dict):
            raise FormatError(f"{CONFIG_KEY!r} is not an object; convert again")
        version = stored.get("format_version")
        if isinstance(version, bool) or version not in range(1, FORMAT_VERSION + 1):
            raise FormatError(
                f"FlashHead format version {version!r:.40} is not known here; "
                "upgrade mlx-flashhead or convert the model again"
            )
        intact = stored.get("sha256") == section_sha256(stored)
        if version == 1:
            offset = stored.get("tail_offset")
            stored = {**stored, "temperatures": [1.0], "tail_offset": [offset]}
        known = {f.name for f in fields(cls)} - {"intact"}
        values = {key: value for key, value in stored.items() if key in known}
        _check(values)
        for key in ("temperatures", "tail_offset"):
            values[key] = tuple(values[key])
        for key, kind in (
            ("rows", TableForm),
            ("centroids", TableForm),
            ("measured", Measured),
            ("draft", Draft),
        ):
            if key in values:
                names = [f.name for f in fields(kind)]
                values[key] = kind(**{name: values[key][name] for name in names})
        return cls(**values, intact=intact)

    def to_json(self) -> dict[str, Any]:
        """The section as it is stored, in the present version and with its digest."""
        stored = {k: v for k, v in asdict(self).items() if v is not None}
        del stored["intact"]
        if not self.files:
            del stored["files"]
        stored["format_version"] = FORMAT_VERSION
        for key in ("temperatures", "tail_offset"):
            stored[key] = list(stored[key])
        return {**stored, "sha256": section_sha256(stored)}


def read_config(folder: str | Path) -> dict[str, Any]:
    """A folder's ``config.json``; empty where there is none.

    Raises:
        FormatError: It cannot be read, or is no object.
    """
    path = Path(folder) / "config.json"
    if not path.exists():
        return {}
    try:
        if not path.is_file():
            raise FormatError(f"{path} is not a file")
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise FormatError(f"{path} is too large to be a config")
        config = json.loads(path.read_text(encoding="utf-8"))
    except FormatError:
        raise
    except (ValueError, OSError, RecursionError) as e:
        raise FormatError(f"{path} is not valid JSON: {e}") from None
    if not isinstance(config, dict):
        raise FormatError(f"{path} is not a JSON object")
    return config


def head_file(where: str | Path) -> Path:
    """The file of the FlashHead at ``where``, which is that file or its folder."""
    where = Path(where)
    return where / HEAD_FILE if where.is_dir() else where


def has_section(folder: str | Path) -> bool:
    """Whether a folder has a FlashHead; what its section says is not looked at.

    Raises:
        FormatError: ``config.json`` cannot be read, or its section is no object.
    """
    section = read_config(folder).get(CONFIG_KEY)
    if section is not None and not isinstance(section, dict):
        path = Path(folder) / "config.json"
        raise FormatError(f"{path}: {CONFIG_KEY!r} is not an object; convert again")
    return section is not None or (Path(folder) / HEAD_FILE).exists()


def read_section(where: str | Path) -> Section | None:
    """The section of a FlashHead's file, or of a folder: its config's, or else that of
    the file in it; ``None`` for a folder without a FlashHead.

    Raises:
        FormatError: It cannot be read, or what it says is not possible.
    """
    source = Path(where)
    stored = None
    if source.is_dir():
        source /= "config.json"
        stored = read_config(where).get(CONFIG_KEY)
        if stored is None and not head_file(where).exists():
            return None
    if stored is None:
        source = head_file(where)
        stored = _read_metadata(source)
    try:
        section = Section.from_json(stored)
        if source.name == "config.json" and section.format_version >= 3:
            _require(bool(section.files), "it does not list the weight files")
    except FormatError as e:
        raise FormatError(f"{source}: {e}") from None
    return section


def _read_metadata(file: Path) -> Any:
    """The section in the metadata of a FlashHead's file."""
    if not file.is_file():
        raise FormatError(
            f"{file} is no FlashHead's file or folder; make one: mlx_flashhead.convert"
        )
    try:
        with safe_open(file, "numpy") as opened:
            text = (opened.metadata() or {}).get(CONFIG_KEY)
    except (SafetensorError, OSError) as e:
        raise FormatError(
            f"{file} is damaged, cut off or no safetensors file "
            f"({' '.join(str(e).split())[:200]}); get or convert it again"
        ) from None
    if text is None:
        raise FormatError(
            f"{file} has no {CONFIG_KEY!r} section: before version 4 it stood in the "
            "config.json of its folder; give that folder, or convert the model again"
        )
    try:
        if len(text) > _MAX_SECTION_CHARACTERS:
            raise ValueError("it is too long")
        return json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as e:
        raise FormatError(
            f"{file}: its section is not valid JSON: {' '.join(str(e).split())[:200]}; "
            "get or convert it again"
        ) from None


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; ValueError for one with a key twice, which another reader may
    understand in another way."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice")
    return found


def section_sha256(stored: Mapping[str, Any]) -> str:
    """SHA-256 of a section as it is stored, but for its own ``sha256``."""
    rest = {key: value for key, value in stored.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise FormatError(f"{otherwise}; convert the model again")


def _check(values: Mapping[str, Any]) -> None:
    for key in ("vocab_size", "hidden_size", "n_clusters", "cluster_size", "n_probes"):
        _require(_is_size(values.get(key)), f"{key} is {values.get(key)!r:.80}")
    c, m, v = (values[k] for k in ("n_clusters", "cluster_size", "vocab_size"))
    _require(0 <= c * m - v < m, f"{c} clusters of {m} do not hold {v} tokens")
    _require(values["n_probes"] <= c, f"n_probes is {values['n_probes']}")
    path = values.get("head_path")
    named = isinstance(path, str) and re.fullmatch(r"\w+(\.\w+)*", path)
    _require(bool(named), f"head_path is {path!r:.80}, no name")
    for key in ("temperatures", "tail_offset"):
        value: Any = values.get(key)
        real = isinstance(value, list) and all(map(_is_real, value))
        _require(real and 1 <= len(value) <= 64, f"{key} is {value!r:.80}")
    temperatures, offsets = values["temperatures"], values["tail_offset"]
    _require(
        min(temperatures) > 0 and sorted(set(temperatures))[::-1] == temperatures,
        "temperatures do not fall",
    )
    _require(len(offsets) == len(temperatures), "tail_offset is not one each")
    for name in ("rows", "centroids"):
        form: Any = values.get(name)
        _require(isinstance(form, dict), f"{name} has no description")
        bits, group_size = form.get("bits"), form.get("group_size")
        dense = bits in (16, 32) and group_size == 0
        packed = bits in (2, 3, 4, 5, 6, 8) and group_size in (32, 64, 128)
        affine = (dense or packed) and form.get("mode") == "affine"
        known = affine or (form.get("mode"), bits, group_size) in MODES
        _require(known, f"{name} has an unknown form {form!r:.80}")
    value = values.get("stored_rows", True)
    _require(isinstance(value, bool), f"stored_rows is {value!r:.80}")
    for key in (
        *("head_sha256", "tensors_sha256"),
        *("recipe", "calibration", "clusters"),
    ):
        value = values.get(key, "")
        _require(isinstance(value, str), f"{key} is {value!r:.80}")
    _require(_is_real(values.get("seed", 0)), f"seed is {values.get('seed')!r:.80}")
    if "measured" in values:
        value = values["measured"]
        names = [f.name for f in fields(Measured)]
        whole = isinstance(value, dict) and all(_is_real(value.get(n)) for n in names)
        _require(whole, f"measured is {value!r:.80}")
    if "draft" in values:
        value = values["draft"]
        known = (
            isinstance(value, dict)
            and all(_is_size(value.get(n)) for n in ("n_probes", "verify_every"))
            and _is_real(value.get("acceptance"))
            and value.get("rows") in ("model", "stored")
        )
        _require(known and value["n_probes"] <= c, f"draft is {value!r:.80}")
    _require(_is_listing(values.get("files", {})), "files does not list weight files")


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_real(value: Any) -> bool:
    """Whether a value is a number that is finite in float32, too."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and abs(value) <= _MAX_REAL


def _is_listing(files: Any) -> bool:
    """Whether these are digests by the names of weight files in the folder."""
    return isinstance(files, dict) and all(
        os.path.basename(name) == name
        and name.endswith(".safetensors")
        and isinstance(digest, str)
        for name, digest in files.items()
    )
