"""The converter: a model goes in, a folder with a FlashHead comes out."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm import utils
from mlx_lm.convert import MODEL_CONVERSION_DTYPES
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_flashhead.compute.table import Table
from mlx_flashhead.evaluation.drafts import bytes_per_token
from mlx_flashhead.evaluation.fidelity import measure, n_blocks
from mlx_flashhead.folder import format as layout
from mlx_flashhead.folder import integrity
from mlx_flashhead.folder.section import CONFIG_KEY, HEAD_FILE, Measured
from mlx_flashhead.head import FlashHead, default_n_probes
from mlx_flashhead.head.transform import Transform
from mlx_flashhead.integration.locate import (
    find_head,
    find_transform,
    get_module,
    head_table,
)

from . import (
    calibrate,
    centroids,
    clustering,
    collect,
    drafting,
    pack,
    publish,
    statistics,
)
from .progress import Progress, bars, silent
from .published import pack_clusters, read_clusters
from .recipes import (
    FULL,
    QUICK,
    RECIPES,
    SMALL_VOCABULARY,
    Effort,
    Recipe,
    always_tokens,
    default_group_size,
)
from .report import Report, report_of
from .source import Source, open_gguf, open_hf
from .staging import check_space, is_file, staged, writing

HEAD_BITS = (2, 3, 4, 5, 6, 8, 16)
GROUP_SIZES = (32, 64, 128)
Q_MODES = ("affine", "mxfp4", "nvfp4", "mxfp8")


class ConvertError(ValueError):
    """The options do not fit each other or the model."""


def convert(
    hf_path: str | None = None,
    mlx_path: str | Path | None = None,
    *,
    gguf_path: str | None = None,
    sidecar: str | Path | None = None,
    quantize: bool = False,
    q_bits: int | None = None,
    q_group_size: int | None = None,
    q_mode: str = "affine",
    dtype: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    head_bits: int | None = None,
    centroid_bits: int = 4,
    group_size: int | None = None,
    cluster_size: int = 16,
    n_probes: int | None = None,
    calibration_data: str | Path | None = None,
    seed: int = 0,
    recipe: str = "default",
    quick: bool = False,
    clusters: str | Path | None = None,
    overwrite: bool = False,
    upload_repo: str | None = None,
    verbose: bool = True,
) -> Report:
    """Convert a model into an mlx-lm folder with a FlashHead, or make its FlashHead
    alone.

    Args:
        hf_path: Hugging Face id or local folder, of whatever mlx-lm loads.
        mlx_path: The folder to make, by default ``mlx_model``. It must not exist, but
            for ``overwrite``.
        gguf_path: A GGUF file, instead of ``hf_path``.
        sidecar: Instead of a folder at ``mlx_path``, the FlashHead alone, for this
            model as mlx-lm loads it; of a GGUF file, for the folder that is made of it
            without this. A file where the name ends in ``.safetensors``, else a folder
            with that file and a model card. It stores no rows.
        quantize, q_bits, q_group_size, q_mode, dtype, revision, trust_remote_code:
            As in ``mlx_lm.convert``, but quantization is the body's only.
        head_bits: Bits of the head's rows: 16 or MLX's. Default: those of a head that
            is quantized already, else 8. Rows that a GGUF file has in Q8_0 are kept as
            they are, unless 8 bits in groups of 32 are not what is asked for here.
        centroid_bits: Bits of the centroids.
        group_size: Weights per scale in rows and centroids. Default: the source's,
            32 for a GGUF file whose head is in Q8_0, else 64, or 32 where the hidden
            size is no multiple of 64.
        cluster_size: Tokens per cluster, m.
        n_probes: Clusters probed per token. Default: a sixteenth of them.
        calibration_data: Text, or JSON lines with a ``text`` field. Default: a small
            multi-domain text that ships with the package.
        seed: Seed of the clustering. The same seed gives the same result.
        recipe: ``"default"``, or ``"paper"``: spherical k-means, unit centroids and no
            spread term, as in arXiv 2603.14591.
        quick: Look at a quarter of the calibration text and answers, and cluster in
            one round: see docs/commands.md for what that costs.
        clusters: Folder or Hugging Face id of published clusters of this model, in the
            layout of :mod:`mlx_flashhead.convert.clusters`, instead of clustering here.
        overwrite: Replace a model's folder at ``mlx_path``, or a sidecar at
            ``sidecar``, once the new one is whole.
        upload_repo: Hugging Face id to upload the result to when it is done.
        verbose: Show progress.

    Returns:
        What was made, measured on calibration text held out from the fit.

    Raises:
        ConvertError, ClustersError, SourceError, StagingError, CalibrationError,
        StatesError, HeadNotFound, GGUFError: Each a ``ValueError`` with one line that
        says what to do. Nothing is left behind.
        PublishError: Likewise, but where an upload fails the folder stays.
    """
    start = time.perf_counter()
    if (hf_path is None) == (gguf_path is None):
        raise ConvertError("give either --hf-path or --gguf-path")
    for flag, value, allowed in (
        ("--head-bits", head_bits, HEAD_BITS),
        ("--centroid-bits", centroid_bits, HEAD_BITS),
        ("--group-size", group_size, GROUP_SIZES),
        ("--recipe", recipe, tuple(RECIPES)),
        ("--dtype", dtype, MODEL_CONVERSION_DTYPES),
        ("--q-mode", q_mode, Q_MODES),
    ):
        if value is not None and value not in allowed:
            choices = ", ".join(map(str, allowed))
            raise ConvertError(f"{flag} {value} is not one of {choices}")
    if not 2 <= cluster_size <= 128:
        raise ConvertError(f"--cluster-size must be from 2 to 128, not {cluster_size}")
    _check_sidecar(sidecar, mlx_path, quantize, hf_path and dtype, upload_repo)
    target = Path(sidecar or mlx_path or "mlx_model")
    if overwrite and _is_within(hf_path or gguf_path, target):
        raise ConvertError(f"--overwrite: {target} has the model that is converted")
    if upload_repo is not None:
        publish.check_upload(upload_repo)
    documents = collect.read_documents(calibration_data)
    effort = QUICK if quick else FULL
    progress = bars if verbose else silent
    alone = sidecar is not None
    with staged(target, overwrite, alone) as (result, workspace):
        with progress("Opening the model", 1) as step:
            if gguf_path is not None:
                source = open_gguf(gguf_path, workspace, dtype)
            else:
                assert hf_path is not None
                source = open_hf(hf_path, revision, trust_remote_code, plain=not alone)
            model, tokenizer, config = source.load(dtype, as_is=alone)
            step()
        path = find_head(model)
        transform = find_transform(model, path)
        module = get_module(model, path)
        table = head_table(module)
        # A sidecar stores none, and its model has those of its own.
        rows = None if alone else source.exact_rows()
        weight_of = table if rows is None else rows
        if quantize or head_bits not in (None, 8) or group_size not in (None, 32):
            rows = None
        bits, group_size = _head_format(
            table if rows is None else rows, head_bits, centroid_bits, group_size
        )
        check_space(result, _estimated_bytes(None if alone else model, table))
        owner = None
        if clusters is not None:
            owner = read_clusters(
                str(clusters), table.weight.shape[0], table.hidden_size
            )

        _check_finite(table, path)
        states = _states(source, tokenizer, path, documents, effort, progress)
        weight = np.array(weight_of.dequantize(mx.float32))
        del weight_of
        bias = _bias(module)
        if quantize:
            model, config = _quantize_body(
                model, config, path, (q_group_size, q_bits, q_mode), (group_size, bits)
            )
            # A head quantized in place is the one whose rows are put in order.
            table = head_table(get_module(model, path))
        head = build_head(
            table,
            weight,
            bias,
            states,
            RECIPES[recipe],
            head_bits=bits,
            group_size=group_size,
            centroid_bits=centroid_bits,
            cluster_size=cluster_size,
            n_probes=n_probes,
            seed=seed,
            stop_tokens=list(getattr(tokenizer, "eos_token_ids", [])),
            transform=transform,
            owner=owner,
            exact=rows,
            effort=effort,
            progress=progress,
        )
        search = drafting.Search(head)
        held_out = states.reported(effort.n_reported)
        answers = states.answers(effort.n_drafted)
        with progress("Measuring", n_blocks(head, len(held_out))) as step:
            fidelity = measure(
                head, weight, held_out, bias=bias, step=step, watch=search.look
            )
        with progress("Choosing the draft", n_blocks(head, len(answers))) as step:
            search.read(weight, answers, bias, step)
            # Rows that are the source's own where the model's are rounded decide, or
            # the user's own choice of bits, or else the model's rows.
            chosen = head_bits is not None and head.rows.bits != table.bits
            stored = rows is not None or chosen
            verifying = head.rows if stored else table
            draft = drafting.choose(
                head,
                search.found(),
                verifying.nbytes,
                _nbytes(model) - table.nbytes,
                "stored" if stored else "model",
            )
        del weight
        measured = Measured(
            recall=float(fidelity.recall.mean()),
            agreement=float(fidelity.agreement.mean()),
            kl=float(fidelity.kl().mean()),
            held_out_tokens=len(held_out),
        )
        with progress("Writing", 2) as step, writing(target):
            as_stored = layout.form_of(head.rows) == layout.form_of(table)
            section = layout.describe(
                head,
                path,
                layout.table_sha256(table),
                stored_rows=not alone and not as_stored,
                recipe=recipe,
                seed=seed,
                calibration=Path(calibration_data or "built-in").name
                + (", quick" if quick else ""),
                measured=measured,
                clusters=None if clusters is None else _named(clusters),
                draft=draft,
            )
            section = layout.save_head(result / HEAD_FILE, head, section)
            step()
            exact = bytes_per_token(head, verifying.nbytes, draft)
            report = report_of(
                target,
                head,
                verifying,
                measured,
                draft,
                int(exact),
                start,
                (hf_path or "FOLDER") if alone else None,
            )
            if not alone:
                config.pop(CONFIG_KEY, None)
                if source.multimodal and not quantize and dtype is None:
                    source.copy(result)
                else:
                    utils.save(result, source.folder, model, tokenizer, config)
            for file in [*integrity.weight_files(result), result / HEAD_FILE]:
                integrity.check_safetensors(file)
            publish.write_card(
                result,
                upload_repo or target.name,
                section,
                report,
                base=hf_path if source.folder != Path(source.name) else None,
                source=source.folder,
                alone=alone,
            )
            if not alone:
                layout.seal(result, section, integrity.weight_files(result))
            step()
        result.chmod(0o755)
    if upload_repo is not None:
        with progress("Uploading", 1) as step:
            url = publish.upload(target, upload_repo, alone)
            report = replace(report, url=url)
            step()
    return report


def _check_sidecar(
    sidecar: str | Path | None,
    mlx_path: str | Path | None,
    quantize: bool,
    dtype: str | None,
    upload_repo: str | None,
) -> None:
    """Raise ConvertError for what does not fit a sidecar, which is for a model as it
    is."""
    if sidecar is None:
        return
    for flag, given in (("--mlx-path", mlx_path), ("-q", quantize), ("--dtype", dtype)):
        if given:
            raise ConvertError(
                f"{flag} does not go with --sidecar, which is for a model as it is; "
                "leave one of them out"
            )
    if upload_repo is not None and is_file(Path(sidecar), True):
        raise ConvertError(
            f"--upload-repo takes a folder with a model card: --sidecar {sidecar} "
            "without .safetensors"
        )


def _named(clusters: str | Path) -> str:
    """A folder by its name, a Hugging Face id whole."""
    return Path(clusters).name if Path(clusters).exists() else str(clusters)


def _is_within(path: str | None, folder: Path) -> bool:
    return path is not None and Path(path).resolve().is_relative_to(folder.resolve())


def build_head(
    table: Table,
    weight: np.ndarray,
    bias: np.ndarray | None,
    states: collect.States,
    recipe: Recipe = RECIPES["default"],
    *,
    head_bits: int = 8,
    group_size: int = 64,
    centroid_bits: int = 4,
    cluster_size: int = 16,
    n_probes: int | None = None,
    seed: int = 0,
    stop_tokens: Sequence[int] = (),
    transform: Transform | None = Transform(),
    owner: np.ndarray | None = None,
    exact: Table | None = None,
    effort: Effort = FULL,
    progress: Progress = silent,
) -> FlashHead:
    """Cluster, pack and calibrate a head.

    Args:
        table: The head as it is stored, ``[V, D]``.
        weight: The unquantized head, float32 ``[V, D]``.
        bias: Its bias, float32 ``[V]``.
        states: Calibration states.
        recipe: How to cluster.
        head_bits, group_size, centroid_bits, cluster_size, n_probes, seed: As in
            :func:`convert`.
        stop_tokens: Ids of the tokens that end a text.
        transform: What the model does to its logits; ``None`` if that is not known.
        owner: Cluster of each token, int64 ``[V]``, where that is given.
        exact: The rows as they are to be stored, ``[V, D]``, whatever ``table`` is.
        effort: How much is looked at.
        progress: Shows the stages.

    Raises:
        ConvertError: There are not so many clusters as are to be probed.
    """
    with progress("Clustering: metric", 1) as step:
        factor = None
        if recipe.hidden_state_metric:
            factor = clustering.metric_factor(states.second_moment())
        directions = clustering.directions(weight, factor)
        step()
    n_clusters = -(-len(weight) // cluster_size)
    by_default = n_probes is None
    if n_probes is None:
        n_probes = default_n_probes(n_clusters)
    elif not 1 <= n_probes <= n_clusters:
        raise ConvertError(f"--n-probes must be from 1 to {n_clusters}, not {n_probes}")
    always = None
    if recipe.always:
        always = always_tokens(len(weight), cluster_size, n_probes, stop_tokens)
        if by_default and len(weight) <= SMALL_VOCABULARY:
            n_probes += -(-len(always) // cluster_size)
    if owner is None:
        clusters = clustering.cluster(
            directions,
            cluster_size,
            always=always,
            seed=seed,
            n_rounds=effort.n_rounds,
            progress=progress,
        )
    else:
        clusters = pack_clusters(
            directions,
            owner,
            cluster_size,
            always=always,
            seed=seed,
            progress=progress,
        )
    del directions
    found = statistics.gather(
        clusters,
        weight,
        states.fit,
        bias=bias,
        transform=transform,
        n_mass=effort.n_mass,
        progress=progress,
    )
    rows = found.fitted
    if not recipe.fitted_centroids:
        rows = centroids.unit_centroids(clusters, weight)
    with progress("Packing", 1) as step:
        head = pack.pack(
            clusters,
            table,
            weight,
            rows,
            bias=bias,
            head_bits=head_bits,
            centroid_bits=centroid_bits,
            group_size=group_size,
            n_probes=n_probes,
            transform=transform,
            exact=exact,
        )
        mx.eval(head.parameters())
        step()
    return calibrate.calibrate(
        head,
        clusters,
        weight,
        found,
        bias=bias,
        use_spread=recipe.spread,
        progress=progress,
    )


def _head_format(
    table: Table, head_bits: int | None, centroid_bits: int, group_size: int | None
) -> tuple[int, int]:
    """Bits and group size of the rows; the source's where nothing else is asked. The
    group size is that of centroids alone where the rows keep a mode of their own."""
    keep = table.quantized and head_bits in (None, table.bits)
    bits = head_bits or (table.bits if table.quantized else 8)
    d = table.hidden_size
    if group_size is None:
        affine = keep and table.mode == "affine"
        group_size = table.group_size if affine else default_group_size(d)
    if d % group_size and min(bits, centroid_bits) < 16:
        fits = [g for g in GROUP_SIZES if d % g == 0]
        hint = f"use {' or '.join(map(str, fits))}"
        if not fits:
            hint = "use --head-bits 16 --centroid-bits 16"
        raise ConvertError(
            f"the hidden size {d} is not a multiple of --group-size {group_size}; "
            f"{hint}"
        )
    return bits, group_size


def _states(
    source: Source,
    tokenizer: TokenizerWrapper,
    path: str,
    documents: list[str],
    effort: Effort,
    progress: Progress,
) -> collect.States:
    """Calibration states; the model that makes them is in memory only here.

    Raises:
        ConvertError: The model's code does not run on the text.
    """
    model = source.load_for_calibration()
    try:
        return collect.collect(model, tokenizer, path, documents, effort, progress)
    except (ValueError, MemoryError):
        raise
    # Whatever the code of a model raises.
    except Exception as e:
        reason = " ".join(str(e).split())[:200]
        raise ConvertError(
            f"the model {type(model).__module__} does not run on the calibration text: "
            f"{type(e).__name__}: {reason}; use a model that mlx_lm.generate runs"
        ) from e


def _check_finite(table: Table, path: str) -> None:
    """Before anything is computed with the head at ``path``.

    Raises:
        ConvertError: Its rows are not all finite.
    """
    bad = np.array(mx.any(~mx.isfinite(table.dequantize(mx.float32)), axis=1))
    if bad.any():
        raise ConvertError(
            f"{path} has NaN or infinite weights in {bad.sum()} rows (first: token "
            f"{int(bad.argmax())}); the model file is damaged, get it again"
        )


def _bias(module: nn.Module) -> np.ndarray | None:
    """Bias of a head, float32 ``[V]``, where it has one."""
    return np.array(module.bias.astype(mx.float32)) if "bias" in module else None


def _quantize_body(
    model: nn.Module,
    config: dict[str, Any],
    path: str,
    body: tuple[int | None, int | None, str],
    head: tuple[int, int],
) -> tuple[nn.Module, dict[str, Any]]:
    """``mlx_lm.convert -q``, but for the head, which has bits of its own."""
    group_size, bits, mode = body
    head_group_size, head_bits = head
    own = getattr(model, "quant_predicate", None)

    def predicate(name: str, module: nn.Module) -> bool | dict[str, Any]:
        if name == path:
            if head_bits >= 16:
                return False
            return {"group_size": head_group_size, "bits": head_bits, "mode": "affine"}
        return own(name, module) if own is not None else True

    try:
        # mlx-lm prints; standard output is the report's.
        with contextlib.redirect_stdout(sys.stderr):
            return utils.quantize_model(
                model, config, group_size, bits, mode=mode, quant_predicate=predicate
            )
    except ValueError as e:
        raise ConvertError(f"-q: {e}") from e


def _estimated_bytes(model: nn.Module | None, table: Table) -> int:
    """Disk space that a converted model, or its FlashHead alone, may need."""
    if model is None:
        return int(0.1 * table.nbytes) + (16 << 20)
    return int(_nbytes(model) + 1.2 * table.nbytes) + (64 << 20)


def _nbytes(model: nn.Module) -> int:
    """Bytes of a model's parameters."""
    parameters: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    return sum(a.nbytes for a in parameters.values())
