"""All there is to check on a real GPU, in one command.

Kernels against their references, on the device; on NVIDIA also under compute-sanitizer
(memcheck, and racecheck for threadgroup memory); then the benchmark. Exits with 0 and
says so where there is no GPU.

usage: python benchmarks/gpu_check.py [--no-benchmark] [--no-sanitizer]
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def correct() -> bool:
    """The self-test, on the default device."""
    from mlx_flashhead.kernels import doctor

    print(f"{doctor.describe()}", flush=True)
    found = doctor.self_test()
    failed = [f"{k}: {v}" for k, v in found.items() if not v.startswith("ok")]
    for line in failed:
        print(f"FAILED {line}")
    print(f"kernels: {len(found)} cases, {len(failed)} failures", flush=True)
    return not failed


def sanitize(tool: str) -> bool:
    """The self-test again under one of compute-sanitizer's tools."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        print(f"compute-sanitizer: not installed, {tool} skipped")
        return True
    command = [program, "--tool", tool, "--error-exitcode", "9"]
    # MLX's own kernels are not under test.
    command += ["--kernel-name", "kernel_substring=flashhead"]
    command += [sys.executable, str(HERE / "gpu_check.py"), "--self-test"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    lines = [s for s in done.stdout.splitlines() if s.startswith("=====")]
    print(f"compute-sanitizer {tool}: exit {done.returncode}")
    if done.returncode:
        print((done.stdout + done.stderr)[-3000:])
    else:
        print("  " + (lines[-1] if lines else "no report"), flush=True)
    return done.returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-benchmark", action="store_true")
    parser.add_argument("--no-sanitizer", action="store_true")
    parser.add_argument("--self-test", action="store_true", help="only the self-test")
    options = parser.parse_args()

    from mlx_flashhead import kernels
    from mlx_flashhead.kernels import doctor

    if kernels.kind() == "plain":
        print("no GPU back-end here: skipped")
        return
    if options.self_test:
        states = doctor.self_test(brief=True)
        sys.exit(any(not state.startswith("ok") for state in states.values()))
    good = correct()
    if kernels.kind() == "cuda" and not options.no_sanitizer:
        good = all([sanitize("memcheck"), sanitize("racecheck")]) and good
    if not options.no_benchmark:
        subprocess.run([sys.executable, str(HERE / "kernels.py")], check=True)
    sys.exit(not good)


if __name__ == "__main__":
    main()
