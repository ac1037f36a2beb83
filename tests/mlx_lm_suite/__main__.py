"""mlx-lm's own tests, stock and patched: ``PYTHONPATH=tests python -m mlx_lm_suite``.

They load a model of the hub. In its place they find SmolLM2-135M-Instruct, converted:
stock mlx-lm reads the plain model of the folder, patched mlx-lm its FlashHead. What
fails patched has to fail stock; :mod:`mlx_lm_suite.expected` names what may.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

import real_models

from .expected import CHANCE, OTHER_MODEL

FILES = [
    "test_sample_utils.py",
    "test_generate.py",
    "test_server.py",
    "test_prompt_cache.py",
]
HUB_MODEL = "mlx-community/Qwen1.5-0.5B-Chat-4bit"  # that they load

# Of one run: what pytest says of each test that failed, and None for each that passed.
Outcome = dict[str, str | None]


def stand_in_for_the_hub(cache: Path, model: Path) -> None:
    """Lay a folder where the hub's client looks for a model that it has fetched."""
    repo = cache / f"models--{HUB_MODEL.replace('/', '--')}"
    commit = "0" * 40
    for part in ("refs", "snapshots"):
        (repo / part).mkdir(parents=True)
    (repo / "refs/main").write_text(commit)
    (repo / "snapshots" / commit).symlink_to(model, target_is_directory=True)


def start(mode: str, scratch: Path) -> subprocess.Popen[bytes]:
    """Run the tests ``stock`` or ``patched``, with a report and a log by that name."""
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short"]
    command += ["-p", "mlx_lm_suite.plugin", "-p", "no:cacheprovider"]
    command += [f"--junitxml={scratch / mode}.xml", *FILES]
    environment = {
        **os.environ,
        "MLX_LM_SUITE": mode,
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "HF_HUB_CACHE": str(scratch / "hub"),
        "HF_HUB_OFFLINE": "1",
        "MLX_FLASHHEAD": "1",
        "MLX_FLASHHEAD_CACHE": str(scratch),
        # Both run at once, and a BLAS that spins on every core halves them.
        "OPENBLAS_NUM_THREADS": "1",
    }
    with (scratch / f"{mode}.log").open("wb") as log:
        return subprocess.Popen(
            command,
            cwd=real_models.mlx_lm_tests(),
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def outcome(report: Path) -> Outcome:
    """Read a report of pytest. Its exit status is not asked for: an interpreter may
    die of mlx-lm's threads when all is done."""
    found: Outcome = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = ".".join([*case.get("classname", "").split(".")[-2:], case.get("name")])
        said = [part.text for part in case if part.tag in ("failure", "error")]
        found[name] = said[0] if said else None
    return found


def problems(stock: Outcome, patched: Outcome) -> Iterator[str]:
    """What is not as expected, a line each; the failure itself follows the line."""
    for name in sorted(stock.keys() ^ patched.keys()):
        yield f"{name}: ran only {'stock' if name in stock else 'patched'}"
    named = CHANCE | OTHER_MODEL
    for name, said in stock.items():
        if said is not None and name not in CHANCE | OTHER_MODEL:
            yield f"{name}: fails in stock mlx-lm, so it says nothing here\n{said}"
    for name, said in patched.items():
        if said is not None and name not in named:
            yield f"{name}: fails patched and not in stock mlx-lm\n{said}"
    for name in sorted(named):
        passes = name in OTHER_MODEL and stock.get(name) is None
        if passes or name not in stock:
            what = "passes now" if name in stock else "is no test of this mlx-lm"
            yield f"{name}: {what}; remove it from mlx_lm_suite/expected.py"


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        model = real_models.converted(real_models.smollm_gguf(), briefly=False).folder
        stand_in_for_the_hub(scratch / "hub", model)
        runs = {mode: start(mode, scratch) for mode in ("stock", "patched")}
        found: dict[str, Outcome] = {}
        for mode, run in runs.items():
            run.wait()
            report = scratch / f"{mode}.xml"
            if not report.exists():
                log = (scratch / f"{mode}.log").read_text()
                sys.exit(f"{log}\nmlx-lm's tests broke off, {mode}: {run.returncode}")
            found[mode] = outcome(report)
    said = list(problems(**found))
    for mode, tests in found.items():
        failed = [name for name, what in tests.items() if what is not None]
        release = f"mlx-lm {version('mlx-lm')}"
        print(f"{release}, {mode}: {len(tests)} of its own tests, {len(failed)} failed")
        print(*(f"  {name}" for name in failed), sep="\n")
    sys.exit("\n".join(said) or None)


if __name__ == "__main__":
    main()
