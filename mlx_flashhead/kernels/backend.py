"""Chooses between Metal, CUDA and plain MLX, and trusts nothing unchecked.

A kernel body is written once, in Metal. ``mx.fast.cuda_kernel`` gets the same text
behind a prelude that gives Metal's names their CUDA meaning. The first time a variant
of a kernel (a dtype, a number of bits...) is used on a GPU, it runs once on small
inputs next to its plain reference. If it does not compile or differs, one warning
says so and plain MLX answers from then on.
"""

import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property, lru_cache
from typing import cast

import mlx.core as mx

from ._prelude import CUDA, METAL

Launch = Callable[..., list[mx.array]]

# "ok", or why plain MLX took over, by kernel and variant.
states: dict[str, str] = {}

_off = os.environ.get("MLX_FLASHHEAD_KERNELS", "on").lower() in ("off", "0")
# Whether this thread or task has turned the kernels off.
_disabled = ContextVar("mlx_flashhead_kernels_off", default=_off)


def kind() -> str:
    """The back-end in use: ``"metal"``, ``"cuda"`` or ``"plain"``.

    Kernels run on the default device if it is a GPU. The environment variable
    ``MLX_FLASHHEAD_KERNELS=off`` and :func:`plain` turn them off.
    """
    if _disabled.get() or mx.default_device().type != mx.DeviceType.gpu:
        return "plain"
    if mx.metal.is_available():
        return "metal"
    return "cuda" if mx.cuda.is_available() else "plain"


@contextmanager
def plain() -> Iterator[None]:
    """Within this context, and in no other thread or task, plain MLX operations stand
    in for every kernel."""
    token = _disabled.set(True)
    try:
        yield
    finally:
        _disabled.reset(token)


class Kernel:
    """A kernel body in Metal, launched on whichever GPU is there.

    Args:
        name (str): Name of the kernel.
        inputs (Sequence[str]): Names of the input buffers.
        outputs (Sequence[str]): Names of the output buffers.
        source (str): The body. Input and output buffers have at least one
          dimension, so that they are pointers in either language.
        header (str): Functions that the body calls.
    """

    def __init__(
        self,
        name: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        source: str,
        header: str = "",
    ):
        self.name = name
        self.inputs = list(inputs)
        self.outputs = list(outputs)
        self.source = source
        self.header = header

    @cached_property
    def metal(self) -> Launch:
        """The kernel in Metal."""
        kernel = mx.fast.metal_kernel(
            f"flashhead_{self.name}",
            self.inputs,
            self.outputs,
            self.source,
            METAL + self.header,
        )
        return cast(Launch, kernel)

    @cached_property
    def cuda(self) -> Launch:
        """The kernel in CUDA."""
        # Metal declares threadgroup memory as it qualifies pointers to it.
        shared = re.sub(r"\bthreadgroup (\w+ \w+\[)", r"__shared__ \1", self.source)
        kernel = mx.fast.cuda_kernel(
            f"flashhead_{self.name}",
            self.inputs,
            self.outputs,
            shared,
            CUDA + self.header,
        )
        return cast(Launch, kernel)

    def __call__(
        self,
        inputs: Sequence[mx.array],
        *,
        template: Sequence[tuple[str, object]],
        groups: tuple[int, int],
        threads: int,
        outputs: Sequence[tuple[tuple[int, ...], mx.Dtype]],
    ) -> list[mx.array]:
        """Launch ``groups`` (x, y) threadgroups of ``threads`` threads.

        Args:
            inputs (Sequence[mx.array]): One array per input buffer.
            template (Sequence[tuple]): Name and value of each compile-time constant.
            groups (tuple[int, int]): Threadgroups along x and y.
            threads (int): Threads per threadgroup, a multiple of 32.
            outputs (Sequence[tuple]): Shape and dtype of each output.
        """
        kernel = self.metal if kind() == "metal" else self.cuda
        return kernel(
            inputs=list(inputs),
            template=list(template),
            grid=(groups[0] * threads, groups[1], 1),
            threadgroup=(threads, 1, 1),
            output_shapes=[shape for shape, _ in outputs],
            output_dtypes=[dtype for _, dtype in outputs],
        )


def ready(variant: str, check: Callable[[], None]) -> bool:
    """Whether the kernel may run here: a GPU is there and ``check`` passed once.

    Args:
        variant (str): The kernel and what its code depends on.
        check (Callable): Runs the kernel on small inputs and raises if it differs
          from its reference. Its failure is remembered and warned of once.
    """
    device = kind()
    if device == "plain":
        return False
    if variant not in states:
        try:
            check()
            states[variant] = "ok"
        except Exception as error:  # whatever the device's compiler or runtime says
            reason = " ".join(str(error).split())[:300]
            states[variant] = f"{type(error).__name__}: {reason}"
            warnings.warn(
                f"mlx-flashhead: plain MLX replaces the kernel {variant} on "
                f"{device_name()} ({device}, MLX {mlx_version()}): {states[variant]}",
                RuntimeWarning,
                stacklevel=3,
            )
    return states[variant] == "ok"


@lru_cache
def unused() -> mx.array:
    """Stands for an input that a variant of a kernel does not read."""
    return mx.zeros((1, 8), dtype=mx.uint32)


def mlx_version() -> str:
    """Version of the installed MLX."""
    return str(mx.__version__)  # type: ignore[attr-defined]  # not in its stubs


def device_name() -> str:
    """The default device's name, as far as MLX knows it."""
    try:
        return str(mx.device_info(mx.default_device())["device_name"])
    except (AttributeError, KeyError, RuntimeError):
        return str(mx.default_device())


def expect_close(
    name: str, got: mx.array, want: mx.array, tolerance: float = 0
) -> None:
    """Raise ``AssertionError`` unless all of ``got`` is within ``tolerance`` of
    ``want``, relative to the largest finite magnitude in ``want``."""
    if not tolerance:
        same = mx.array_equal(got, want)
    else:
        finite = mx.isfinite(want)
        size = mx.max(mx.where(finite, mx.abs(want), 0))
        near = mx.abs(got - want) <= tolerance * mx.maximum(size, 1e-6)
        same = mx.all(mx.where(finite, near, got == want))
    if not same.item():
        raise AssertionError(f"{name} differs from the plain reference")
