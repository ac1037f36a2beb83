"""Compiles and runs the Metal that MLX would hand to Apple's compiler.

``capture`` gets the exact text out of MLX, ``check`` compiles it with Metal's address
spaces enforced, ``build`` makes a program of it, and ``run`` executes that on the CPU
under several thread schedules. ``launch`` does all of it in the place of
``Kernel.__call__``.
"""

import hashlib
import importlib.util
import os
import re
import struct
import subprocess
import sys
import tempfile
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np

HERE = Path(__file__).parent
CACHE = Path(tempfile.gettempdir()) / f"flashhead-metal-{os.getuid()}"
SCHEDULES = ("in-order", "reversed", "random-1", "random-2")

# Numbers that emu_position knows, by Metal's attribute.
_VECTORS = {
    "thread_position_in_threadgroup": 0,
    "threadgroup_position_in_grid": 1,
    "thread_position_in_grid": 2,
    "threads_per_threadgroup": 3,
    "threads_per_grid": 4,
}
_SCALARS = {
    "thread_index_in_simdgroup": "emu_lane()",
    "simdgroup_index_in_threadgroup": "emu_position(0, 0) / 32",
}


class MetalError(Exception):
    """The text does not compile, or the run broke a rule."""


class Compiler(NamedTuple):
    """A C++ compiler, the sanitizers that it can link, and its flags for linking."""

    command: tuple[str, ...]
    sanitizers: str
    linking: tuple[str, ...] = ()


@lru_cache
def find_compiler() -> Compiler:
    """The compiler of the ``ziglang`` package, else clang++; the environment variable
    METAL_CXX names another command. With the sanitizers that it has: clang's find more.

    Raises:
        MetalError: If there is none.
    """
    linking: tuple[str, ...] = ()
    if named := os.environ.get("METAL_CXX"):
        command = tuple(named.split())
    elif importlib.util.find_spec("ziglang"):
        command = (sys.executable, "-m", "ziglang", "c++")
        # It has the C++ library as source, and building that takes a minute.
        linking = ("-nostdlib++",)
    else:
        command = ("clang++",)
    for sanitizers in ("address,undefined", "undefined", ""):
        compiler = Compiler(command, sanitizers, linking)
        try:
            _runtime(compiler)
            return compiler
        except (MetalError, OSError) as e:
            cause = e
    raise MetalError(
        f"{' '.join(command)} makes no program: install the package ziglang, or name a"
        " clang++ in the environment variable METAL_CXX"
    ) from cause


def _flags(compiler: Compiler) -> list[str]:
    flags = ["-O1", "-g1", "-fno-omit-frame-pointer", "-ffp-contract=off", "-w"]
    if compiler.sanitizers:
        flags += [f"-fsanitize={compiler.sanitizers}", "-fno-sanitize-recover=all"]
    else:
        flags += ["-fno-sanitize=all"]
    return flags


def _execute(command: list[str], cwd: Path = HERE) -> str:
    env = {
        **os.environ,
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=0",
    }
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env)
    if done.returncode:
        raise MetalError(done.stderr[:4000] or f"{command[0]}: {done.returncode}")
    return done.stdout


def _cached(key: str, suffix: str, make) -> Path:
    """``make(path)`` once for each key; the name appears when the file is complete."""
    CACHE.mkdir(exist_ok=True, mode=0o700)
    path = CACHE / (hashlib.sha256(key.encode()).hexdigest()[:32] + suffix)
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            made = Path(folder) / path.name
            make(made)
            made.replace(path)
    return path


@lru_cache
def _runtime(compiler: Compiler) -> Path:
    """The emulator's object file, after a trial run of a program linked with it."""
    source = HERE / "emulator.cpp"
    key = f"{compiler}{source.read_text()}"

    def make(path: Path) -> None:
        flags = [*_flags(compiler), "-std=c++17", "-fno-exceptions", "-fno-rtti"]
        flags.append("-D_LIBCPP_VERBOSE_ABORT(...)=__builtin_abort()")
        _execute([*compiler.command, *flags, "-c", str(source), "-o", str(path)])
        flags += compiler.linking
        trial = path.with_name("trial.cpp")
        trial.write_text('extern "C" void emu_entry() {}')
        program = path.with_name("trial")
        _execute([*compiler.command, *flags, str(trial), str(path), "-o", str(program)])
        job, result = path.with_name("job"), path.with_name("result")
        job.write_bytes(struct.pack("<8q", 64, 1, 1, 64, 1, 1, 0, 0))
        _execute([str(program), str(job), str(result), *SCHEDULES])

    return _cached(key, ".o", make)


def capture(kernel, inputs, template, groups, threads, outputs) -> str:
    """The text of a kernel as MLX generates it for this launch."""
    call = partial(
        kernel.metal(template, threads, bounded=True),
        grid=(groups[0] * threads, groups[1], 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[shape for shape, _ in outputs],
        output_dtypes=[dtype for _, dtype in outputs],
        verbose=True,
        stream=mx.gpu,
    )
    sys.stdout.flush()
    with tempfile.TemporaryFile() as log, tempfile.TemporaryDirectory() as folder:
        stdout = os.dup(1)
        os.dup2(log.fileno(), 1)
        try:
            mx.export_function(
                f"{folder}/kernel.mlxfn", lambda *args: call(inputs=args), *inputs
            )
        finally:
            os.dup2(stdout, 1)
            os.close(stdout)
        log.seek(0)
        text = log.read().decode()
    return text[text.index("```\n") + 4 : text.rindex("\n```")]


class _Parameter(NamedTuple):
    type: str
    name: str
    is_reference: bool
    buffer: int | None


def _parse(text: str) -> tuple[str, str, list[_Parameter]]:
    """The text without its instantiation, the instance's name, the parameters."""
    text, _, instance = text.partition("\ntemplate [[host_name(")
    name = re.search(r"\[\[kernel\]\] void (\w+)\(", text)
    if instance:
        called = re.search(r"decltype\((.*?)\) ", instance, re.S).group(1)
    else:
        called = name.group(1)
    parameters = []
    for line in text[name.end() :].split(") {\n")[0].splitlines():
        if match := re.match(
            r"\s+(.*?)([*&]?) (\w+) \[\[(\w+)(?:\((\d+)\))?\]\]", line
        ):
            kind, mark, parameter, attribute, index = match.groups()
            parameters.append(
                _Parameter(
                    kind + mark.replace("&", "*"),
                    parameter,
                    mark == "&",
                    int(index) if attribute == "buffer" else None,
                )
            )
    return text, called, parameters


_SHARED = re.compile(r"\bthreadgroup (\w+) (\w+)((?:\[[^\]]*\])+);")


def check(text: str) -> None:
    """Compile with Metal's address spaces enforced, in Metal's C++14.

    Raises:
        MetalError: With the compiler's message.
    """
    compiler = find_compiler()
    body, called, _ = _parse(text)
    # A host compiler wants threadgroup arrays static.
    body = _SHARED.sub(r"static threadgroup \1 \2\3;", body)
    # Taking its address instantiates the template.
    source = f'#include "metal_host.h"\n#line 1\n{body}\nauto instance = &{called};\n'
    header = (HERE / "metal_host.h").read_text()

    def make(path: Path) -> None:
        file = path.with_suffix(".cpp")
        file.write_text(source)
        flags = ["-std=c++14", "-DMETAL_ADDRESS_SPACES", "-w", f"-I{HERE}"]
        _execute(
            [*compiler.command, *flags, "-S", "-emit-llvm", str(file), "-o", str(path)]
        )

    _cached(f"check{compiler}{header}{source}", ".ll", make)


def build(text: str) -> Path:
    """A program that runs the text on the emulator.

    Raises:
        MetalError: If it does not compile.
    """
    compiler = find_compiler()
    body, called, parameters = _parse(text)
    # The emulator hands out threadgroup memory; a line of the source is its name.
    body = _SHARED.sub(r"auto& \2 = emu::shared<\1\3>(__LINE__);", body)
    arguments = []
    for p in parameters:
        if p.buffer is not None:
            pointer = f"({p.type})emu_buffer({p.buffer})"
            arguments.append(f"*{pointer}" if p.is_reference else pointer)
        elif p.name in _VECTORS:
            arguments.append(f"emu::position({_VECTORS[p.name]})")
        else:
            arguments.append(_SCALARS[p.name])
    entry = f"{called}({', '.join(arguments)});"
    source = (
        f'#include "metal_host.h"\n#line 1\n{body}\n'
        f'extern "C" void emu_entry() {{ {entry} }}\n'
    )
    header = (HERE / "metal_host.h").read_text()
    runtime = _runtime(compiler)

    def make(path: Path) -> None:
        file = path.with_suffix(".cpp")
        file.write_text(source)
        flags = [
            *_flags(compiler),
            *compiler.linking,
            "-std=c++14",
            f"-I{HERE}",
            "-fsanitize-coverage=func,trace-loads,trace-stores",
        ]
        _execute([*compiler.command, *flags, str(file), str(runtime), "-o", str(path)])

    return _cached(f"{runtime}{header}{source}", "", make)


def _bytes(array: mx.array) -> bytes:
    if array.dtype == mx.bfloat16:
        array = array.view(mx.uint16)
    return np.array(array).tobytes()


def run(
    text,
    inputs,
    groups,
    threads,
    outputs,
    schedules=SCHEDULES,
    flush_subnormals=False,
) -> list[mx.array]:
    """Execute the text; the outputs, which are the same under all schedules.

    Args:
        flush_subnormals: Whether subnormal numbers are zero.

    Raises:
        MetalError: On a divergent simd function or barrier, a data race, an access
          out of range, an output that depends on the schedule or is not written, or
          whatever the sanitizers find.
    """
    program = build(text)
    _, _, parameters = _parse(text)
    buffers = [p for p in parameters if p.buffer is not None]
    n_outputs = len(outputs)
    data, arrays, previous = [], iter(inputs), None
    for p in buffers[:-n_outputs]:
        if previous is not None and p.name.endswith(("_shape", "_strides", "_ndim")):
            shape = np.array(previous.shape, dtype=np.int64)
            if p.name.endswith("_shape"):
                data.append(shape.astype(np.int32).tobytes())
            elif p.name.endswith("_ndim"):
                data.append(np.int32(previous.ndim).tobytes())
            else:
                strides = np.cumprod([1, *shape[:0:-1]], dtype=np.int64)[::-1]
                data.append(strides.tobytes())
        else:
            previous = next(arrays)
            data.append(_bytes(previous))
    sizes = [int(np.prod(shape)) * dtype.size for shape, dtype in outputs]
    header = [groups[0] * threads, groups[1], 1, threads, 1, 1]
    header += [int(flush_subnormals), len(buffers)]
    for chunk in data:
        header += [0, len(chunk)]
    for size in sizes:
        header += [1, size]
    with tempfile.TemporaryDirectory() as folder:
        job, result = Path(folder) / "job", Path(folder) / "result"
        job.write_bytes(struct.pack(f"<{len(header)}q", *header) + b"".join(data))
        _execute([str(program), str(job), str(result), *schedules])
        raw = result.read_bytes()
    results = []
    for (shape, dtype), size in zip(outputs, sizes):
        numpy = {mx.float32: np.float32, mx.uint32: np.uint32}[dtype]
        results.append(mx.array(np.frombuffer(raw[:size], numpy).reshape(shape)))
        raw = raw[size:]
    return results


def device(max_threads=1024, flush_subnormals=False, schedules=SCHEDULES):
    """A device: a function that takes the place of ``Kernel.__call__``. It checks,
    builds and runs.

    Args:
        max_threads: How many threads of a threadgroup its registers are enough for.
            With more it does what MLX does, which asks the compiled kernel.
        flush_subnormals: Whether subnormal numbers are zero on it.
        schedules: How threads take turns.
    """

    def launch(kernel, inputs, *, template, groups, threads, outputs):
        text = capture(kernel, inputs, template, groups, threads, outputs)
        check(text)
        bound = re.search(r"max_total_threads_per_threadgroup\((\d+)\)", text)
        allowed = min(max_threads, int(bound.group(1)) if bound else max_threads)
        if threads > allowed:
            raise ValueError(
                f"Thread group size ({threads}) is greater than  the maximum allowed "
                f"threads per threadgroup ({allowed})."
            )
        return run(text, inputs, groups, threads, outputs, schedules, flush_subnormals)

    return launch


launch = device()
