"""What is published: sdist and wheel, built here without a network, and the wheel used in an environment of its own."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

import ctmasknet
from ctmasknet.weights.manifest import manifest

ROOT = Path(__file__).parents[1]

slow = pytest.mark.slow


def test_actions_are_pinned_by_commit_and_keep_no_credentials():
    used = []
    for workflow in sorted((ROOT / ".github/workflows").glob("*.yml")):
        for job in yaml.safe_load(workflow.read_text())["jobs"].values():
            used += [step for step in job["steps"] if "uses" in step]
    assert len(used) > 10
    assert [step["uses"] for step in used if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", step["uses"])] == []
    checkouts = [step for step in used if step["uses"].startswith("actions/checkout@")]
    assert all(step["with"]["persist-credentials"] is False for step in checkouts)


def build(source: Path, out: Path, *what: str) -> None:
    """Without isolation: an isolated build fetches setuptools."""
    command = [sys.executable, "-m", "build", "--no-isolation", *what, "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Folders with the sdist and the wheel made of it, and with a wheel made of the working tree."""
    pytest.importorskip("build")
    pytest.importorskip("setuptools", "77")
    work = tmp_path_factory.mktemp("release")
    shutil.copytree(
        ROOT,
        work / "source",
        ignore=shutil.ignore_patterns(".*", "*.egg-info", "build", "dist", "site", "__pycache__", "runs"),
    )
    build(work / "source", work / "both")
    build(work / "source", work / "direct", "--wheel")
    return work


def contents(wheel: Path) -> dict[str, str]:
    """Name -> SHA-256 of every file in a wheel, but RECORD, which lists them."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/RECORD")]
        return {name: hashlib.sha256(archive.read(name)).hexdigest() for name in names}


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


@slow
def test_the_wheel_holds_package_and_weights_and_no_tests(built):
    files = contents(only(built / "both", "*.whl"))
    assert {"ctmasknet/py.typed", "ctmasknet/example/slice.png", "ctmasknet/example/mask.png"} <= set(files)
    assert "ctmasknet/weights/manifest.json" in files
    bundled = {f"ctmasknet/weights/{entry.file}": entry.sha256 for entry in manifest() if entry.file is not None}
    assert bundled
    assert bundled.items() <= files.items()
    assert {name.split("/")[0] for name in files} == {"ctmasknet", f"ctmasknet-{ctmasknet.__version__}.dist-info"}
    assert not [name for name in files if "test" in name.lower() or name.endswith((".pyc", ".pth", ".dcm"))]
    for licence in ("LICENSE", "NOTICE"):
        assert any(name.endswith(f"licenses/{licence}") for name in files)


@slow
def test_the_sdist_makes_the_same_wheel_and_holds_no_tests(built):
    assert contents(only(built / "both", "*.whl")) == contents(only(built / "direct", "*.whl"))
    with tarfile.open(only(built / "both", "*.tar.gz")) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "NOTICE", "CITATION.cff", "hubconf.py"} <= names
    assert not [name for name in names if name.startswith(("tests", "docs"))]


@slow
def test_the_version_comes_from_one_place(built):
    assert only(built / "both", "*.whl").name.startswith(f"ctmasknet-{ctmasknet.__version__}-")
    assert f'version = "{ctmasknet.__version__}"' in (ROOT / "pyproject.toml").read_text()
    assert f"version: {ctmasknet.__version__}" in (ROOT / "CITATION.cff").read_text()


@slow
def test_the_wheel_runs_the_demo_in_an_environment_of_its_own_without_a_network(built, tmp_path):
    home = tmp_path / "venv"
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    wheel = only(built / "both", "*.whl")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(wheel)], check=True)
    # torch and the other dependencies are this environment's; its own ctmasknet comes after the one just installed.
    inside = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    Path(inside, "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    nowhere = "http://127.0.0.1:9"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "http_proxy": nowhere, "https_proxy": nowhere, "all_proxy": nowhere}
    environment["HF_HOME"] = str(tmp_path / "cache")

    def call(*command: str | Path) -> str:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    where = call(python, "-c", "import ctmasknet; print(ctmasknet.__file__)").strip()
    assert Path(where).is_relative_to(inside)
    assert call(home / "bin" / "ctmasknet", "--version").split() == ["ctmasknet", ctmasknet.__version__]
    assert "lesions found. Picture:" in call(home / "bin" / "ctmasknet", "demo")
    assert (tmp_path / "ctmasknet-demo" / "slice.png.overlay.png").is_file()
