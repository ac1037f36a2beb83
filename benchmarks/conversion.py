"""Time and memory of conversion against the size of the vocabulary.

    python benchmarks/conversion.py --sizes 32768x640,131072x640
    python benchmarks/conversion.py --sizes gemma-3-1b,qwen2.5-0.5b
    python benchmarks/conversion.py --sizes MODEL.gguf --quick

Every size is a model with made weights: a Gemma 3 body and a tied head whose rows are
of low rank plus noise, their lengths as different as real ones. What is made has the
cost of a real model and none of its meaning: its recall says nothing. One process makes
the model, another converts it, as ``mlx_flashhead.convert`` would; its time and memory
are the system's count (``getrusage``). ``VxD`` has a body of two layers, the named ones
have the sizes of the real models. A GGUF file or a folder is converted as it is.

Stages are those of the converter's progress bars, by wall clock.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import click

from mlx_flashhead.kernels import doctor

NAMED = {
    "gemma-3-1b": {},
    "qwen2.5-0.5b": {
        "vocab_size": 151_936,
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "intermediate_size": 4864,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "head_dim": 64,
    },
}
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
    if size in NAMED:
        return GEMMA_1B | NAMED[size]
    try:
        vocab_size, hidden_size = map(int, size.split("x"))
    except ValueError:
        raise click.ClickException(
            f"--sizes {size!r} is neither VxD, as 32768x640, nor a model's folder or "
            f"GGUF file, nor {' or '.join(NAMED)}"
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


def convert(source: str, target: str, stages_path: str, quick: str) -> None:
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
    name = "gguf_path" if Path(source).suffix == ".gguf" else "hf_path"
    report = pipeline.convert(
        **{name: source}, mlx_path=target, quick=quick == "quick", verbose=False
    )
    found = {"stages": stages, **dataclasses.asdict(report)}
    Path(stages_path).write_text(json.dumps(found))


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


def size_in_turn(size: str, where: str | None, quick: bool) -> dict:
    with tempfile.TemporaryDirectory(dir=where) as folder:
        source, target = str(Path(folder, "made")), str(Path(folder, "converted"))
        stages = Path(folder, "stages.json")
        made = not Path(size).exists()
        if made:
            measured("make", size, source)
        source = source if made else size
        how = "quick" if quick else "full"
        found = measured("convert", source, target, str(stages), how)
        found |= json.loads(stages.read_text()) | {"process_seconds": found["seconds"]}
    return {"size": size, "made": made, "quick": quick, **found}


def show(found: dict) -> None:
    click.echo(
        f"\n{Path(found['size']).name}: V {found['vocab_size']:,}, "
        f"D {found['hidden_size']:,}{', made weights' * found['made']}"
        f"{', --quick' * found['quick']}: {found['seconds']:.0f} s "
        f"({found['cpu_seconds']:.0f} s of CPU), "
        f"peak {found['peak_bytes'] / 2**30:.2f} GiB"
    )
    if not found["made"]:
        click.echo(
            f"recall {100 * found['recall']:.2f} %, KL {found['kl']:.4f}, "
            f"{100 * found['acceptance']:.2f} % of drafts expected to stand with "
            f"{found['draft_probes']} probed of {found['n_clusters']}"
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
@click.option("--quick", is_flag=True, help="Convert with --quick.")
@click.option("--json", "json_path", help="Write the figures here, too.")
def main(sizes: str, folder: str | None, quick: bool, json_path: str | None) -> None:
    """Time conversion of made models, or of real ones."""
    names = sizes.split(",")
    for name in names:
        if not Path(name).exists():
            shape_of(name)
    click.echo(doctor.describe())
    results = []
    for name in names:
        results.append(size_in_turn(name, folder, quick))
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
