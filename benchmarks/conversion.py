"""Time and memory of conversion against the size of the vocabulary.

    python benchmarks/conversion.py --sizes 32768x640,131072x640
    python benchmarks/conversion.py --sizes gemma-3-1b

Every size is a model with made weights: a Gemma 3 body and a tied head whose rows are
of low rank plus noise, their lengths as different as real ones. What is made has the
cost of a real model and none of its meaning: its recall says nothing. One process makes
the model, another converts it, as ``mlx_flashhead.convert`` would; its time and memory
are the system's count (``getrusage``). ``VxD`` has a body of two layers,
``gemma-3-1b`` that of the real one: 26 layers, 262,144 x 1,152.

Stages are those of the converter's progress bars, by wall clock.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import click

GEMMA_1B = {
    "vocab_size": 262_144,
    "hidden_size": 1152,
    "num_hidden_layers": 26,
    "intermediate_size": 6912,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "query_pre_attn_scalar": 256,
}
# Of made rows: rank, and the noise's share of their length.
RANK, NOISE = 64, 0.5


def shape_of(size: str) -> dict:
    """Configuration of a Gemma 3 model of a size."""
    if size == "gemma-3-1b":
        return dict(GEMMA_1B)
    try:
        vocab_size, hidden_size = map(int, size.split("x"))
    except ValueError:
        raise click.ClickException(
            f"--sizes {size!r} is neither VxD, as 32768x640, nor gemma-3-1b"
        ) from None
    return GEMMA_1B | {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": 2,
        "sliding_window_pattern": 2,
        "intermediate_size": 4 * hidden_size,
        "head_dim": hidden_size // 4,
    }


def make(size: str, folder: Path) -> None:
    """Write a model of a size, in bfloat16."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm import utils
    from mlx_lm.models import gemma3_text

    tests = Path(__file__).parents[1] / "tests"
    sys.path.insert(0, str(tests))
    from small_models import BOS, EOS, write_tokenizer

    shape = shape_of(size)
    v, d = shape["vocab_size"], shape["hidden_size"]
    config = shape | {"model_type": "gemma3_text", "rms_norm_eps": 1e-6}
    config |= {"bos_token_id": BOS, "eos_token_id": EOS, "torch_dtype": "bfloat16"}
    model = gemma3_text.Model(gemma3_text.ModelArgs.from_dict(config))
    model.sanitize({})  # ties the head, as loading it without one does
    weights = []
    for name, old in tree_flatten(model.parameters()):
        if name.endswith("embed_tokens.weight"):
            basis = mx.random.normal((RANK, d))
            value = mx.random.normal((v, RANK)) @ basis / RANK**0.5
            value = value + NOISE * mx.random.normal((v, d))
            value = value * mx.exp(0.2 * mx.random.normal((v, 1))) * d**-0.5
        elif old.ndim < 2:
            value = mx.zeros(old.shape)
        else:
            value = mx.random.normal(old.shape) * old.shape[-1] ** -0.5
        value = value.astype(mx.bfloat16)
        mx.eval(value)
        weights.append((name, value))
    model.load_weights(weights)
    folder.mkdir(parents=True)
    utils.save_model(folder, model, donate_model=True)
    utils.save_config(config, folder / "config.json")
    write_tokenizer(folder, v)


def convert(source: str, target: str, stages_path: str) -> None:
    """Convert, and write what each stage took."""
    from mlx_flashhead.convert import pipeline

    from mlx_flashhead.compute.device import disable_tf32

    disable_tf32()
    stages: dict[str, float] = {}

    @contextmanager
    def timed(stage: str, total: int):
        begin = time.perf_counter()
        try:
            yield lambda: None
        finally:
            took = time.perf_counter() - begin
            stages[stage] = stages.get(stage, 0.0) + took

    # What it shows nothing with.
    pipeline.silent = timed
    report = pipeline.convert(source, target, verbose=False)
    Path(stages_path).write_text(
        json.dumps({"stages": stages, "seconds": report.seconds})
    )


def measured(*words: str) -> dict[str, float]:
    """Run this file in a process of its own: its time and greatest memory."""
    command = [sys.executable, __file__, *words]
    begin = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise click.ClickException(f"{' '.join(words[:2])} failed")
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "seconds": time.perf_counter() - begin,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": usage.ru_maxrss * unit,
    }


def size_in_turn(size: str, where: str | None) -> dict:
    with tempfile.TemporaryDirectory(dir=where) as folder:
        source, target = str(Path(folder, "made")), str(Path(folder, "converted"))
        stages = Path(folder, "stages.json")
        measured("make", size, source)
        found = measured("convert", source, target, str(stages))
        found |= json.loads(stages.read_text()) | {"process_seconds": found["seconds"]}
    return {"size": size, **shape_of(size), **found}


def show(found: dict) -> None:
    click.echo(
        f"\n{found['size']}: V {found['vocab_size']:,}, D {found['hidden_size']:,}, "
        f"{found['num_hidden_layers']} layers, made weights: {found['seconds']:.0f} s "
        f"({found['cpu_seconds']:.0f} s of CPU), "
        f"peak {found['peak_bytes'] / 2**30:.2f} GiB"
    )
    click.echo("| stage | seconds | share |")
    click.echo("| --- | ---: | ---: |")
    stages = found["stages"]
    stages = stages | {"(between stages)": found["seconds"] - sum(stages.values())}
    for stage, seconds in stages.items():
        click.echo(
            f"| {stage} | {seconds:.1f} | {100 * seconds / found['seconds']:.0f} % |"
        )


@click.command(context_settings={"show_default": True})
@click.option("--sizes", default="32768x640,131072x640,262144x640")
@click.option("--folder", help="Where the models are made.  [default: the system's]")
@click.option("--json", "json_path", help="Write the figures here, too.")
def main(sizes: str, folder: str | None, json_path: str | None) -> None:
    """Time conversion of made models."""
    names = sizes.split(",")
    for name in names:
        shape_of(name)
    results = []
    for name in names:
        results.append(size_in_turn(name, folder))
        show(results[-1])
        if json_path:
            Path(json_path).write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    if sys.argv[1:2] == ["make"]:
        make(sys.argv[2], Path(sys.argv[3]))
    elif sys.argv[1:2] == ["convert"]:
        convert(*sys.argv[2:])
    else:
        main()
