"""Progress bars with the name of the stage."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from tqdm import tqdm

Step = Callable[[], None]
Progress = Callable[[str, int], contextlib.AbstractContextManager[Step]]


@contextlib.contextmanager
def silent(stage: str, total: int) -> Iterator[Step]:
    yield lambda: None


@contextlib.contextmanager
def bars(stage: str, total: int) -> Iterator[Step]:
    """A bar on standard error, with the stage's name and the number of its steps."""
    with tqdm(total=total, desc=f"{stage:<34}", unit="", dynamic_ncols=True) as bar:

        def step() -> None:
            bar.update()

        yield step
