"""Model cards, and uploads to the Hugging Face hub."""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from mlx_flashhead import __version__
from mlx_flashhead.folder.section import Section

# Of the base model's card, what holds for the converted model, too.
_INHERITED = ("license", "license_name", "license_link", "language", "base_model")

# Files that have to go along with a copy.
_NOTICES = ("LICENSE*", "NOTICE*", "USE_POLICY*")

# What mlx-lm would load of an older version.
_OLD_WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]

_WITH_MODEL = """
# {name}

{origin}, with a [FlashHead](https://arxiv.org/abs/2603.14591) for
[MLX](https://github.com/ml-explore/mlx): a retrieval head in place of the dense
`lm_head`, made without training by mlx-flashhead {version}. The plain model is in the
folder, too, and stock mlx-lm runs it.

## With the FlashHead

```bash
pip install mlx-flashhead
mlx_flashhead.generate --model {name} --prompt "Once upon a time"
```

```python
from mlx_flashhead import load
from mlx_lm import generate

model, tokenizer = load("{name}")
print(generate(model, tokenizer, prompt="Once upon a time"))
```

## Without the package: the dense head

```bash
pip install mlx-lm
mlx_lm.generate --model {name} --prompt "Once upon a time"
```
"""

_ALONE = """
# {name}

A [FlashHead](https://arxiv.org/abs/2603.14591) for {origin} in
[MLX](https://github.com/ml-explore/mlx): what a retrieval head needs beside the model,
made without training by mlx-flashhead {version}. It has no weights of the model: these
come from where they are, unchanged, and a model whose head has other rows is refused.

```bash
pip install mlx-flashhead
mlx_flashhead.generate --model {base} --flashhead {name} --prompt "Once upon a time"
```

```python
from mlx_flashhead import load
from mlx_lm import generate

model, tokenizer = load("{base}", flashhead="{name}")
print(generate(model, tokenizer, prompt="Once upon a time"))
```
"""

_FIGURES = """
## Fidelity

Measured at conversion on {held_out_tokens:,} tokens of text held out from the
calibration, against the dense head:

| | |
|---|---|
| Best token is among those probed (recall) | {recall:.2%} |
| Same best token as the dense head | {agreement:.2%} |
| KL divergence from the dense head | {kl:.4f} nats per token |
| Read per decoded token, FlashHead | {flash_mb:.1f} MB |
| Read per decoded token, dense {dense_bits}-bit head | {dense_mb:.1f} MB |

## Recipe

| | |
|---|---|
| Vocabulary | {vocab_size:,} tokens x {hidden_size:,} |
| Clusters | {n_clusters:,} of {cluster_size}{clusters} |
| Probed per token | {n_probes:,} |
| Bits | rows {row_bits}, centroids {centroid_bits} |
| Recipe, seed | {recipe}, {seed} |
| Calibration text | {calibration} |
| SHA-256 of the dense head | `{head_sha256}` |
"""


class PublishError(ValueError):
    """The model cannot be uploaded; the folder is there all the same."""


class ReadBytes(Protocol):
    """Of a report, what a card says of the head: bytes read per decoded token."""

    @property
    def flash_bytes(self) -> int: ...
    @property
    def dense_bytes(self) -> int: ...
    @property
    def dense_bits(self) -> int: ...


def write_card(
    folder: Path,
    name: str,
    section: Section,
    report: ReadBytes,
    *,
    base: str | None = None,
    source: Path | None = None,
    alone: bool = False,
) -> None:
    """Write the README.md of a converted folder or a sidecar, and copy the licences of
    the weights that are in it.

    Args:
        folder: The folder. The card that mlx-lm wrote there goes.
        name: How the model is to be called: its id on the hub, or the folder's name.
        section: The config's section.
        report: What :func:`mlx_flashhead.convert.convert` reports.
        base: Hugging Face id of the model that was converted.
        source: Its folder, whose card's licence and base model are inherited.
        alone: Whether it is a sidecar. It has no weights, and inherits nothing.
    """
    inherited: dict[str, Any] = {}
    # Cards are anyone's; one that is missing or cannot be read has nothing to inherit.
    card = source / "README.md" if source else None
    for card_of in (card if card and card.is_file() else None, base):
        if card_of is not None and "license" not in inherited and not alone:
            with contextlib.suppress(Exception):
                data = ModelCard.load(card_of).data.to_dict()
                inherited |= {k: data[k] for k in _INHERITED if data.get(k)}
    if base is not None:
        inherited["base_model"] = base
    for pattern in _NOTICES:
        for file in source.glob(pattern) if source and not alone else ():
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
    if not inherited.get("license") and inherited.get("license_name"):
        inherited["license"] = "other"
    data = ModelCardData(
        **inherited,
        library_name="mlx",
        pipeline_tag="text-generation",
        tags=["mlx", "flashhead", "mlx-flashhead"],
    )
    bases = inherited.get("base_model")
    bases = [bases] if isinstance(bases, str) else bases or []
    origin = ", ".join(f"[{b}](https://huggingface.co/{b})" for b in bases)
    assert section.measured is not None  # by the converter
    unnamed = "a language model" if alone else "A language model"
    text = (f"{_ALONE if alone else _WITH_MODEL}{_FIGURES}").format(
        name=name,
        base=bases[0] if bases else "MODEL",
        origin=origin or unnamed,
        version=__version__,
        flash_mb=report.flash_bytes / 1e6,
        dense_mb=report.dense_bytes / 1e6,
        dense_bits=report.dense_bits,
        clusters=f", published by {section.clusters}" if section.clusters else "",
        row_bits=section.rows.bits,
        centroid_bits=section.centroids.bits,
        **asdict(section.measured),
        vocab_size=section.vocab_size,
        hidden_size=section.hidden_size,
        n_clusters=section.n_clusters,
        cluster_size=section.cluster_size,
        n_probes=section.n_probes,
        recipe=section.recipe,
        seed=section.seed,
        calibration=section.calibration,
        head_sha256=section.head_sha256,
    )
    model_card = ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")
    model_card.save(folder / "README.md")


def check_upload(repo: str) -> None:
    """Raise PublishError, before any work is done, where an upload to the Hugging Face
    id ``repo`` cannot succeed."""
    try:
        validate_repo_id(repo)
        HfApi().whoami()
    except HFValidationError as e:
        raise PublishError(f"--upload-repo {repo}: {_line(e)}") from e
    # A missing token is one of huggingface_hub's own kinds of these.
    except (HfHubHTTPError, OSError, ValueError) as e:
        raise PublishError(
            f"--upload-repo {repo}: the Hugging Face hub does not know you; log in "
            f"with 'hf auth login' or set HF_TOKEN ({_line(e)})"
        ) from e


def upload(folder: Path, repo: str, alone: bool = False) -> str:
    """Upload a converted folder or a sidecar in one commit, and give its address.
    Weight files of an older version go, as mlx-lm would load them, too; but a sidecar
    ``alone`` leaves what is beside it.

    Raises:
        PublishError: The hub refuses, or cannot be reached.
    """
    api = HfApi()
    try:
        url = api.create_repo(repo, exist_ok=True)
        api.upload_folder(
            repo_id=url.repo_id,
            folder_path=folder,
            commit_message=f"Upload {'FlashHead' if alone else 'model with FlashHead'}",
            delete_patterns=[] if alone else _OLD_WEIGHTS,
        )
    except (HfHubHTTPError, HFValidationError, OSError, ValueError, RuntimeError) as e:
        raise PublishError(
            f"--upload-repo {repo}: the upload failed ({_line(e)}); it is in "
            f"{folder}, try again with: hf upload {repo} {folder}"
        ) from e
    return str(url)


def _line(error: Exception) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__
