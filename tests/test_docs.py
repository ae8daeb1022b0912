"""README and docs: every command parses, every block runs or says why not, every link leads somewhere.

A fence in `bash` or `python` is run by the slow tests, page by page and in order, in a folder with the example data of
docs/data.md and without a network; `<!-- not run: REASON -->` on the line before it takes it out, and
`<!-- run without the installation -->` leaves out its `pip install … &&`. README and quickstart run in an empty folder.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import docs_pictures
import pytest
import yaml
from PIL import Image

import ctmasknet
from ctmasknet import TrainConfig
from ctmasknet.cli.parser import build_parser
from ctmasknet.registry import VARIANTS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
NOTEBOOK = DOCS / "notebooks" / "finetune.ipynb"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
RUN = ("bash", "python")
SHOWN = ("text", "json", "yaml", "bibtex")

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


@dataclasses.dataclass(frozen=True)
class Fence:
    """One fenced block; `mark` is the HTML comment on the line before it, without its brackets."""

    page: Path
    line: int
    language: str
    code: str
    mark: str

    @property
    def runs(self) -> bool:
        return self.language in RUN and not self.mark.startswith("not run:")

    @property
    def script(self) -> str:
        """What is run of it."""
        if self.mark != "run without the installation":
            return self.code
        installing, _, rest = self.code.partition(" && ")
        assert installing.startswith("pip install "), self
        return rest

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


@cache
def fences(page: Path) -> tuple[Fence, ...]:
    found, lines = [], page.read_text(encoding="utf-8").splitlines()
    start: int | None = None
    for number, line in enumerate(lines):
        mark = line.strip()
        if not mark.startswith("```"):
            continue
        if start is None:
            start = number
            continue
        before = lines[start - 1].strip() if start else ""
        comment = re.fullmatch(r"<!-- (.*) -->", before)
        indent = len(lines[start]) - len(lines[start].lstrip())
        code = "\n".join(text[indent:] for text in lines[start + 1 : number]) + "\n"
        language = lines[start].strip().lstrip("`").strip()
        found.append(Fence(page, start + 1, language, code, comment[1] if comment else ""))
        start = None
    assert start is None, f"{page.name}:{start}: a fence without end"
    return tuple(found)


def commands(text: str) -> Iterator[list[str]]:
    """The arguments of each `ctmasknet` (or `… -m ctmasknet`) call in a shell text."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        current: list[str] | None = None
        before = ""
        for word in lexer:
            if set(word) <= set("|&;()<>"):
                if current is not None:
                    yield current
                current = None
            elif current is not None:
                current.append(word)
            elif word == "ctmasknet" and (before in ("", "-m") or re.fullmatch(r"[|&;(]+|\w+=\S*", before)):
                current = []  # anywhere else it is an argument of another program
            before = word
        if current is not None:
            yield current


def subparser(words: list[str]) -> argparse.ArgumentParser | None:
    """The parser of a subcommand, the deepest that `words` lead to."""
    parser = build_parser()
    for depth, word in enumerate(words):
        choices = [a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        if not choices:
            return parser
        if word not in choices[0]:
            return None if depth == 0 else parser
        parser = choices[0][word]
    return parser


def parsed(arguments: list[str]) -> argparse.Namespace | None:
    """What the command line makes of the arguments; None if it refuses them."""
    try:
        return build_parser().parse_args(arguments)
    except SystemExit as stop:
        return None if stop.code else argparse.Namespace()  # --version and --help end with 0


@pages
def test_every_fence_says_what_it_is_and_runs_or_says_why_not(page):
    for fence in fences(page):
        assert fence.language in RUN + SHOWN, f"{fence}: language {fence.language!r}"
        if fence.mark.startswith("not run"):
            assert fence.language in RUN, f"{fence}: nothing to run in {fence.language}"
            assert re.match(r"not run: \w+", fence.mark), f"{fence}: no reason"


@pages
def test_every_command_shown_parses(page, capsys):
    for fence in fences(page):
        if fence.language == "python":
            continue
        for arguments in commands(fence.code):
            options = parsed(arguments)
            assert options is not None, f"{fence}: ctmasknet {' '.join(arguments)}\n{capsys.readouterr().err}"
            known = {field.name for field in dataclasses.fields(TrainConfig)}
            fields = {text.partition("=")[0] for text in getattr(options, "fields", ())}
            assert fields <= known, f"{fence}: no such field of TrainConfig: {fields - known}"


@pages
def test_every_flag_in_the_text_belongs_to_its_command(page):
    for command in re.findall(r"`ctmasknet ([a-z][^`]*)`", page.read_text(encoding="utf-8")):
        words = command.split()
        parser = subparser(words)
        assert parser is not None, f"{page.name}: ctmasknet {command}"
        flags = {word.strip("[],.:").partition("=")[0] for word in words if word.strip("[").startswith("-")}
        known = {option for action in parser._actions for option in action.option_strings}
        assert flags <= known, f"{page.name}: ctmasknet {command}: no flag {flags - known}"


@pages
def test_python_blocks_compile_and_import_what_exists(page):
    for fence in fences(page):
        if fence.language != "python":
            continue
        for node in ast.walk(compile(fence.code, str(fence), "exec", ast.PyCF_ONLY_AST)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ctmasknet":
                module = importlib.import_module(node.module or "")
                assert all(hasattr(module, alias.name) for alias in node.names), f"{fence}: {ast.unparse(node)}"
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ctmasknet":
                assert hasattr(ctmasknet, node.attr), f"{fence}: ctmasknet.{node.attr}"


@pages
def test_every_variant_named_exists(page):
    text = page.read_text(encoding="utf-8")
    assert set(re.findall(r"\b(?:maskrcnn|ctmasknet)_resnet\d+(?:_t\d)?\b", text)) <= set(VARIANTS)


@pages
def test_every_relative_link_and_picture_leads_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path = target.partition("#")[0]
        generated = path == "notebooks/finetune.md"  # made of the notebook when the site is built
        assert not path or generated or (page.parent / path).exists(), f"{page.name}: {target}"


def test_the_navigation_names_every_page():
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text())

    def leaves(entry):
        if isinstance(entry, str):
            return [entry]
        items = entry if isinstance(entry, list) else entry.values()
        return [leaf for item in items for leaf in leaves(item)]

    named = set(leaves(settings["nav"]))
    assert {page.name for page in PAGES[1:]} <= named


def test_the_api_page_documents_the_public_names_and_no_others():
    documented = set(re.findall(r"^::: ctmasknet\.(\w+)$", (DOCS / "api.md").read_text(), re.MULTILINE))
    assert documented == set(ctmasknet.__all__) - {"__version__"}
    assert all(getattr(ctmasknet, name).__doc__ for name in documented)


def string_literals() -> list[str]:
    """Every string in the package, f-strings with their values as one space each."""
    found = []
    for file in (ROOT / "ctmasknet").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else " " for part in node.values]
                found.append("".join(str(part) for part in parts))
    return found


def test_the_messages_in_troubleshooting_are_those_of_the_code():
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)
    assert len(messages) > 20
    literals = string_literals()
    for message in messages:
        parts = [part.strip() for part in message.split("…") if len(part.strip()) > 5]
        pattern = re.compile(".*".join(map(re.escape, parts)), re.DOTALL)
        assert parts, message
        assert any(pattern.search(literal) for literal in literals), f"no such message: {message}"


def modules() -> set[str]:
    """Modules and packages directly in ctmasknet."""
    inside = (ROOT / "ctmasknet").iterdir()
    found = {path.stem for path in inside if path.suffix == ".py" or (path / "__init__.py").is_file()}
    return found - {"__init__", "__main__"}


def imports() -> Iterator[tuple[str, str]]:
    """(importing module, imported module) for every import within the package, wherever it stands, types included."""
    for file in (ROOT / "ctmasknet").rglob("*.py"):
        here = file.relative_to(ROOT / "ctmasknet").with_suffix("").parts[0]
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if here in modules() and isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ctmasknet"):
                homes = (
                    [node.module] if node.module != "ctmasknet" else [ctmasknet._MODULE_OF[a.name] for a in node.names]
                )
                yield from ((here, home.split(".")[1]) for home in homes)


def test_the_picture_of_the_code_shows_every_module_and_imports_point_downwards():
    tree = ElementTree.parse(DOCS / "code.svg")
    layer = {g.get("data-module"): int(g.get("data-layer", "")) for g in tree.iter() if g.get("data-module")}
    assert set(layer) == modules()
    assert {(a, b) for a, b in imports() if a != b and layer[a] <= layer[b]} == set()


@pytest.mark.parametrize("name", docs_pictures.PICTURES)
def test_the_pictures_show_what_the_bundled_weights_find(name):
    with Image.open(DOCS / name) as picture:
        assert picture.text == docs_pictures.weights(), f"{name} is of other weights: python tools/docs_pictures.py"


def test_the_notebook_is_kept_without_outputs():
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


def test_the_citation_names_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "version", "preferred-citation"} <= set(citation)
    paper = citation["preferred-citation"]
    assert paper["authors"] == [{"family-names": "Ter-Sarkisov", "given-names": "Aram"}]
    assert paper["title"] in (ROOT / "README.md").read_text().replace("\n", " ")


# ------------------------------------------------------------------------------------------- slow: everything is run

DRIVER = """
import json, subprocess, sys, traceback
names = {"__name__": "__main__"}
for where, language, code in json.load(open(sys.argv[1])):
    print(f"--- {where}", flush=True)
    if language == "bash":
        done = subprocess.run(["bash", "-euo", "pipefail", "-c", code], stdout=sys.stdout, stderr=sys.stdout)
        if done.returncode:
            sys.exit(f"{where}: exit code {done.returncode}")
    else:
        try:
            exec(compile(code, where, "exec"), names)
        except Exception:
            traceback.print_exc(file=sys.stdout)
            sys.exit(f"{where}: failed")
"""


@pytest.fixture(scope="session")
def surroundings(tmp_path_factory):
    """Environment of a person with this package, `ctmasknet` and `python` on the path, and no network."""
    folder = tmp_path_factory.mktemp("bin")
    for name, module in {"ctmasknet": "-m ctmasknet", "python": ""}.items():
        script = folder / name
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" {module} "$@"\n')
        script.chmod(0o755)
    return without_network() | {
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HF_HOME": str(tmp_path_factory.mktemp("cache")),
    }


def without_network() -> dict[str, str]:
    nowhere = "http://127.0.0.1:9"
    return os.environ | {"HF_HUB_OFFLINE": "1", "http_proxy": nowhere, "https_proxy": nowhere, "all_proxy": nowhere}


def run_blocks(blocks: list[Fence], folder: Path, environment: dict[str, str]) -> None:
    plan = folder.parent / f"{folder.name}.json"
    plan.write_text(json.dumps([(str(block), block.language, block.script) for block in blocks]))
    command = [sys.executable, "-c", DRIVER, str(plan)]
    done = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-8000:]


@pytest.fixture(scope="session")
def example_data(tmp_path_factory, surroundings):
    folder = tmp_path_factory.mktemp("example")
    (folder / "tools").symlink_to(ROOT / "tools")  # as in a checkout
    block = next(fence for fence in fences(DOCS / "data.md") if fence.mark == "example data")
    run_blocks([block], folder, surroundings)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if any(f.runs for f in fences(p))], ids=lambda page: page.stem)
def test_every_block_of_the_page_runs(page, tmp_path, example_data, surroundings):
    folder = tmp_path / "work"
    if page.name in ("README.md", "index.md"):  # where people begin: nothing is there before
        folder.mkdir()
    else:
        shutil.copytree(example_data, folder, symlinks=True)
    run_blocks([fence for fence in fences(page) if fence.runs], folder, surroundings)


RAY = """
import ray

ray.init(num_cpus=2, object_store_memory=200_000_000, include_dashboard=False, log_to_driver=False)
"""

COMPARE = """
import pyarrow.parquet

rows = {row["source"]: row for row in pyarrow.parquet.read_table("from_ray").to_pylist()}
*slices, missing = Path("files.txt").read_text().splitlines()
assert set(rows) == {*slices, missing} and len(slices) > 2, rows.keys()
assert rows[missing]["prediction"] == "" and rows[missing]["error"].startswith(repr(missing)), rows[missing]
for prediction in Predictor().batch(slices):
    row = rows[prediction.source]
    assert (json.loads(row["prediction"]), row["error"]) == (prediction.to_dict(), ""), prediction.source
ray.shutdown()
"""


@pytest.mark.slow
def test_ray_gives_what_the_predictor_gives(tmp_path, example_data, surroundings):
    pytest.importorskip("ray.data")
    folder = tmp_path / "work"
    shutil.copytree(example_data, folder, symlinks=True)
    slices = sorted(path.relative_to(folder) for path in folder.glob("mine/imgs/*.png"))
    (folder / "files.txt").write_text("".join(f"{name}\n" for name in [*slices, "missing.png"]))
    (recipe,) = [fence for fence in fences(DOCS / "scale.md") if fence.mark.startswith("not run: needs Ray")]
    before, after = (Fence(Path(__file__), 0, "python", code, "") for code in (RAY, COMPARE))
    run_blocks([before, recipe, after], folder, surroundings)


@pytest.mark.slow
def test_the_notebook_runs_and_shows_an_overlay(tmp_path, surroundings, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    for name, value in surroundings.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    printed = "".join(output.get("text", "") for output in outputs)
    before, after = (
        [float(text) for text in re.search(rf"^{title}\t(.*)$", printed, re.MULTILINE)[1].split("\t")]
        for title in ("before", "after")
    )
    assert all(now > then for now, then in zip(after[:2], before[:2], strict=True)), printed
    assert re.search(r"^\d+ lesions? covering", printed, re.MULTILINE), printed
    assert "image/png" in outputs[-1]["data"]


@pytest.mark.slow
def test_the_site_builds_strictly_and_loads_nothing_from_elsewhere(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    loads = re.compile(
        r"""<(?:script|img|iframe|source|video|embed)\b[^>]*\bsrc=["']?(?:https?:)?//[^>]*>"""
        r"""|<link\b(?![^>]*rel=["']?(?:canonical|alternate|next|prev))[^>]*\bhref=["']?(?:https?:)?//[^>]*>"""
        r"""|url\(["']?(?:https?:)?//[^)]*\)|@import\s+["'](?:https?:)?//[^"']*"""
    )
    for file in [*tmp_path.rglob("*.html"), *tmp_path.rglob("*.css"), *tmp_path.rglob("*.svg")]:
        assert not loads.findall(file.read_text(encoding="utf-8")), file
