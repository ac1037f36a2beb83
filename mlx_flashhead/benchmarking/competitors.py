"""What is compared: heads on one body, and other models as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm import utils
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..compute.device import for_device, on_gpu
from ..compute.table import Table
from ..folder.section import has_section
from ..head import FlashHead, prefers_dense
from ..head.transform import Transform
from ..integration.loading import find_flashhead
from ..integration.locate import (
    HeadNotFound,
    find_head,
    find_transform,
    flash_heads,
    get_module,
    head_table,
    is_tied,
    set_module,
    slot_of,
    watching,
)
from ..integration.patch import stock_loader
from ..integration.samplers import read_sampler
from ..integration.slots import FlashLinear, hidden_state
from ..load import load
from ..sampling import draw, fits
from .latency import Step

# As --heads names them.
HEADS = ("16", "8", "4", "flash", "exact")

Sampler = Callable[[mx.array], mx.array]


class SplitEmbedding(nn.Module):
    """Stands in for the embedding of a tied model: ``embedding`` embeds, and ``head``
    makes the logits ``[..., V]``, so that heads differ and embeddings do not."""

    def __init__(self, embedding: nn.Module, head: nn.Module):
        super().__init__()
        self.embedding = embedding
        self.head = head

    def __call__(self, ids: mx.array) -> mx.array:
        return self.embedding(ids)

    def as_linear(self, x: mx.array) -> mx.array:
        return self.head(x)


class DenseHead(nn.Module):
    """Logits ``[..., V]`` of hidden states ``[..., D]`` from the rows of a table."""

    def __init__(self, rows: Table, bias: mx.array | None = None):
        super().__init__()
        self.rows = rows
        if bias is not None:
            self.bias = bias

    def __call__(self, x: mx.array) -> mx.array:
        y = self.rows.matmul(x)
        return y + self.bias if "bias" in self else y


@dataclass
class Competitor:
    """A model to decode with.

    Attributes:
        name: As the tables call it.
        kind: One of ``HEADS``, or ``"model"`` for a model of its own.
        model: The model. Heads on one body share it.
        tokenizer: Its tokenizer.
        path: Module path of its head; ``None`` where that was not found.
        head: The head. It is in place after :meth:`place`.
        module: What stands at ``path`` with this head.
        transform: What the model does to the head's logits, where that is known.
        nbytes: Bytes of the parameters, as a model with this head alone holds them.
        head_bytes: Bytes of the head that a step reads; in exact decoding, that a draft
            reads.
        verified_bytes: Bytes that each verification reads, in exact decoding.
    """

    name: str
    kind: str
    model: nn.Module
    tokenizer: TokenizerWrapper
    path: str | None
    head: nn.Module | None
    module: nn.Module | None
    transform: Transform | None
    nbytes: int
    head_bytes: int | None = None
    verified_bytes: int | None = None

    def place(self) -> nn.Module:
        """The model, with this head in it."""
        if self.path is not None and self.module is not None:
            set_module(self.model, self.path, self.module)
        return self.model

    def step(self, sampler: Sampler) -> Step | None:
        """From hidden states ``[B, D]`` to tokens ``[B]``, as decoding does it with a
        sampler of mlx-lm's; ``None`` where the head is not known, or not one step's."""
        head, transform = self.head, self.transform or Transform()
        if head is None or self.kind == "exact":
            # A verification is of several steps.
            return None
        logits_of: Callable[[mx.array], mx.array] = (
            head.as_linear if hasattr(head, "as_linear") else head
        )

        def plain(h: mx.array, key: mx.array) -> mx.array:
            y = transform(logits_of(h))
            return sampler(y - mx.logsumexp(y, axis=-1, keepdims=True))

        settings = read_sampler(sampler)
        if not isinstance(head, FlashHead):
            return plain
        if settings is None or not fits(head, settings):
            return plain

        def flash(h: mx.array, key: mx.array) -> mx.array:
            if prefers_dense(head, len(h), settings.sorts):
                return plain(h, key)
            return draw(head, settings, h, key).tokens

        # Checks the kernels, which cannot be done while a chain of steps is compiled.
        mx.eval(flash(mx.zeros((1, head.hidden_size)), mx.random.key(0)))
        return flash

    def states(self, batch_size: int) -> mx.array:
        """Hidden states ``[B, D]`` as the head, which is known, is given them."""
        ids = self.tokenizer.encode("The history of the steam engine")
        tokens = mx.array([ids] * batch_size)
        model = self.place()
        if isinstance(self.head, FlashHead):
            return hidden_state(self.head, model, tokens)[:, -1]
        assert self.path is not None  # where the head was found
        with watching(model, self.path) as states:
            model(tokens)
        return states[-1][:, -1]


def check(folder: str | Path, flashhead: str | None = None) -> None:
    """Raise ValueError for a local folder without a FlashHead, unless another is
    given."""
    if flashhead is not None:
        find_flashhead(flashhead)
    elif Path(folder).is_dir() and not has_section(folder):
        raise ValueError(
            f"--model {folder} has no FlashHead; make one with mlx_flashhead.convert, "
            "or name it with --flashhead"
        )


def heads(
    folder: str | Path,
    kinds: Iterable[str],
    n_probes: int | None = None,
    verify_every: int | None = None,
    flashhead: str | None = None,
) -> tuple[list[Competitor], str]:
    """The heads of a converted folder, or of a model and a FlashHead that is given, on
    one body, and what is to say of them.

    The unquantized head is the folder's dense head, dequantized where it is stored
    quantized; the 8- and 4-bit ones are made of it as ``mlx_lm.convert -q`` would. The
    embedding of a tied model stays the folder's for all.

    Raises:
        ValueError: The folder has no FlashHead, or its head cannot be quantized.
    """
    kinds = list(kinds)
    # Lazily: only the heads of these are ever read.
    loaded = {
        kind: load(
            folder,
            lazy=True,
            exact=kind == "exact",
            n_probes=n_probes,
            verify_every=verify_every,
            flashhead=flashhead,
            tune=False,
        )
        for kind in sorted({"flash", *kinds} & {"flash", "exact"})
    }
    slots = {kind: slot_of(flash) for kind, (flash, _) in loaded.items()}
    tokenizer = loaded["flash"][1]
    if slots["flash"] is None:
        raise ValueError(
            f"--model {folder} has no FlashHead, or MLX_FLASHHEAD=0 switches it off"
        )
    # The plain model: with dense=True it may have the FlashHead's own rows.
    model, _ = stock_loader("load_model")(utils._download(str(folder)))
    mx.eval(for_device(model).parameters())
    path = find_head(model)
    transform = slots["flash"].head.transform
    stored = get_module(model, path)
    tied = is_tied(model, path)
    table = head_table(stored)
    unquantized = Table(table.dequantize(), bits=8 * table.dtype.size)
    bias = stored.get("bias")
    body = _nbytes(model) - _nbytes(stored)
    competitors = []
    head: FlashHead | DenseHead
    for kind in kinds:
        slot: nn.Module | None = None
        verified_bytes = None
        if (theirs := slots.get(kind)) is not None:
            head = theirs.head
            share = 100 * head.rows_read() / head.vocab_size
            name = f"FlashHead {head.rows.bits}-bit ({share:.1f} % of rows)"
            # For a text of any tokens, those that end one included.
            slot = FlashLinear(head)
            if kind == "exact":
                slot.decoding, slot.verify_every = "exact", theirs.verify_every
                name = f"FlashHead exact {head.rows.bits}-bit (p {head.n_probes})"
                verified_bytes = head.rows.nbytes
        elif kind == "16":
            head = DenseHead(unquantized, bias)
            name = f"dense {unquantized.bits}-bit"
        else:
            group_size = _group_size(table.hidden_size)
            rows = Table.from_dense(unquantized.weight, int(kind), group_size)
            head = DenseHead(rows, bias)
            name = f"dense {kind}-bit"
        mx.eval(head.parameters())
        slot = slot or head
        flash = isinstance(head, FlashHead)
        competitors.append(
            Competitor(
                name=name,
                kind=kind,
                model=model,
                tokenizer=tokenizer,
                path=path,
                head=head,
                module=SplitEmbedding(stored, slot) if tied else slot,
                transform=transform,
                nbytes=body + _nbytes(head),
                head_bytes=head.bytes_read() if flash else head.rows.nbytes,
                verified_bytes=verified_bytes,
            )
        )
    note = "Only the head differs; body, embedding, prompt and sampler are the same."
    if table.quantized:
        note += (
            f" The folder's dense head has {table.bits} bits: the unquantized one is "
            "made of these."
        )
    if not on_gpu():
        note += " All compute in float32, the fastest on MLX's CPU back-end."
    return competitors, note


def _group_size(hidden_size: int) -> int:
    for size in (64, 32):
        if hidden_size % size == 0:
            return size
    raise ValueError(
        f"the hidden size {hidden_size} is no multiple of 32, so there are no 8- or "
        "4-bit heads; use --heads 16,flash"
    )


def other(path_or_hf_repo: str) -> Competitor:
    """A whole other model, with its FlashHead if it has one."""
    model, tokenizer = load(path_or_hf_repo)
    mx.eval(for_device(model).parameters())
    flash = next(flash_heads(model), None)
    path: str | None = None
    head: nn.Module | None = flash
    transform = None if flash is None else flash.transform
    if flash is None:
        with suppress(HeadNotFound):
            path = find_head(model)
            head = get_module(model, path)
            transform = find_transform(model, path)
    return Competitor(
        name=Path(path_or_hf_repo).name,
        kind="model",
        model=model,
        tokenizer=tokenizer,
        path=path,
        head=head,
        module=None if path is None else head,
        transform=transform,
        nbytes=_nbytes(model),
    )


def _nbytes(module: nn.Module) -> int:
    arrays: dict[str, mx.array] = dict(tree_flatten(module.parameters()))
    return sum(a.nbytes for a in arrays.values())
