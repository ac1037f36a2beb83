"""Put a FlashHead into a model that is loaded already, and take it out again.

The rows are the model's own, in another order: where they stood, nothing is left of
them, so that a model with a FlashHead takes the memory of the model without. Taken out,
they go back into the module that stood there, in the order of the vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ..compute.device import for_device
from ..folder.section import read_config, read_section
from .alone import let_measure
from .loading import find_flashhead, head_path, install, stop_tokens_of
from .locate import flash_slots, head_table, set_module
from .slots import Before, FlashLinear

# Of a linear or embedding layer, those that Table.arrays has, in its order.
_ARRAYS = ("weight", "scales", "biases")


def attach(
    model: nn.Module,
    where: str | Path,
    *,
    n_probes: int | None = None,
    exact: bool = False,
    verify_every: int | None = None,
    tune: bool = True,
) -> nn.Module:
    """Put a FlashHead into a model that is loaded already, whoever loaded it: nothing
    of mlx-lm is patched or asked for its version.

    ``model(tokens)`` then gives logits of the whole vocabulary ``[B, L, V]`` as before.
    Where ``L`` is 1 they come from a fraction of the rows: exact where probed,
    estimated elsewhere; or from all, where that takes no longer here. Longer inputs,
    which are prompts, have exact ones. Loops of
    your own, mlx-lm's functions and any sampler work on. On a CPU back-end the model
    computes in float32 until :func:`detach`.

    Args:
        model: The model; its own rows are used, in another order. The layer that had
          them cannot be called meanwhile.
        where: A FlashHead of the same model: its file, a folder that has one, or the
          Hugging Face id of either.
        n_probes: Clusters probed per decoded token, instead of the stored number.
        exact: Decode with the model's own tokens: by :class:`mlx_flashhead.Decoder`, or
          by mlx-lm after :func:`mlx_flashhead.patch_decoding`. ``model(tokens)`` by
          itself cannot draft, and then gives the dense head's logits from all rows.
        verify_every: Tokens that are verified at once where it is exact, instead of the
          stored number.
        tune: Whether the head may be measured when it is first used, and decodes as is
          fastest here; ``MLX_FLASHHEAD_TUNE=0`` turns it off, too.

    Returns:
        The same model.

    Raises:
        FormatError: There is no FlashHead, or a damaged one, or another model's.
          Nothing is changed then. It is a ``ValueError`` of one line.
        ValueError: The model has a FlashHead already.
    """
    if next(flash_slots(model), None) is not None:
        raise ValueError(
            "the model has a FlashHead already: take it out (mlx_flashhead.detach), or "
            "load the model with the dense head (dense=True)"
        )
    found = find_flashhead(where, "the FlashHead")
    section = read_section(found)
    assert section is not None  # find_flashhead() has seen the file
    modules, dtypes = dict(model.named_modules()), _dtypes(model)
    own = head_table(modules[head_path(model, found, section)])
    if n_probes is None and not exact:
        n_probes = section.n_probes
    config = read_config(found) if (found / "config.json").exists() else {}
    install(
        model,
        found,
        "exact",  # with the model's own rows
        n_probes=n_probes,
        verify_every=verify_every,
        stop_tokens=stop_tokens_of(config),
    )
    slots = [
        (path, s) for path, s in model.named_modules() if isinstance(s, FlashLinear)
    ]
    head = slots[0][1].head
    # Padding repeats a row that exists; it is masked wherever logits are made.
    index = mx.where(head.token_ids < head.vocab_size, head.token_ids, 0)
    head.rows = own.map(lambda a: a[index])
    for path, slot in slots:
        slot.decoding = "exact" if exact else "approximate"
        slot.before = Before(modules[path], dtypes)
        for other in _places(modules, modules[path]):
            set_module(model, other, slot)
    if tune:
        let_measure(model, section)  # with these rows
    mx.eval(for_device(model).parameters())
    for path, _ in slots:
        for name in _ARRAYS:
            modules[path].pop(name, None)
    return model


def detach(model: nn.Module) -> nn.Module:
    """Take out the FlashHead that :func:`attach` put in: the layers that stood there
    stand there again, with the same weights, bit for bit.

    Returns:
        The same model.

    Raises:
        ValueError: The model has none that was attached.
    """
    slots = [s for s in flash_slots(model) if s.before is not None]
    if not slots:
        raise ValueError(
            "the model has no FlashHead that mlx_flashhead.attach put in; load it "
            "again with the dense head (dense=True)"
        )
    head = slots[0].head
    rows = head.rows.flat.map(lambda a: a[head.positions])
    for slot in slots:
        before = cast(Before, slot.before)
        for name, array in zip(_ARRAYS, rows.arrays, strict=True):
            if array is not None:
                before.module[name] = array
        for path in _places(dict(model.named_modules()), slot):
            set_module(model, path, before.module)
    # What was cast for a CPU; an array that stands twice is cast once.
    parameters: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    narrow = {
        (id(parameters[name]), str(dtype)): parameters[name].astype(dtype)
        for name, dtype in before.dtypes.items()
        if name in parameters
    }
    update = [
        (name, narrow[id(parameters[name]), str(dtype)])
        for name, dtype in before.dtypes.items()
        if name in parameters
    ]
    model.update(tree_unflatten(update))
    mx.eval(model.parameters())
    return model


def _places(modules: dict[str, nn.Module], module: nn.Module) -> list[str]:
    """Paths of a module; it may stand at several."""
    return [path for path, other in modules.items() if other is module]


def _dtypes(model: nn.Module) -> dict[str, mx.Dtype]:
    parameters: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    return {name: array.dtype for name, array in parameters.items()}
