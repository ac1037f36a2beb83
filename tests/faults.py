"""Faults, made on purpose and counted: ``python tests/faults.py --help``.

Each function does one kind of harm a number of times and returns what came of it, by
name; it raises AssertionError at the first outcome that must not be. test_faults.py
does a few of each; the script does as many as are asked for.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import mlx.core as mx
import mlx_lm
import numpy as np
import small_models
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from mlx_flashhead.convert import convert
from mlx_flashhead.convert.gguf import GGUFError, read_gguf
from mlx_flashhead.convert.gguf.tokenizer import build_tokenizer
from mlx_flashhead.convert.published import ClustersError, read_clusters
from mlx_lm.utils import load_model

from mlx_flashhead import flash_heads, load
from mlx_flashhead.folder import format as files
from mlx_flashhead.folder import integrity
from mlx_flashhead.folder.section import (
    CONFIG_KEY,
    HEAD_FILE,
    FormatError,
    read_section,
    section_sha256,
)
from mlx_flashhead.integration import decode
from mlx_flashhead.integration.loading import install

VOCAB = 1003
PROMPT = mx.array([[84, 104, 101, 32, 113, 117, 105, 99, 107]])


def small_folder(parent: Path, name: str = "llama") -> Path:
    """A small converted model."""
    source = small_models.write(name, parent / "source", VOCAB, dtype="bfloat16")
    options = {"cluster_size": 8, "n_probes": 90, "verbose": False}
    convert(str(source), parent / "model", **options)
    return parent / "model"


def peak() -> int:
    """Most bytes of memory that this process has held."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# ---------------------------------------------------------------------------
# Mutated folders
# ---------------------------------------------------------------------------

HOSTILE = [None, True, -1, 0, 1, 2, 3, 7, 10**30, 2**63, 1e308, -1.5, "", "x" * 5000]
HOSTILE += [[], {}, [[]], {"a": {"b": []}}, "../../etc/passwd", "\0", [1e999], [None]]
JSONS = ["config.json", "tokenizer_config.json", "tokenizer.json"]
JSONS += ["model.safetensors.index.json"]
WEIGHTS = [HEAD_FILE, "model.safetensors"]


def _read_tensors(file: Path) -> dict[str, mx.array]:
    tensors = mx.load(str(file))
    mx.eval(tensors)
    return tensors


def _bits(folder: Path, rng: random.Random, names: list[str]) -> None:
    file = folder / rng.choice(names)
    data = bytearray(file.read_bytes())
    for _ in range(rng.choice([1, 1, 1, 2, 50])):
        # The header of a weight file is where the danger is.
        end = len(data) if rng.random() < 0.6 else min(len(data), 4000)
        data[rng.randrange(end)] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def bit_flips_in_weights(folder, rng):
    _bits(folder, rng, WEIGHTS)


def bit_flips_in_json(folder, rng):
    _bits(folder, rng, JSONS)


def truncation(folder, rng):
    file = folder / rng.choice(WEIGHTS + JSONS)
    size = file.stat().st_size
    os.truncate(file, rng.choice([0, 1, 8, size - 1, rng.randrange(size)]))


def insertion(folder, rng):
    file = folder / rng.choice(WEIGHTS + JSONS)
    data = file.read_bytes()
    at = rng.randrange(len(data) + 1)
    file.write_bytes(data[:at] + rng.randbytes(rng.choice([1, 8, 1000])) + data[at:])


def missing_file(folder, rng):
    (folder / rng.choice(WEIGHTS + JSONS)).unlink()


def _edit(folder: Path, rng: random.Random, name: str, edit) -> None:
    """Edit tensors, and in half of the cases make the digests fit again."""
    tensors = _read_tensors(folder / name)
    edit(tensors)
    mx.save_safetensors(str(folder / name), tensors, {"format": "mlx"})
    if rng.random() < 0.5:
        files.seal(folder, read_section(folder), integrity.weight_files(folder))


def wrong_shapes(folder, rng):
    def edit(tensors):
        name = rng.choice(sorted(tensors))
        a = tensors[name]
        tensors[name] = rng.choice(
            [a[:-1], a[None], a.reshape(-1)[:-1], mx.concatenate([a, a]), a[:0]]
        )

    _edit(folder, rng, rng.choice(WEIGHTS), edit)


def wrong_types(folder, rng):
    def edit(tensors):
        name = rng.choice(sorted(tensors))
        a = tensors[name]
        others = [mx.int8, mx.int64, mx.bool_]
        tensors[name] = a.astype(rng.choice([t for t in others if t != a.dtype]))

    _edit(folder, rng, HEAD_FILE, edit)


def swapped_tensors(folder, rng):
    """Of the same shape; nothing but a digest can tell."""
    file = folder / rng.choice(WEIGHTS)
    tensors = _read_tensors(file)
    names = sorted(tensors)
    pairs = [
        (a, b)
        for a in names
        for b in names
        if a < b
        and (tensors[a].shape, tensors[a].dtype) == (tensors[b].shape, tensors[b].dtype)
    ]
    a, b = rng.choice(pairs)
    tensors[a], tensors[b] = tensors[b], tensors[a]
    mx.save_safetensors(str(file), tensors, {"format": "mlx"})


def swapped_names(folder, rng):
    """Of tensors of any shapes."""

    def edit(tensors):
        a, b = rng.sample(sorted(tensors), 2)
        tensors[a], tensors[b] = tensors[b], tensors[a]

    _edit_until_odd(folder, rng, edit)


def _edit_until_odd(folder, rng, edit):
    tensors = _read_tensors(folder / HEAD_FILE)
    edit(tensors)
    mx.save_safetensors(str(folder / HEAD_FILE), tensors, {"format": "mlx"})


def wrong_token_ids(folder, rng):
    def edit(tensors):
        ids = np.array(tensors["token_ids"])
        flat = ids.reshape(-1)
        i, j = rng.sample(range(VOCAB), 2)
        flat[i] = rng.choice([flat[j], VOCAB, VOCAB + 1, 2**32 - 1])
        tensors["token_ids"] = mx.array(ids)

    _edit(folder, rng, HEAD_FILE, edit)


def not_finite(folder, rng):
    def edit(tensors):
        name = rng.choice(["spread", "excess", "rows.scales", "centroids.biases"])
        value = rng.choice([float("nan"), float("inf"), -float("inf")])
        a = np.array(tensors[name].astype(mx.float32))
        a.reshape(-1)[rng.randrange(a.size)] = value
        tensors[name] = mx.array(a).astype(tensors[name].dtype)

    _edit(folder, rng, HEAD_FILE, edit)


def hostile_section(folder, rng):
    """Values of the config's section, the digest made to fit in half of the cases, but
    only where no other number than the right one is allowed."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    section = config[CONFIG_KEY]
    key = rng.choice(sorted(section))
    value = rng.choice(HOSTILE)
    if rng.random() < 0.2:
        config[CONFIG_KEY] = value
    elif isinstance(section[key], dict) and rng.random() < 0.5:
        section[key][rng.choice(sorted(section[key]))] = value
    else:
        section[key] = value
    free = {"n_probes", "tail_offset", "temperatures"}
    if isinstance(config[CONFIG_KEY], dict) and key not in free and rng.random() < 0.5:
        section["sha256"] = section_sha256(section)
    file.write_text(json.dumps(config))


def hostile_json(folder, rng):
    file = folder / rng.choice(JSONS)
    content = json.loads(file.read_text())
    keys = [k for k in content if k != CONFIG_KEY]
    where = content
    key = rng.choice(keys)
    while isinstance(where[key], dict) and where[key] and rng.random() < 0.5:
        where = where[key]
        key = rng.choice(sorted(where))
    if rng.random() < 0.15:
        del where[key]
    else:
        where[key] = rng.choice(HOSTILE)
    file.write_text(json.dumps(content))


def hostile_header(folder, rng):
    """Of a weight file: sizes that the file does not have."""
    file = folder / rng.choice(WEIGHTS)
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    name = rng.choice([k for k in header if k != "__metadata__"])
    entry = header[name]
    key = rng.choice(["shape", "data_offsets", "dtype"])
    if key == "dtype":
        entry[key] = rng.choice(["F64", "I64", "BOOL", "C64", "", 3, None])
    else:
        i = rng.randrange(len(entry[key]))
        old = entry[key][i]
        entry[key][i] = rng.choice([0, -1, 2**31, 2**40, 2**62, old + 1, 1e9, "8"])
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def garbage(folder, rng):
    file = folder / rng.choice(WEIGHTS + JSONS)
    size = rng.choice([0, 10, file.stat().st_size])
    file.write_bytes(rng.choice([rng.randbytes(size), bytes(size), b"[" * 100_000]))


MUTATIONS = [
    bit_flips_in_weights, bit_flips_in_json, truncation, insertion, missing_file,
    wrong_shapes, wrong_types, swapped_tensors, swapped_names, wrong_token_ids,
    not_finite, hostile_section, hostile_json, hostile_header, garbage,
]  # fmt: skip


TEXT = "Zwölf <|im_end|> fjords\n\t日本 12,345"


def answers(model, tokenizer) -> tuple[np.ndarray, list[int], list]:
    """Logits of a prompt, the tokens that follow it, and what the tokenizer makes of
    tokens and text."""
    logits = np.array(model(PROMPT).astype(mx.float32))
    from mlx_lm.generate import generate_step

    steps = generate_step(PROMPT[0], model, max_tokens=6)
    ids = tokenizer.encode(TEXT)
    text = [ids, tokenizer.decode(ids), tokenizer.convert_ids_to_tokens(range(VOCAB))]
    text += [sorted(tokenizer.eos_token_ids), tokenizer.apply_chat_template(CHAT)]
    return logits, [int(token) for token, _ in steps], text


CHAT = [{"role": "user", "content": "Hello"}]


def mutate(n: int, first_seed: int = 0) -> Counter:
    """Load n mutated folders: each is refused in one line as it is loaded, or gives the
    tokens, the logits and the text of the folder before; where only the plain model's
    config or tokenizer is another, those that the plain model gives (up to the rounding
    of the head). Memory stays as it is."""
    counts: Counter = Counter()
    with tempfile.TemporaryDirectory() as place:
        bases = [
            small_folder(Path(place, name), name) for name in ("llama", "llama-tied")
        ]
        wanted = [answers(*load(base)) for base in bases]
        before = peak()
        for i in range(n):
            rng = random.Random(first_seed + i)
            change = MUTATIONS[i % len(MUTATIONS)]
            which = rng.randrange(2)
            folder = Path(place, "mutated")
            shutil.copytree(bases[which], folder)
            change(folder, rng)
            what = f"{change.__name__}, seed {first_seed + i}"
            outcome = _outcome(folder, wanted[which], what)
            counts[f"{change.__name__}: {outcome}"] += 1
            counts[outcome] += 1
            assert peak() < before + (1 << 30), f"{what}: {peak():,} bytes"
            shutil.rmtree(folder)
            if i % 50 == 49:
                gc.collect()
                print(f"  {i + 1} folders", file=sys.stderr, flush=True)
    return counts


def _outcome(folder: Path, wanted, what: str) -> str:
    try:
        loaded = load(folder)
    except (FormatError, FileNotFoundError) as e:
        message = str(e)
        assert "\n" not in message and len(message) < 700, (what, message)
        assert str(folder) in message, (what, message)
        return "refused"
    except Exception as e:
        raise AssertionError(f"{what}: {type(e).__name__}: {e}") from e
    try:
        found = answers(*loaded)
    except Exception as e:
        raise AssertionError(f"{what}: loads and fails: {e}") from e
    same = np.array_equal(found[0], wanted[0]) and found[1:] == wanted[1:]
    if same:
        return "right"
    # Then it has to be what mlx-lm makes of the same plain files.
    try:
        stock = mlx_lm.load(str(folder))
        plain, _, text = answers(*stock)
        made = mx.array([[*PROMPT[0].tolist(), *found[1]]])
        follows = np.array(stock[0](made).astype(mx.float32))[0]
    except Exception as e:
        raise AssertionError(f"{what}: loads, but not as a plain model: {e}") from e
    assert text == found[2], f"{what}: loads and has another tokenizer"
    margin = 0.03 * np.ptp(plain)
    near = plain.shape == found[0].shape and np.allclose(
        plain, found[0], atol=margin, equal_nan=True
    )
    assert near, f"{what}: loads and is wrong"
    follows = follows[PROMPT.size - 1 : -1]
    lost = follows.max(-1) - follows[np.arange(len(found[1])), found[1]]
    assert not (lost > margin).any(), f"{what}: loads and chooses wrong tokens"
    return "right, as the plain model"


# ---------------------------------------------------------------------------
# Conversions that end early
# ---------------------------------------------------------------------------

CONVERT = """
import resource, signal, sys
from mlx_flashhead.convert import convert, pipeline
source, target, limit, room = sys.argv[1:]
if room == "unchecked":
    pipeline.check_space = lambda *_: None
if int(limit):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit),) * 2)
print("ready", flush=True)
sys.stdin.readline()
try:
    convert(source, target, cluster_size=8, verbose=False)
except (ValueError, OSError) as e:
    sys.exit(f"one line: {e}")
"""


def converting(source: Path, target: Path, limit: int = 0, room: str = ""):
    """A process that is about to convert, once it is sent a line."""
    process = subprocess.Popen(
        [sys.executable, "-c", CONVERT, str(source), str(target), str(limit), room],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n", process.stderr.read()
    return process


def _go(process) -> None:
    process.stdin.write("\n")
    process.stdin.flush()


def _wait(process, folder: Path, pattern: str) -> None:
    """Until something is there, or the process has ended."""
    while process.poll() is None and not any(folder.glob(pattern)):
        time.sleep(0.001)


def _assert_whole(folder: Path) -> None:
    """That it loads, and that nothing hidden is beside it."""
    assert len(list(flash_heads(load(folder)[0]))) == 1
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def kill(n: int, first_seed: int = 0) -> Counter:
    """Kill n conversions in the middle, at random moments, half of them while the
    folder is written. No target is left, or a whole one; the next conversion works and
    takes away what the killed one left."""
    counts: Counter = Counter()
    with tempfile.TemporaryDirectory() as place:
        source = small_models.write("llama", Path(place, "source"), VOCAB)
        target = Path(place, "here/model")
        process = converting(source, target)
        start = time.perf_counter()
        _go(process)
        _wait(process, target.parent, target.name)
        whole = time.perf_counter() - start
        process.communicate()
        shutil.rmtree(target)
        rng = random.Random(first_seed)
        known: set[str] = set()
        while counts["killed"] < n:
            process = converting(source, target)
            _go(process)
            if counts["killed"] % 2:
                # The folder is written in a moment at the end.
                _wait(process, target.parent, ".model*/result/*")
                time.sleep(rng.uniform(0, 0.01))
            else:
                time.sleep(rng.uniform(0, whole))
            process.kill()
            process.communicate()
            if target.exists():
                _assert_whole(target)
                counts["finished before"] += 1
                shutil.rmtree(target)
                continue
            counts["killed"] += 1
            here = target.parent
            left = [p.name for p in here.iterdir()] if here.exists() else []
            assert all(name.startswith(".model.partial-") for name in left), left
            # What was killed before it had swept has left another's.
            assert len(left) <= 1, left
            counts["left a hidden folder"] += bool(set(left) - known)
            counts["killed while writing"] += any(here.glob(".model*/result/*"))
            known = set(left)
            # A retry takes as long as the conversion; one in five, and the last.
            if counts["killed"] % 5 == 0 or counts["killed"] == n:
                convert(str(source), target, cluster_size=8, verbose=False)
                _assert_whole(target)
                counts["retried"] += 1
                shutil.rmtree(target)
    return counts


def fill_disk(n: int, first_seed: int = 0) -> Counter:
    """Convert n times to a disk that is too small: a real one where this process may
    mount one, else with a limit on the size of files. Nothing is left."""
    counts: Counter = Counter()
    with tempfile.TemporaryDirectory() as place:
        source = small_models.write("llama", Path(place, "source"), VOCAB)
        for i in range(n):
            kilobytes = random.Random(first_seed + i).randint(8, 900)
            disk = Path(place, "disk")
            disk.mkdir()
            size = f"size={kilobytes}k"
            mount = ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(disk)]
            mounted = not subprocess.run(mount, capture_output=True).returncode
            try:
                limit = 0 if mounted else kilobytes * 1024 // 2
                process = converting(source, disk / "model", limit, "unchecked")
                _, errors = process.communicate("\n")
                left = [p.name for p in disk.iterdir()]
                if process.returncode == 0:
                    _assert_whole(disk / "model")
                    counts["fitted"] += 1
                    continue
                assert errors.startswith("one line: "), errors
                assert errors.count("\n") == 1 and "space" in errors, errors
                assert left == [], left
                counts[f"full, {'disk' if mounted else 'limit'}"] += 1
            finally:
                if mounted:
                    subprocess.run(["umount", str(disk)], check=True)
                shutil.rmtree(disk)
    return counts


def race(n: int) -> Counter:
    """Two processes convert to one target, n times: one makes it, the other says so."""
    counts: Counter = Counter()
    with tempfile.TemporaryDirectory() as place:
        source = small_models.write("llama", Path(place, "source"), VOCAB)
        target = Path(place, "here/model")
        for _ in range(n):
            both = [converting(source, target) for _ in range(2)]
            for process in both:
                _go(process)
            errors = [process.communicate()[1] for process in both]
            codes = sorted(process.returncode for process in both)
            assert codes == [0, 1], errors
            (message,) = [e for e in errors if e]
            assert message.startswith("one line: ") and message.count("\n") == 1
            _assert_whole(target)
            shutil.rmtree(target)
            counts["one of two"] += 1
    return counts


# ---------------------------------------------------------------------------
# Long runs
# ---------------------------------------------------------------------------


def resident() -> int:
    """Bytes of memory that this process holds."""
    if not Path("/proc/self/statm").exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def decode_long(n: int, sampler=None) -> Counter:
    """Decode n tokens with a rotating cache: MLX's memory, and the process's, at each
    fifth of the way. From the first to the last they do not grow."""
    from mlx_lm.generate import generate_step
    from mlx_lm.models.cache import RotatingKVCache
    from mlx_lm.sample_utils import make_sampler

    counts: Counter = Counter()
    with tempfile.TemporaryDirectory() as place:
        model, _ = load(small_folder(Path(place)))
        steps = generate_step(
            PROMPT[0],
            model,
            max_tokens=n,
            prompt_cache=[RotatingKVCache(256, keep=4) for _ in model.layers],
            sampler=make_sampler(1.0, top_p=0.95) if sampler else None,
        )
        assert decode.head_of(model) is not None
        for i, _ in enumerate(steps, 1):
            if i % (n // 5) == 0:
                gc.collect()
                counts[f"active bytes after {i:6}"] = mx.get_active_memory()
                counts[f"resident bytes after {i:6}"] = resident()
        counts["tokens"] = i
    for kind, room in (("active", 1 << 16), ("resident", 8 << 20)):
        held = [v for name, v in counts.items() if name.startswith(kind)]
        assert len(held) == 5 and held[-1] < held[0] + room, counts
    return counts


def serve(n_clients: int, rounds: int) -> Counter:
    """Streaming clients at once, a third cut off in the middle: all get what they get
    alone, as far as they stay. The server stops working for those that left, and holds
    no more threads, files or memory."""
    from test_server import serving, streamed

    counts: Counter = Counter()
    with tempfile.TemporaryDirectory() as place:
        folder = small_folder(Path(place))
        log = Path(place, "log")
        words = ("mlx_flashhead.server", "--model", str(folder))
        with serving(*words, log=log) as client:
            port = client.base_url.port
            texts = [f"Client {i} asks {i * i}" for i in range(n_clients)]
            alone = [streamed(client, text, 24) for text in texts]
            assert len(set(alone)) > 0.9 * n_clients

            def ask(i: int) -> str:
                if i % 3 == 2:
                    stream = client.chat.completions.create(
                        model="default_model",
                        messages=[{"role": "user", "content": texts[i]}],
                        max_tokens=100_000,
                        temperature=0.0,
                        stream=True,
                    )
                    got = ""
                    for chunk in stream:
                        got += chunk.choices[0].delta.content or ""
                        if len(got) > 3 + i % 9:
                            break
                    stream.close()
                    k = min(len(got), len(alone[i]))
                    cut = k > 3 and got[:k] == alone[i][:k]
                    return "cut off" if cut else f"wrong: {got!r}, {alone[i]!r}"
                got = streamed(client, texts[i], 24)
                return "right" if got == alone[i] else f"wrong: {got!r}, {alone[i]!r}"

            held = [_held_at_rest(port)]
            for _ in range(rounds):
                with ThreadPoolExecutor(n_clients) as pool:
                    counts.update(pool.map(ask, range(n_clients)))
                held.append(_held_at_rest(port))
            assert streamed(client, texts[0], 24) == alone[0]
    wrong = [name for name in counts if name.startswith("wrong")]
    assert not wrong, wrong
    if Path("/proc").exists():
        for name in held[0]:
            for r, now in enumerate(held):
                counts[f"{name} after {r} rounds"] = now[name]
        assert held[-1]["threads"] <= held[0]["threads"] + 2, counts
        assert held[-1]["files"] <= held[0]["files"] + 2, counts
        # Two rounds fill the caches of prompts.
        before = held[min(2, rounds)]["kilobytes"]
        assert held[-1]["kilobytes"] <= 1.1 * before + 16_384, counts
    return counts


def _held_at_rest(port: int) -> dict[str, int]:
    """What the server on a port holds once it has nothing more to do."""
    if not Path("/proc").exists():
        return {}
    for _ in range(60):
        before = _held(port)
        time.sleep(0.5)
        held = _held(port)
        if held.pop("ticks") - before["ticks"] < 10:
            return held
    raise AssertionError("the server works on for clients that left")


def _held(port: int) -> dict[str, int]:
    """What the server on a port holds, as /proc says."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (process / "cmdline").read_bytes().split(b"\0")
            if str(port).encode() in words and b"mlx_flashhead.server" in words:
                status = (process / "status").read_text()
                fields = dict(x.split(":", 1) for x in status.splitlines())
                times = (process / "stat").read_text().rsplit(")", 1)[1].split()
                return {
                    "ticks": int(times[11]) + int(times[12]),
                    "threads": int(fields["Threads"]),
                    "files": len(list((process / "fd").iterdir())),
                    "kilobytes": int(fields["VmRSS"].split()[0]),
                }
    raise AssertionError("no such server")


# ---------------------------------------------------------------------------
# Fuzzing
# ---------------------------------------------------------------------------


def fuzz(seconds: float, first_seed: int = 0) -> Counter:
    """Give the readers of GGUF files, of configs and of safetensors headers what is
    made up or damaged, for so long: only their own one-line errors may come of it, and
    no more memory be taken."""
    counts: Counter = Counter()
    with tempfile.TemporaryDirectory() as place:
        readers = [
            _fuzz_gguf(Path(place)),
            _fuzz_folder(Path(place, "bytes")),
            _fuzz_sidecar(Path(place, "sidecar")),
            _fuzz_values(Path(place, "values")),
            _fuzz_clusters(Path(place, "clusters")),
        ]
        n, before, end = 0, peak(), time.monotonic() + seconds
        # A busy machine gets its share of them, too.
        while n < 20 or time.monotonic() < end:
            for reader in readers:
                start = time.process_time()
                reader(first_seed + n, counts)
                took = int(1000 * (time.process_time() - start))
                counts["ms, slowest"] = max(took, counts["ms, slowest"])
                assert peak() < before + (1 << 30), f"seed {first_seed + n}: memory"
            n += 1
        counts["peak bytes, grown"] = peak() - before
    return counts


def _damage(data: bytes, rng: random.Random, end: int) -> bytes:
    """Bytes changed, cut out, doubled or replaced by dangerous numbers."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5])):
        i = rng.randrange(min(end, len(out)) or 1)
        way = rng.randrange(5)
        if way == 0:
            out[i : i + 1] = bytes([rng.randrange(256)])
        elif way == 1:
            size = rng.choice([4, 8])
            value = rng.choice(
                [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1]
            )
            out[i : i + size] = (value % 256**size).to_bytes(size, "little")
        elif way == 2:
            del out[i : i + rng.randrange(1, 40)]
        elif way == 3:
            out[i:i] = out[i : i + rng.randrange(1, 40)]
        else:
            out[i : i + 4] = rng.choice([b"null", b"[[[[", b'"""\\', b"1e99", b"-1,-"])
    return bytes(out)


def _fuzz_gguf(place: Path):
    from test_gguf import gguf_tensors, reference_model, write_gguf

    wholes = []
    for arch in ("llama", "gemma3", "qwen2", "qwen3"):
        tensors = gguf_tensors(arch, reference_model(arch))
        file = write_gguf(place / f"{arch}.gguf", arch, tensors)
        wholes.append(file.read_bytes())
    path = place / "m.gguf"

    def run(seed: int, counts: Counter) -> None:
        rng = random.Random(seed)
        whole = rng.choice(wholes)
        path.write_bytes(_damage(whole, rng, rng.choice([400, 4000, len(whole)])))
        counts["GGUF"] += 1
        try:
            model = read_gguf(path)
            for _ in model.tensors("float32"):
                pass
            build_tokenizer(path, model._vocabulary)
        except GGUFError as e:
            assert "\n" not in str(e), (seed, str(e))
            counts["GGUF refused"] += 1
        except Exception as e:
            raise AssertionError(f"GGUF, seed {seed}: {type(e).__name__}: {e}") from e

    return run


def _check(folder: Path) -> None:
    section = read_section(folder)
    integrity.check_sizes(folder)
    if section is not None:
        files.load_head(folder, section)


def _fuzz_folder(place: Path):
    folder = small_folder(place)
    wholes = {n: (folder / n).read_bytes() for n in ("config.json", *WEIGHTS)}

    def run(seed: int, counts: Counter) -> None:
        rng = random.Random(seed)
        name = rng.choice(list(wholes))
        end = 4000 if name in WEIGHTS else 10**9
        (folder / name).write_bytes(_damage(wholes[name], rng, end))
        counts["folder"] += 1
        try:
            _check(folder)
        except FormatError as e:
            assert "\n" not in str(e), (seed, str(e))
            counts["folder refused"] += 1
        except Exception as e:
            raise AssertionError(f"folder, seed {seed}: {type(e).__name__}: {e}") from e
        finally:
            (folder / name).write_bytes(wholes[name])

    return run


def _fuzz_sidecar(place: Path):
    """Bytes of a sidecar's header, its section among them."""
    source = small_models.write("llama-tied", place / "source", VOCAB, dtype="bfloat16")
    file = place / "head.safetensors"
    convert(str(source), sidecar=file, cluster_size=8, n_probes=90, verbose=False)
    whole = file.read_bytes()
    wanted = install(load_model(source)[0], file)(PROMPT)
    models = [load_model(source)[0]]

    def run(seed: int, counts: Counter) -> None:
        file.write_bytes(_damage(whole, random.Random(seed), 4000))
        counts["sidecar"] += 1
        try:
            install(models[0], file)
        except FormatError as e:
            assert "\n" not in str(e), (seed, str(e))
            assert not list(flash_heads(models[0])), seed
            counts["sidecar refused"] += 1
        except Exception as e:
            what = f"{type(e).__name__}: {e}"
            raise AssertionError(f"sidecar, seed {seed}: {what}") from e
        else:
            # Of what was changed nothing is asked for.
            assert mx.array_equal(models[0](PROMPT), wanted), seed
            models[0] = load_model(source)[0]

    return run


_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)


def _fuzz_values(place: Path):
    """Values of every kind in a config, by hypothesis."""
    folder = small_folder(place)
    whole = json.loads((folder / "config.json").read_text())
    section = whole[CONFIG_KEY]
    nested = [(k, n) for k in ("rows", "centroids", "files") for n in section[k]]
    places = [(k,) for k in section] + nested

    def run(number: int, counts: Counter) -> None:
        @settings(
            max_examples=25,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @seed(number)
        @given(st.sampled_from(places), _values, st.sampled_from([1, 2, 3, 4]))
        def one(where, value, version):
            config = json.loads(json.dumps(whole))
            part = config[CONFIG_KEY]
            part["format_version"] = version
            for key in where[:-1]:
                part = part[key]
            part[where[-1]] = value
            (folder / "config.json").write_text(json.dumps(config))
            counts["values"] += 1
            try:
                _check(folder)
            except FormatError as e:
                assert "\n" not in str(e), (number, str(e))
                counts["values refused"] += 1

        one()

    return run


def _fuzz_clusters(place: Path):
    from test_clusters import D, V, publish

    assets = publish(place) / "flash_head_assets"
    wholes = {file: file.read_bytes() for file in assets.iterdir()}

    def run(seed: int, counts: Counter) -> None:
        rng = random.Random(seed)
        file = rng.choice(sorted(wholes))
        file.write_bytes(_damage(wholes[file], rng, 600))
        counts["clusters"] += 1
        try:
            read_clusters(str(place), V, D)
        except ClustersError as e:
            assert "\n" not in str(e), (seed, str(e))
            counts["clusters refused"] += 1
        except Exception as e:
            raise AssertionError(f"clusters, seed {seed}: {type(e).__name__}") from e
        finally:
            file.write_bytes(wholes[file])

    return run


# ---------------------------------------------------------------------------
# The script
# ---------------------------------------------------------------------------


KINDS = {
    "mutate": lambda n, seed: mutate(n or 1000, seed),
    "kill": lambda n, seed: kill(n or 50, seed),
    "disk": lambda n, seed: fill_disk(n or 20, seed),
    "race": lambda n, _: race(n or 10),
    "decode": lambda n, _: decode_long(n or 10_000),
    "sample": lambda n, _: decode_long(n or 10_000, True),
    "serve": lambda n, _: serve(32, n or 5),
    "fuzz": lambda n, seed: fuzz(n or 600, seed),
}


@click.command()
@click.argument("kind", type=click.Choice(list(KINDS)))
@click.option("-n", type=int, help="How many; seconds of fuzzing.")
@click.option("--seed", "first_seed", default=0)
def main(kind: str, n: int | None, first_seed: int) -> None:
    """Do one kind of harm many times and print what came of it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    start = time.perf_counter()
    counts = KINDS[kind](n, first_seed)
    for name, value in sorted(counts.items()):
        print(f"{kind:8}{name:44}{value:>14,}")
    print(f"{kind:8}{'seconds':44}{time.perf_counter() - start:>14.0f}")


if __name__ == "__main__":
    main()
