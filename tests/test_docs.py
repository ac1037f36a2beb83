"""The documentation is true: its commands and its code run, on small models under the
names that it uses, and what it says of options, files, messages and figures is so."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import os
import pkgutil
import re
import shutil
import socket
import subprocess
import sys
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.metadata import entry_points
from itertools import pairwise
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import click
import documents
import hub as hubs
import mlx.core as mx
import numpy as np
import pytest
import small_models
import small_vlms
from click.testing import CliRunner
from documents import ROOT, SECTIONS, Section, words
from mlx_flashhead.convert import convert
from test_clusters import publish
from test_gguf import gguf_tensors, reference_model, write_gguf

import mlx_flashhead
from mlx_flashhead.generate import _mlx_lm_options
from mlx_flashhead.run import OPTIONS

# Commands that cannot be run inside of a test: why, and what runs them instead, a file
# and what stands in it.
ELSEWHERE = {
    "make demo": (
        "converts Gemma 3 270M, minutes; the same command runs here on a small model",
        "Makefile",
        "$(BIN)/mlx_flashhead.demo",
    ),
    "make test": ("is this test suite", ".ci/run", "make test"),
    "python tests/test_models.py": (
        "writes a document; the tests find the same, model by model",
        "tests/test_models.py",
        "def test_the_document_says_what_works",
    ),
    "make lint": ("is the other half of CI", ".ci/run", "make lint"),
    "make test-oldest": (
        "makes an environment from the package index",
        ".github/workflows/apple-silicon.yml",
        "make test-${{ matrix.versions }}",
    ),
    "make test-newest": (
        "likewise",
        ".github/workflows/apple-silicon.yml",
        "make test-${{ matrix.versions }}",
    ),
    "python3 -m venv .venv && source .venv/bin/activate": (
        "is where the tests run",
        "Makefile",
        "$(PYTHON) -m venv .venv",
    ),
    "pip install -e .": (
        "changes the tests' environment; the wheel is installed in one of its own",
        "tests/test_packaging.py",
        '"install", "--no-index", "--no-deps", wheel',
    ),
    "pip install 'mlx-flashhead[gguf]'": (
        "likewise; without it, this is what the converter says",
        "tests/test_gguf.py",
        "pip install 'mlx-flashhead[gguf]'",
    ),
    ".venv/bin/pre-commit install": (
        "changes the repository; the hooks are the tools of make lint",
        ".pre-commit-config.yaml",
        "entry: .venv/bin/ruff check",
    ),
    "sudo apt-get install libopenblas0-pthread": (
        "needs root; CI installs it",
        ".ci/run",
        "libopenblas0-pthread",
    ),
    "hf auth login": (
        "needs an account; without one, this is what the converter says",
        "tests/test_publish.py",
        "def test_refused_before_any_work",
    ),
    "mlx_flashhead.convert --hf-path google/gemma-3-1b-it --mlx-path gemma-3-1b-mine "
    "--upload-repo you/gemma-3-1b-flash": (
        "likewise; a stand-in takes what is uploaded",
        "tests/test_publish.py",
        "def test_an_upload(",
    ),
    "mlx_flashhead.convert --hf-path google/gemma-3-1b-it --sidecar gemma-3-1b-head "
    "--upload-repo you/gemma-3-1b-flashhead": (
        "likewise",
        "tests/test_publish.py",
        "def test_a_sidecar_is_uploaded_alone(",
    ),
}
# What is too large for a test, and what stands in its place.
SMALLER = {
    "--n-probes 2048": "--n-probes 24",
    "--n-probes 512,2048": "--n-probes 5,24",
    "--sizes 32768x640,131072x640": "--sizes 1024x64",
}
# The shapes of models that benchmarks/kernels.py times are not options of it.
SMALL_KERNELS = """
import sys
sys.path.insert(0, "benchmarks")
import kernels
kernels.MODELS = {"small": (2048, 64)}
sys.argv = ["kernels.py", "--steps", "1", *sys.argv[1:]]
kernels.main()
"""
# Options that make a command short, added to it.
SHORTER = {
    "mlx_flashhead.benchmark --model FOLDER": "--quick",
    "mlx_flashhead.benchmark": "--repeats 1 --max-tokens 4 --no-load",
    "mlx_flashhead.evaluate": "--tokens 200 --max-tokens 8",
    "mlx_flashhead.run mlx_lm.benchmark": "-n 1",
    "python benchmarks/draws.py": "--draws 2000",
    "python benchmarks/exact_draws.py": "--draws 300 --n-states 2",
    "python benchmarks/exact_ties.py": "--limit 8",
    "python benchmarks/tuning.py": "--rounds 1 --turn 4 --batch-sizes 2",
    "python benchmarks/host.py": "--layers 1 --rounds 1 --samplers greedy",
    "python benchmarks/scaling.py": "--steps 1 --repeats 1 --sweeps bits",
    "python benchmarks/gpu_check.py": "--self-test",
    "python benchmarks/recall.py": "--tokens 500",
    "python benchmarks/server.py": "--tokens 4 --repeats 1 --answers streaming",
    "python examples/": "--max-tokens 4",
}
# Commands that several sections have and that change nothing: the first one runs them.
ONCE = {
    "mlx_flashhead.benchmark --model gemma-3-1b-flash --quick",
    "mlx_flashhead.doctor",
    "python benchmarks/kernels.py",
    "python benchmarks/predict.py",
}
# What people type.
TYPED = {"mlx_flashhead.chat": "Hello\nq\n"}
# A command leaves the file or folder that one of these names.
MADE_BY = {
    "--mlx-path",
    "--sidecar",
    "--plot",
    "--markdown",
    "--states",
    "--prompt-cache-file",
}
SERVERS = ("mlx_flashhead.server", "mlx_flashhead.run mlx_vlm.server")
COMMANDS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
del COMMANDS["mlx_flashhead"]  # runs the others


# ---- commands and code ---------------------------------------------------------------


def runs(command: str, section: Section) -> bool:
    first = next(s for s in SECTIONS if command in s.commands)
    return command not in ELSEWHERE and (command not in ONCE or section is first)


def runnable(section: Section) -> bool:
    code = any(kind == "python" for kind, _ in section.blocks)
    return code or any(runs(command, section) for command in section.commands)


def chosen(request: pytest.FixtureRequest) -> list[Section]:
    """The sections that this run of pytest wants, the longest first."""
    wanted = [
        item.callspec.params["section"]
        for item in request.session.items
        if getattr(item, "originalname", "") == "test_commands_and_code_run"
    ]
    return sorted(wanted, key=lambda s: -len(s.commands))


class Place:
    """Small models under the names of the documentation, and a hub that has some."""

    def __init__(self, folder: Path, hub: hubs.Hub):
        self.folder, self.hub = folder, hub
        self.things = folder / "things"
        self.things.mkdir()
        sources = folder / "sources"
        self._publish("google/gemma-3-1b-it", "gemma3_text", sources / "gemma")
        self._publish("mlx-community/Qwen3-8B-4bit", "qwen3", sources / "qwen")
        for name in ("Qwen/Qwen3-0.6B", "mlx-community/Qwen3-0.6B-8bit"):
            self._add(name, sources / "qwen")
        for source, name in (
            ("gemma", "gemma-3-1b-flash"),
            ("qwen", "qwen3-0.6b-flash"),
        ):
            convert(str(sources / source), self.things / name, verbose=False)
        seeing = small_vlms.write("qwen3_vl", sources / "seeing")
        self._add("Qwen/Qwen3-VL-2B-Instruct", seeing)
        small_vlms.picture(self.things / "photo.png")
        # As if it had been uploaded.
        self._add("you/gemma-3-1b-flash", self.things / "gemma-3-1b-flash")
        sidecar = self.things / "gemma-3-1b-flashhead"
        convert(str(sources / "gemma"), sidecar=sidecar, verbose=False)
        self._add("you/gemma-3-1b-flashhead", sidecar)
        gguf = self.things / "MODEL.gguf"
        write_gguf(gguf, "llama", gguf_tensors("llama", reference_model("llama")))
        convert(gguf_path=str(gguf), mlx_path=self.things / "FOLDER", verbose=False)
        owner = np.random.default_rng(0).choice(40, small_models.VOCAB)
        sizes = {"vocab_size": small_models.VOCAB, "hidden_size": small_models.HIDDEN}
        publish(self.things / "CLUSTERS", owner, 40, **sizes)
        text = "".join(f"{i} times {i} is {i * i}.\n\n" for i in range(300))
        for name in ("A.txt", "B.txt"):
            (self.things / name).write_text(text)
        # The demo model, as if it had been converted before.
        self.cache = folder / "cache"
        shutil.copytree(self.things / "gemma-3-1b-flash", self.cache / "gemma-3-270m")

    def _publish(self, name: str, kind: str, source: Path) -> None:
        self._add(name, small_models.write(kind, source))

    def _add(self, name: str, folder: Path) -> None:
        self.hub.add(name, {f.name: f.read_bytes() for f in folder.iterdir()})

    def lay_out(self, section: Section) -> Path:
        """A folder with what the section needs, and not what it makes."""
        folder = self.folder / re.sub(r"\W", "-", section.name)
        folder.mkdir()
        made = {
            made
            for command in section.commands
            if "--overwrite" not in command
            for made in outputs(command)
        }
        for thing in self.things.iterdir():
            if thing.name in made:
                continue
            copy = shutil.copytree if thing.is_dir() else shutil.copyfile
            copy(thing, folder / thing.name)
        for name in ("tests", "examples", "LICENSE", "pyproject.toml", "Makefile"):
            (folder / name).symlink_to(ROOT / name)
        (folder / ".venv").symlink_to(sys.prefix)
        shutil.copytree(ROOT / "benchmarks", folder / "benchmarks")
        prompts = folder / "benchmarks/prompts.jsonl"
        prompts.write_text("\n".join(prompts.read_text().splitlines()[:2]))
        (folder / "docs").mkdir()
        shutil.copytree(ROOT / "docs/pictures", folder / "docs/pictures")
        return folder

    @property
    def environment(self) -> dict[str, str]:
        bin_folders = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return os.environ | {
            "PATH": bin_folders,
            "MLX_FLASHHEAD_CACHE": str(self.cache),
            "HF_ENDPOINT": self.hub.url,
            "HF_HOME": str(self.folder / "home"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "no_proxy": "127.0.0.1",
            "PYTHONUNBUFFERED": "1",
        }


def outputs(command: str) -> list[str]:
    """What the command is to leave."""
    given = words(command)
    after = dict(pairwise(given))
    found = [after[option] for option in MADE_BY & after.keys()]
    # Elsewhere it is a flag.
    if "mlx_flashhead.evaluate" in given and "--json" in after:
        found.append(after["--json"])
    return found


def smaller(command: str, port: int) -> str:
    """The command as the test runs it."""
    kernels = "python benchmarks/kernels.py"
    if command.startswith(kernels):
        return f"python -c '{SMALL_KERNELS}'{command.removeprefix(kernels)}"
    for long, short in SMALLER.items():
        command = re.sub(rf"{re.escape(long)}(?!\S)", short, command)
    for start, options in SHORTER.items():
        if command.startswith(start):
            command += f" {options}"
    return command.replace("8080", str(port))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Visit:
    """A section's commands and code, run one after another in its folder."""

    def __init__(self, place: Place, section: Section):
        self.section = section
        self.folder, self.environment = place.lay_out(section), place.environment
        self.port = free_port()
        self.servers: list[subprocess.Popen] = []

    def run(self) -> None:
        # The blocks of code of a section go on where the one before ended.
        code = "\n".join(text for kind, text in self.section.blocks if kind == "python")
        try:
            for kind, text in self.section.blocks:
                if kind == "bash":
                    for command in documents.lines(text):
                        if runs(command, self.section):
                            self.command(command)
                elif kind == "python" and code:
                    (self.folder / "code.py").write_text(code)
                    self.succeed(["python", "code.py"], "the code")
                    code = ""
        finally:
            for server in self.servers:
                server.terminate()
                server.communicate()

    def command(self, command: str) -> None:
        given = smaller(command, self.port)
        if command.startswith(SERVERS):
            return self.serve(given)
        before = {o for o in outputs(given) if (self.folder / o).exists()}
        text = next((t for c, t in TYPED.items() if command.startswith(c)), "")
        self.succeed(["bash", "-c", given], command, input=text)
        for made in outputs(given):
            assert (self.folder / made).exists(), f"{command} made no {made}"
            assert made not in before or "--overwrite" in command, command

    def succeed(self, given: list[str], what: str, **options) -> None:
        done = subprocess.run(
            given,
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=300,
            **options,
        )
        said = f"{what}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
        assert done.returncode == 0, said
        assert "Traceback" not in done.stderr, said
        if given[-1].startswith("curl"):
            assert "choices" in json.loads(done.stdout), said

    def serve(self, command: str) -> None:
        log = (self.folder / "server.log").open("w")
        server = subprocess.Popen(
            words(command),
            cwd=self.folder,
            env=self.environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        self.servers.append(server)
        for _ in range(600):
            assert server.poll() is None, (self.folder / "server.log").read_text()
            try:
                return urlopen(f"http://127.0.0.1:{self.port}/health").close()
            except URLError:
                time.sleep(0.1)
        raise AssertionError(f"{command} does not answer")


@pytest.fixture(scope="module")
def visits(request, tmp_path_factory):
    """What became of each section, two at a time."""
    with hubs.serving() as hub:
        place = Place(tmp_path_factory.mktemp("docs"), hub)
        pool = ThreadPoolExecutor(2)
        yield {s.name: pool.submit(Visit(place, s).run) for s in chosen(request)}
        pool.shutdown(cancel_futures=True)


@pytest.mark.full
@pytest.mark.parametrize(
    "section", list(filter(runnable, SECTIONS)), ids=lambda section: section.name
)
def test_commands_and_code_run(section, visits):
    visits[section.name].result()


def test_no_command_is_left_out():
    every = {c for section in SECTIONS for c in section.commands}
    assert not ELSEWHERE.keys() - every, "listed, and in no document"
    for command, (reason, file, text) in ELSEWHERE.items():
        assert reason and text in (ROOT / file).read_text(), command
    known = {"bash", "python", "text", "math", "mermaid"}
    for section in SECTIONS:
        # A block of another kind could hide commands.
        assert {kind for kind, _ in section.blocks} <= known, section.name
    assert every >= ONCE
    everything = "\n".join(every)
    for unused in (*SMALLER, *SHORTER, *TYPED, *SERVERS):
        assert unused in everything, f"{unused} is in no command"


def test_targets_of_make_exist():
    targets = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.M)
    named = {
        span.split()[1]
        for section in SECTIONS
        for span in (*section.spans, *section.commands)
        if span.startswith("make ")
    }
    assert named and named <= set(targets[1].split())
    for target in named - {"lint"}:
        subprocess.run(
            ["make", "-n", target], cwd=ROOT, check=True, capture_output=True
        )


# ---- options and names ---------------------------------------------------------------


def command_of(name: str) -> click.Command:
    (entry,) = entry_points(group="console_scripts").select(name=name)
    return entry.load()


def flags(param: click.Parameter) -> list[str]:
    return [*param.opts, *param.secondary_opts]


def own_options(name: str) -> list[click.Option]:
    """Options of ours, not of the command of mlx-lm's that it stands for."""
    theirs = (
        {o.name for o in _mlx_lm_options} - {"model"}
        if name.endswith("generate")
        else set()
    )
    return [
        p
        for p in command_of(name).params
        if isinstance(p, click.Option) and p.name not in theirs
    ]


def section_of(name: str) -> Section:
    (found,) = [
        s for s in SECTIONS if s.name == f"docs/commands.md#{documents.anchor(name)}"
    ]
    return found


def documented(name: str) -> dict[str, str]:
    """Options in a command's tables, and the default that stands beside each."""
    found = {}
    for head, *rows in section_of(name).tables:
        assert head[:2] == ["option", "default"]
        for option, default, *_ in rows:
            for flag in re.findall(r"`(-[\w-]+)`", option):
                found[flag] = default.strip("`")
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_is_documented(name):
    section = section_of(name)
    assert any(words(c)[0] == name or name in c for c in section.commands)
    ours = {flag: p for p in own_options(name) for flag in flags(p)}
    assert ours or name.endswith("run")
    found = documented(name)
    assert found.keys() <= ours.keys()
    for flag in ours.keys() - found.keys():
        # Of the commands that are mlx-lm's, in the text.
        assert flag in {f for o in OPTIONS for f in flags(o)}, flag
        assert flag in section.spans, f"{name} {flag} is not documented"
    shown = CliRunner().invoke(command_of(name), ["--help"]).output
    for flag in found:
        assert re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", shown), flag


@pytest.mark.parametrize("name", COMMANDS)
def test_defaults_are_as_documented(name):
    found = documented(name)
    for option in own_options(name):
        default = option.to_info_dict()["default"]
        known = {found[f] for f in flags(option) if f in found}
        if option.is_flag or default is None or not known:
            continue
        listed = isinstance(default, (list, tuple))
        text = ",".join(default) if listed else str(default)
        assert known <= {text, f"the {text}"} or not text, f"{name} {option.name}"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_a_module_of_its_name(name):
    assert importlib.util.find_spec(name) is not None


def test_the_readme_has_every_command():
    (section,) = [s for s in SECTIONS if s.name == "README.md#commands"]
    rows = [row[0].strip("`") for row in section.tables[0][1:]]
    assert rows == list(dict.fromkeys(rows)) and set(rows) == set(COMMANDS)


def test_options_in_the_text_exist():
    every = {"-d", "--help", "-m"}  # mlx_lm.convert's, everyone's, pytest's
    for name in COMMANDS:
        params = command_of(name).params
        every |= {flag for p in params for flag in flags(p)}
    for section in SECTIONS:
        for span in section.spans:
            if span in ELSEWHERE:
                continue
            named = re.findall(r"(?<![\w-])(--?[a-z][\w-]*)", span)
            assert set(named) <= every, f"{section.name}: {span}"


def test_names_in_the_text_exist():
    for section in SECTIONS:
        for name in re.findall(r"`(?:python -m )?(mlx_flashhead[\w.]*)", section.prose):
            name = name.rstrip(".")
            if name not in COMMANDS and name != "mlx_flashhead.NAME":
                assert pkgutil.resolve_name(name), f"{section.name}: {name}"


def test_what_the_package_exports_is_documented():
    text = (ROOT / "docs/python-api.md").read_text()
    for module in (mlx_flashhead, importlib.import_module("mlx_flashhead.convert")):
        for name in module.__all__:
            assert f"`{name}`" in text, name


def source_files() -> list[Path]:
    return [*(ROOT / "mlx_flashhead").rglob("*.py"), *(ROOT / "convert").rglob("*.py")]


def test_environment_variables_are_documented():
    in_code = {
        name
        for file in source_files()
        for name in re.findall(r'environ[^\n]*?"(MLX_FLASHHEAD\w*)"', file.read_text())
    }
    (section,) = [s for s in SECTIONS if s.name.endswith("#environment-variables")]
    rows = section.tables[0][1:]
    assert in_code == {row[0].strip("`").split("=")[0] for row in rows}


# ---- links, figures, messages, formats -----------------------------------------------


@pytest.mark.parametrize("file", documents.FILES, ids=lambda f: f.name)
def test_links_lead_somewhere(file):
    text = re.sub(r"^```.*?^```", "", file.read_text("utf-8"), flags=re.S | re.M)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (file.parent / path).resolve() if path else file
        assert target.is_file() and target.is_relative_to(ROOT), link
        if anchor:
            assert anchor in map(documents.anchor, documents.headings(target)), link


def test_every_document_is_linked_from_the_readme():
    text = (ROOT / "README.md").read_text()
    for file in documents.FILES[1:]:
        assert f"({file.relative_to(ROOT)})" in text, file


def figures(text: str) -> list[str]:
    return re.findall(r"\d[\d,.]*\d|\d", text)


def results_sections() -> dict[str, documents.Section]:
    every = documents.sections(ROOT / "benchmarks/RESULTS.md")
    return {section.name.split("#")[-1]: section for section in every}


def test_the_first_table_of_the_results_is_what_the_details_say():
    """Each row's figures stand in the section that it links to, with the command."""
    sections = results_sections()
    (head, *rows) = next(s.tables[0] for s in sections.values() if s.tables)
    assert head[2:5] == ["dense", "approximate", "exact"] and len(rows) >= 10
    for row in rows:
        assert len(row) == len(head)
        ((anchor, command),) = re.findall(r"\]\(#(.+?)\), `(.+?)`", row[-1])
        text = sections[anchor].text
        assert command in text, row
        for figure in figures(" ".join(row[2:5])):
            assert re.search(rf"(?<![\d.,]){re.escape(figure)}(?![\d]|[.,]\d)", text), (
                row,
                figure,
            )


def test_the_readme_says_what_the_results_say():
    text = (ROOT / "README.md").read_text()
    (said,) = re.findall(
        r"two CPU cores: ([\d.]+) dense, ([\d.]+) exact, ([\d.]+) approximate", text
    )
    first = next(s.tables[0][1] for s in results_sections().values() if s.tables)
    assert [first[2], first[4], first[3]] == list(said)
    assert len(text.split()) <= 900


def strings() -> list[str]:
    """The strings of the code, "…" for what is filled in."""
    found = []
    for file in source_files():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = (
                    p.value if isinstance(p, ast.Constant) else "…" for p in node.values
                )
                found.append("".join(map(str, parts)))
    return found


@cache
def filled_in(gap: str, text: str) -> re.Pattern[str]:
    """Matches the text with anything for each "…"."""
    return re.compile(gap.join(map(re.escape, text.split("…"))), re.S)


def is_said(message: str, code: list[str], depth: int = 1) -> bool:
    """Whether a string of the code is the message, or begins with it, or has room for
    one that is the rest of it."""
    for text in code:
        if re.search(r"\w{3}", text) is None and text != "…: …":
            continue
        if filled_in(".+?", message).match(text):
            return True
        match = filled_in("(.+?)", text).fullmatch(message)
        if match and depth:
            room = [part for part in match.groups() if part != "…"]
            if all(part in code or is_said(part, code, depth - 1) for part in room):
                return True
    return False


def test_messages_are_those_of_the_code():
    code = strings()
    (file,) = [f for f in documents.FILES if f.name == "troubleshooting.md"]
    quoted = []
    for section in documents.sections(file):
        for table in section.tables:
            assert table[0] == ["message", "what to do"]
            quoted += [row[0].strip("`") for row in table[1:]]
        quoted += re.findall(r"^\*\*`(.+?)`", section.prose, flags=re.M)
    assert len(quoted) > 25
    for message in quoted:
        assert is_said(message, code), message
        longest = max(message.split("…"), key=len)
        typo = longest[:-2] + "#" + longest[-2:]
        assert not is_said(message.replace(longest, typo), code), message


def test_the_file_format_is_as_documented(tied_folder):
    in_section = {s.name: s for s in SECTIONS}
    (table,) = in_section["docs/file-format.md#flashheadsafetensors"].tables
    tensors = mx.load(str(tied_folder / "flashhead.safetensors"))
    assert isinstance(tensors, dict)
    names = [re.findall(r"`([\w.]+)`", row[0]) for row in table[1:]]
    dtypes = {n: row[1] for found, row in zip(names, table[1:]) for n in found}
    assert dtypes.keys() - {"bias"} == tensors.keys()
    for name, tensor in tensors.items():
        kind = str(tensor.dtype).split(".")[-1]
        fits = mx.issubdtype(tensor.dtype, mx.floating)
        assert dtypes[name] == kind or (dtypes[name] == "floating" and fits), name
    (table,) = in_section["docs/file-format.md#the-section"].tables
    keys = {k for row in table[1:] for k in re.findall(r"`(\w+)`", row[0])}
    stored = json.loads((tied_folder / "config.json").read_text())["flashhead"]
    assert keys - {"clusters"} == stored.keys()
    _, metadata = mx.load(
        str(tied_folder / "flashhead.safetensors"), return_metadata=True
    )
    assert stored.keys() - {"files"} == json.loads(metadata["flashhead"]).keys()
    version = re.search(
        r"This is version (\d+)", (ROOT / "docs/file-format.md").read_text()
    )
    assert int(version[1]) == stored["format_version"]
