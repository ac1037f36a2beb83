"""What is published: the sdist, the wheel, and the package once it is installed."""

from __future__ import annotations

import configparser
import inspect
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import small_models

import mlx_flashhead

ROOT = Path(__file__).parent.parent
# Where packages lie in the tree and once installed.
PACKAGES = {"mlx_flashhead": "mlx_flashhead", "convert": "mlx_flashhead/convert"}


def run(*words: object, **options) -> str:
    """Standard output of a command that has to succeed; it cannot see the tree."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [str(w) for w in words], capture_output=True, text=True, env=env, **options
    )
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def project_files() -> set[str]:
    """What belongs to the project, but for what the repository alone needs."""
    if (ROOT / ".git").exists():
        listed = run(
            *("git", "ls-files", "--cached", "--others", "--exclude-standard"), cwd=ROOT
        ).splitlines()
    else:
        listed = [str(p.relative_to(ROOT)) for p in ROOT.rglob("*")]
    made = re.compile(r"(^|/)(\.|__pycache__|build/|dist/|[^/]*\.egg-info)|\.py[cod]$")
    generated = {"PKG-INFO", "setup.cfg"}
    return {
        f
        for f in listed
        if (ROOT / f).is_file() and not made.search(f) and f not in generated
    }


def package_files() -> set[str]:
    """What of it is the package, by its installed names."""
    found = set()
    for name in project_files():
        top, _, rest = name.partition("/")
        if top in PACKAGES and rest:
            found.add(f"{PACKAGES[top]}/{rest}")
    return found


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """Built from a copy: setuptools leaves its notes where it works, and reads them."""
    folder = tmp_path_factory.mktemp("sdist")
    for name in project_files():
        target = folder / "source" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target)
    # Not isolated: that would ask the network for setuptools.
    command = (sys.executable, "-m", "build", "--sdist", "--no-isolation")
    run(*command, "--outdir", folder, folder / "source", cwd=folder)
    return next(folder.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    """Built from the sdist, as installers do it that find no wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "wheel", "-q", "--no-index", "--no-deps")
    run(*pip, "--no-build-isolation", "--wheel-dir", folder, sdist)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """An environment with the wheel; its dependencies are those of this one."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(folder, with_pip=False)
    pip = (sys.executable, "-m", "pip", "--python", folder / "bin/python", "-q")
    run(*pip, "install", "--no-index", "--no-deps", wheel)
    home = next(folder.glob("lib/python*/site-packages"))
    # Later in the path than the wheel. Their own .pth files, of which one may lead to
    # the source tree, are not read.
    others = [p for p in sys.path if Path(p).name.endswith("-packages")]
    (home / "dependencies.pth").write_text("\n".join(others))
    return folder / "bin"


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    """Outside of the source tree."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.full
def test_the_sdist_is_complete(sdist):
    with tarfile.open(sdist) as archive:
        found = {m.name.partition("/")[2] for m in archive if m.isfile()}
    found = {f for f in found if ".egg-info/" not in f} - {"PKG-INFO", "setup.cfg"}
    assert found == project_files()
    for name in ("LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "Makefile"):
        assert name in found


@pytest.mark.full
def test_the_wheel_has_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {n for n in archive.namelist() if not n.endswith("/")}
    notes = {n for n in names if ".dist-info/" in n}
    assert names - notes == package_files()
    assert {"mlx_flashhead/py.typed", "mlx_flashhead/convert/calibration.jsonl"} < names
    assert any(n.endswith("/licenses/LICENSE") for n in notes)


@pytest.mark.full
def test_the_version_is_one(wheel):
    assert wheel.name.split("-")[1] == mlx_flashhead.__version__
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert f"## [{mlx_flashhead.__version__}]" in changes
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {mlx_flashhead.__version__}\n" in citation


@pytest.mark.full
def test_every_command_says_what_it_does(wheel, installed, elsewhere):
    entries = configparser.ConfigParser(delimiters="=")
    entries.optionxform = str
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith("entry_points.txt"))
        entries.read_string(archive.read(name).decode())
    commands = list(entries["console_scripts"])
    assert len(commands) >= 7
    for command in commands:
        assert "usage" in run(installed / command, "--help").lower()


@pytest.mark.full
def test_the_wheel_converts_and_generates(installed, elsewhere):
    small_models.write("llama", elsewhere / "source")
    text = "".join(f"{i} times {i} is {i * i}.\n\n" for i in range(600))
    (elsewhere / "text.txt").write_text(text)
    options = ["--cluster-size", 4, "--n-probes", 120, "--calibration-data", "text.txt"]
    convert = installed / "mlx_flashhead.convert"
    run(convert, "--hf-path", "source", "--mlx-path", "made", *options)
    generate = ("--prompt", "2 times 2", "--max-tokens", 4, "--temp", 0)
    said = run(installed / "mlx_flashhead.generate", "--model", "made", *generate)
    assert "Generation: 4 tokens" in said
    where = "import mlx_flashhead.convert as c; print(c.__file__)"
    path = Path(run(installed / "python", "-c", where).strip())
    assert installed.parent in path.parents


def public() -> list[tuple[str, object]]:
    """What the package exports, and the public methods of its classes."""
    from mlx_flashhead import convert

    found: list[tuple[str, object]] = []
    for module in (mlx_flashhead, convert):
        for name in module.__all__:
            value = getattr(module, name)
            found.append((name, value))
            if inspect.isclass(value):
                found += [
                    (f"{name}.{n}", v.fget if isinstance(v, property) else v)
                    for n, v in vars(value).items()
                    if not n.startswith("_")
                    and (inspect.isfunction(v) or isinstance(v, property))
                ]
    return found


@pytest.mark.parametrize(("name", "value"), public())
def test_the_public_api_is_documented_and_typed(name, value):
    assert inspect.getdoc(value), f"{name} has no docstring"
    if not inspect.isfunction(value):
        return
    signature = inspect.signature(value)
    assert signature.return_annotation is not inspect.Signature.empty, name
    for parameter in signature.parameters.values():
        typed = parameter.annotation is not inspect.Parameter.empty
        assert typed or parameter.name in ("self", "cls"), f"{name}: {parameter}"
