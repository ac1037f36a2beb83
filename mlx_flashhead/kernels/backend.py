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
from functools import lru_cache
from typing import NamedTuple, cast

import mlx.core as mx

from ._prelude import CUDA, METAL

Launch = Callable[..., list[mx.array]]
# Names and values of compile-time constants.
Template = Sequence[tuple[str, int | bool | mx.Dtype]]


class State(NamedTuple):
    """What came of a check: threads per threadgroup, 0 where plain MLX took over, and
    the same in words, which begin with "ok" where the kernel runs."""

    threads: int
    words: str


# By kernel and variant.
states: dict[str, State] = {}

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
        self._built: dict[tuple[object, ...], Launch] = {}

    def metal(
        self, template: Template, threads: int, bounded: bool | None = None
    ) -> Launch:
        """The kernel in Metal, for these constants and threads per threadgroup.

        Args:
            template (Template): Name and value of each compile-time constant.
            threads (int): Threads per threadgroup.
            bounded (bool, optional): Whether the compiler is told of them, so that it
              leaves registers for all; by default where it takes that.
        """
        bounded = bounds_registers() if bounded is None else bounded
        key = ("metal", *template, threads, bounded)
        if key not in self._built:
            bound = _BOUND.format(threads) if bounded else ""
            kernel = mx.fast.metal_kernel(
                self._full_name(template, threads),
                self.inputs,
                self.outputs,
                self.source,
                METAL + _constants(template, threads) + self.header + bound,
            )
            self._built[key] = cast(Launch, kernel)
        return self._built[key]

    def cuda(self, template: Template, threads: int) -> Launch:
        """The same in CUDA. Its ``__launch_bounds__`` would have to stand where MLX
        lets nothing be put."""
        key = ("cuda", *template, threads)
        if key not in self._built:
            # Metal declares threadgroup memory as it qualifies pointers to it.
            shared = re.sub(r"\bthreadgroup (\w+ \w+\[)", r"__shared__ \1", self.source)
            kernel = mx.fast.cuda_kernel(
                self._full_name(template, threads),
                self.inputs,
                self.outputs,
                shared,
                CUDA + _constants(template, threads) + self.header,
            )
            self._built[key] = cast(Launch, kernel)
        return self._built[key]

    def _full_name(self, template: Template, threads: int) -> str:
        """A name for each text: MLX and drivers tell kernels apart by it."""
        values = [short(value) for _, value in template]
        return "_".join(["flashhead", self.name, *values, str(threads)])

    def __call__(
        self,
        inputs: Sequence[mx.array],
        *,
        template: Template,
        groups: tuple[int, int],
        threads: int,
        outputs: Sequence[tuple[tuple[int, ...], mx.Dtype]],
    ) -> list[mx.array]:
        """Launch ``groups`` (x, y) threadgroups of ``threads`` threads.

        MLX copies inputs that are not row-contiguous, in a launch of its own.

        Args:
            inputs (Sequence[mx.array]): One array per input buffer.
            template (Template): Name and value of each compile-time constant, an
              integer, a truth value or a dtype. ``THREADS`` comes by itself.
            groups (tuple[int, int]): Threadgroups along x and y.
            threads (int): Threads per threadgroup, a multiple of 32.
            outputs (Sequence[tuple]): Shape and dtype of each output.
        """
        build = self.metal if kind() == "metal" else self.cuda
        return build(template, threads)(
            inputs=list(inputs),
            grid=(groups[0] * threads, groups[1], 1),
            threadgroup=(threads, 1, 1),
            output_shapes=[shape for shape, _ in outputs],
            output_dtypes=[dtype for _, dtype in outputs],
        )


# Where MLX has template arguments, it puts their list between our text and the kernel.
# So constants are text of ours, and what comes last in it stands right before MLX's
# ``[[kernel]] void``, as an attribute of the kernel.
_BOUND = "[[max_total_threads_per_threadgroup({})]]\n"
_TYPES = {mx.float16: "half", mx.bfloat16: "bfloat16_t", mx.float32: "float"}


def _constants(template: Template, threads: int) -> str:
    """Compile-time constants, as a block of Metal that is CUDA as well."""
    lines = []
    for name, value in (*template, ("THREADS", threads)):
        if isinstance(value, mx.Dtype):
            lines.append(f"using {name} = {_TYPES[value]};")
        else:
            type_name = "bool" if isinstance(value, bool) else "int"
            lines.append(f"constexpr constant {type_name} {name} = {short(value)};")
    return "\n".join(lines) + "\n"


def short(value: object) -> str:
    """A constant or a dtype as text: ``true``, ``64``, ``float16``."""
    if isinstance(value, mx.Dtype):
        return str(value).split(".")[-1]
    return str(value).lower()


@lru_cache(maxsize=256)
def words(values: tuple[int, ...]) -> mx.array:
    """Settings for a kernel, uint32, as an array that is kept: at least 8, for fewer
    are no device buffer in Metal."""
    return mx.array([*values, *([0] * (8 - len(values)))], dtype=mx.uint32)


@lru_cache
def bounds_registers() -> bool:
    """Whether Apple's compiler takes the number of threads as an attribute of a kernel
    where MLX lets one be put, tried on a kernel that does nothing else."""
    if not mx.metal.is_available():
        return False
    source = "out[thread_position_in_grid.x] = THREADS;"
    trial = Kernel("trial", [], ["out"], source).metal([], 32, bounded=True)
    try:
        out = trial(
            inputs=[],
            grid=(32, 1, 1),
            threadgroup=(32, 1, 1),
            output_shapes=[(32,)],
            output_dtypes=[mx.uint32],
        )
        return bool(mx.all(out[0] == 32).item())
    except (RuntimeError, ValueError):
        return False


# Threads per threadgroup that are tried in turn.
GROUPS = (1024, 512, 256)


def largest_group(variant: str, most: int, check: Callable[[int], None]) -> int:
    """With how many threads per threadgroup the kernel runs here; 0 where plain MLX
    has to stand in for it.

    MLX refuses a launch where a kernel needs more registers than so many threads have.
    Fewer are tried then, before it is given up.

    Args:
        variant (str): The kernel and what its code depends on, but for the threads.
        most (int): How many threads it is written for.
        check (Callable): Runs the kernel with a number of threads, on small inputs that
          make it run all of its code, and raises if it differs from its reference.
    """
    device = kind()
    if device == "plain":
        return 0
    if variant not in states:
        state = states[variant] = attempt(most, check)
        if not state.threads:
            warnings.warn(
                f"mlx-flashhead: plain MLX replaces the kernel {variant} on "
                f"{device_name()} ({device}, MLX {mlx_version()}): {state.words}",
                RuntimeWarning,
                stacklevel=3,
            )
    return states[variant].threads


def runs(variant: str, threads: int, check: Callable[[int], None]) -> bool:
    """Whether the kernel runs here with so many threads; where it does not, another is
    to take its place, so nothing is warned of.

    Args:
        variant (str): The kernel and what its code depends on.
        threads (int): Threads per threadgroup.
        check (Callable): As for :func:`largest_group`.
    """
    if kind() == "plain":
        return False
    if variant not in states:
        states[variant] = attempt(threads, check, (threads,))
    return states[variant].threads > 0


def attempt(
    most: int, check: Callable[[int], None], groups: Sequence[int] = GROUPS
) -> State:
    """With how many threads, of at most ``most``, ``check`` passes: see
    :func:`largest_group`."""
    failures = []
    for threads in [n for n in groups if n <= most] or [most]:
        try:
            check(threads)
        except Exception as error:  # whatever the device's compiler or runtime says
            reason = " ".join(str(error).split())[:300]
            failures.append(f"{type(error).__name__}: {reason}")
            continue
        more = f"; with more, {failures[0]}" if failures else ""
        return State(threads, f"ok, {threads} threads{more}")
    return State(0, failures[0])


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
