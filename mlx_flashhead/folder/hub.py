"""What is named by a Hugging Face id, and errors that say what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from huggingface_hub.errors import HfHubHTTPError, HFValidationError

T = TypeVar("T")


def from_hub(
    what: str, name: str, get: Callable[[], T], error: type[Exception] = ValueError
) -> T:
    """What ``get()`` downloads, or finds among what was downloaded before.

    Args:
        what: The option that named it.
        name: The Hugging Face id.
        get: Downloads it.
        error: Is raised where the hub does not give it.
    """
    try:
        return get()
    except (HFValidationError, HfHubHTTPError, OSError, ValueError) as e:
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise error(
            f"{what} {name}: no such folder, and the Hugging Face hub does not give it "
            f"({reason[:200]}); check the name and the connection, or name a local "
            "folder"
        ) from e
