"""URLs: read as the same files on this machine are, named by the URL everywhere, bounded, and gone once read."""

from __future__ import annotations

import gc
import io
import json
import re
import tempfile
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scans import BlockPredictor, block_volume, dicom_dataset, write_series

import ctmasknet.data.remote
import ctmasknet.data.slices
import ctmasknet.predictor
from ctmasknet import InputError, MissingExtraError
from ctmasknet.batch import READERS, find_inputs, predict_files
from ctmasknet.cli import main
from ctmasknet.data.remote import as_path, is_url
from ctmasknet.data.scans import open_volume
from ctmasknet.data.slices import read_slice

fsspec = pytest.importorskip("fsspec")
from fsspec.implementations.memory import MemoryFileSystem  # noqa: E402

SLICES = np.moveaxis(block_volume(), 2, 0)


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch) -> Path:
    """Where copies lie; nothing is left of them after any test."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    gc.disable()  # which would hide what holds itself
    yield folder
    gc.enable()
    assert list(folder.iterdir()) == []


@pytest.fixture(autouse=True)
def memory() -> MemoryFileSystem:
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pseudo_dirs[:] = [""]
    ctmasknet.data.remote._archive.cache_clear()
    return system


@pytest.fixture(scope="module")
def predictor() -> BlockPredictor:
    return BlockPredictor()


def png(seed: int = 0, dtype: type = np.uint8) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 200, (40, 48)).astype(dtype)
    pixels[5:9, 10:15] = 255
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def archive(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as packed:
        for name, content in files.items():
            packed.writestr(name, content)
    return path


def upload(memory: MemoryFileSystem, folder: Path, to: str) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            memory.pipe_file(f"{to}/{path.relative_to(folder).as_posix()}", path.read_bytes())


# Names


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("s3://bucket/a/b.png", "/s3/bucket/a/b.png"),
        ("s3://bucket/../../b.png", "/s3/bucket/b.png"),
        ("zip://in/b.png::s3://bucket/a.zip", "/s3/bucket/a.zip/in/b.png"),
        ("zip://../../../b.png::/data/a.zip", "/data/a.zip/b.png"),
        ("zip://::/data/a.zip", "/data/a.zip"),
        ("simplecache::s3://bucket/b.png", "/s3/bucket/b.png"),
        ("https://host/b.nii.gz?signature=x/y", "/https/host/b.nii.gz"),
    ],
)
def test_a_url_has_a_path_that_leads_nowhere_else(name, path):
    assert is_url(name)
    assert as_path(name) == path


@pytest.mark.parametrize("name", ["a/b.png", r"C:\scans\b.dcm", "C:/scans/b.dcm", "C://b.dcm", "a::b", "s3:/b", "//b"])
def test_a_path_is_no_url(name):
    assert not is_url(name)
    assert as_path(name) == name


# Slices and scans


@pytest.mark.parametrize("url", ["memory://in/a.png", "zip://in/a.png::memory://b.zip", "zip://in/a.png::{}/b.zip"])
def test_a_slice_is_read_as_the_file_is(url, tmp_path, memory):
    (tmp_path / "a.png").write_bytes(png())
    memory.pipe_file("in/a.png", png())
    memory.pipe_file("b.zip", archive(tmp_path / "b.zip", {"in/a.png": png()}).read_bytes())
    url = url.format(tmp_path)
    one = read_slice(url)
    assert (one.source, one.kind) == (url, "png")
    np.testing.assert_array_equal(one.pixels, read_slice(tmp_path / "a.png").pixels)


def test_warnings_and_errors_name_the_url(memory, temporary):
    memory.pipe_file("wide.png", png(dtype=np.uint16))
    with pytest.warns(UserWarning, match=r"^memory://wide\.png: not an 8-bit image"):
        read_slice("memory://wide.png")
    memory.pipe_file("cut.png", png()[:-40])
    with pytest.raises(InputError) as caught:
        read_slice("memory://cut.png")
    message = str(caught.value)
    assert message.startswith("memory://cut.png: not a readable PNG")
    assert str(temporary) not in message
    del caught  # whose traceback holds the copy


def test_a_series_is_read_as_the_folder_is(tmp_path, memory, temporary, predictor):
    pytest.importorskip("pydicom")
    paths = write_series(tmp_path / "series", SLICES)
    paths[3].write_bytes(paths[3].read_bytes()[:-500])  # its header can be read, its pixels cannot
    (tmp_path / "series" / "notes.txt").write_text("no DICOM")
    upload(memory, tmp_path / "series", "study/series")
    files = {f"series/{path.name}": path.read_bytes() for path in (tmp_path / "series").iterdir()}
    archive(tmp_path / "b.zip", files)
    local = predictor.volume(tmp_path / "series")
    for url, inside in (
        ("memory://study/series", "memory://study/series/"),
        (f"zip://series::{tmp_path}/b.zip", "zip://series/"),
    ):
        there = predictor.volume(url)
        assert there.source == url
        np.testing.assert_array_equal(there.mask, local.mask)
        sources = [row["source"].replace(f"{tmp_path}/series/", inside) for row in local.slices]
        assert [row["source"] for row in there.slices] == sources
        errors = [row["error"].replace(f"{tmp_path}/series/", inside) for row in local.slices]
        assert [row["error"] for row in there.slices] == errors
        assert sum(map(bool, errors)) == 1
        left_out = f"{url}: files left out because they are not DICOM: 1"
        assert left_out in there.problems
        assert len(list(temporary.iterdir())) == 1  # as long as the result may want its headers
        del there


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".img"])
def test_nifti_is_read_as_the_file_is(suffix, tmp_path, memory, predictor):
    nibabel = pytest.importorskip("nibabel")
    (tmp_path / "scans").mkdir()
    image = nibabel.Nifti1Pair if suffix == ".img" else nibabel.Nifti1Image
    nibabel.save(image(block_volume(), np.diag([0.8, 0.7, 2, 1])), tmp_path / "scans" / f"a{suffix}")
    upload(memory, tmp_path / "scans", "scans")
    there, local = predictor.volume(f"memory://scans/a{suffix}"), predictor.volume(tmp_path / "scans" / f"a{suffix}")
    assert there.source == f"memory://scans/a{suffix}"
    assert there.slices[2]["source"] == f"memory://scans/a{suffix}[2]"
    assert there.mask.any()
    np.testing.assert_array_equal(there.mask, local.mask)
    assert {path.name.partition(".")[0] for path in there.save(tmp_path / "out")} == {"a"}


def test_predict_tells_slices_from_scans(tmp_path, memory, predictor, monkeypatch):
    pytest.importorskip("pydicom")
    monkeypatch.setattr(ctmasknet.predictor, "Predictor", lambda: predictor)
    write_series(tmp_path / "series", SLICES)
    upload(memory, tmp_path / "series", "series")
    dicom_dataset(SLICES[0]).save_as(tmp_path / "one", enforce_file_format=True)
    memory.pipe_file("one", (tmp_path / "one").read_bytes())
    assert len(ctmasknet.predictor.predict("memory://series").slices) == len(SLICES)
    assert ctmasknet.predictor.predict("memory://one").source == "memory://one"
    assert [one.source for one in predictor.batch(["memory://one", tmp_path / "one"])] == [
        "memory://one",
        str(tmp_path / "one"),
    ]


# Many files


@pytest.fixture
def tree(tmp_path) -> Path:
    """A folder with everything in it."""
    pytest.importorskip("pydicom")
    nibabel = pytest.importorskip("nibabel")
    folder = tmp_path / "tree"
    write_series(folder / "p1/series", SLICES)
    for place in ("a.png", "p2/b.png", "p2/notes.txt", "p2/.hidden.png", ".hidden/c.png", "p2/unknown"):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_bytes(png(len(place)) if place.endswith(".png") else b"not a slice " * 20)
    (folder / "p2/bad.png").write_bytes(b"no picture")
    nibabel.save(nibabel.Nifti1Image(block_volume(), np.diag([0.8, 0.7, 2, 1])), folder / "p3.nii.gz")
    return folder


def results(out: Path, source: str) -> tuple[list[dict], list[str]]:
    """Lines without their root, and the files that were written."""
    text = (out / "predictions.jsonl").read_text(encoding="utf-8").replace(source, "ROOT/")
    lines = sorted(map(json.loads, text.splitlines()), key=lambda line: line["source"])
    return lines, sorted(path.relative_to(out).as_posix() for path in out.rglob("*.*"))


def test_a_folder_gives_what_the_folder_here_gives(tree, tmp_path, memory, predictor, monkeypatch):
    monkeypatch.chdir(tmp_path)
    upload(memory, tree, "bucket/tree")
    there = predict_files(predictor, ["memory://bucket/tree"], "there")
    local = predict_files(predictor, [tree], "local")
    lines, files = results(Path("there"), "memory://bucket/tree/")
    assert (lines, files) == results(Path("local"), f"{tree}/")
    assert [line["source"] for line in lines] == ["ROOT/a.png", "ROOT/p1/series", "ROOT/p2/b.png", "ROOT/p3.nii.gz"]
    assert "tree/p1/series.lesions.nii.gz" in files
    assert (there.slices, there.scans, there.left_out) == (local.slices, local.scans, local.left_out) == (2, 2, 2)
    assert [one["source"] for one in there.failures] == ["memory://bucket/tree/p2/bad.png"]
    assert "temporary" not in Path("there/run.json").read_text()
    # It goes on where it stopped, and takes names from elsewhere.
    memory.pipe_file("bucket/tree/p2/d.png", png(9))
    memory.pipe_file("bucket/names.txt", b"elsewhere/d.png\nb\n")
    again = predict_files(predictor, ["memory://bucket/tree"], "there", names="memory://bucket/names.txt")
    assert (again.slices, again.already_done, again.failed) == (1, 1, 0)


def test_an_archive_is_a_folder_and_a_file_in_it_a_file(tree, tmp_path, predictor, monkeypatch):
    monkeypatch.chdir(tmp_path)
    packed = {path.relative_to(tree).as_posix(): path.read_bytes() for path in tree.rglob("*") if path.is_file()}
    archive(Path("tree.zip"), packed)
    whole = [(one.name, one.scan) for one in find_inputs(["zip://::tree.zip"]) if not one.error]
    assert whole == [
        ("zip://a.png::tree.zip", False),
        ("zip://p3.nii.gz::tree.zip", True),
        ("zip://p1/series::tree.zip", True),
        ("zip://p2/b.png::tree.zip", False),
        ("zip://p2/bad.png::tree.zip", False),
    ]
    summary = predict_files(predictor, ["zip://p1::tree.zip", "zip://a.png::tree.zip"], "out")
    assert (summary.slices, summary.scans, summary.failures) == (1, 1, [])
    assert Path("out/a.png.json").is_file()
    assert Path("out/p1/series.json").is_file()
    assert len(list(find_inputs(["zip://p1::tree.zip"], slices=True))) == len(SLICES)


def test_files_are_copied_once_and_few_at_a_time(memory, tmp_path, temporary, predictor, monkeypatch):
    count, copied, most = 40, [], []
    packed = archive(tmp_path / "all.zip", {f"{k}.png": png(k) for k in range(count)})
    opened, copy, read = ctmasknet.data.remote._archive, ctmasknet.data.remote._copy, ctmasknet.batch.read_slice
    lock = threading.Lock()

    def counted_copy(*arguments):
        copied.append(arguments[2])
        return copy(*arguments)

    def counted_read(*arguments, **options):
        with lock:
            most.append(len(list(temporary.iterdir())))
        return read(*arguments, **options)

    monkeypatch.setattr(ctmasknet.data.remote, "_copy", counted_copy)
    monkeypatch.setattr(ctmasknet.batch, "read_slice", counted_read)
    monkeypatch.setattr(ctmasknet.data.remote, "ARCHIVE_AGE", 1e9)
    summary = predict_files(predictor, [f"zip://::{packed}"], tmp_path / "out", format="jsonl")
    assert summary.slices == count
    assert sorted(copied) == sorted(f"{k}.png" for k in range(count))
    assert max(most) <= READERS
    assert opened.cache_info().misses <= READERS + 1  # the archive: once for each thread


def test_the_command_line_takes_urls(memory, tmp_path, capsys):
    memory.pipe_file("in/a.png", png())
    memory.pipe_file("list.txt", b"memory://in/a.png\nmemory://in/missing.png\n")
    assert main(["predict", "--names", "memory://list.txt", "-o", str(tmp_path / "out"), "--classifier", "none"]) == 2
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1] == (
        "ctmasknet predict: memory://in/missing.png: nothing is there. Check the address."
    )
    assert "memory://in/a.png: " in printed.out
    assert (tmp_path / "out/a.png.overlay.png").is_file()


# What cannot be had


class Odd(MemoryFileSystem):
    """A server that tells no size for one file, and less than it sends for another."""

    protocol = "odd"

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("odd://"))

    def info(self, path, **options):
        told = super().info(path, **options)
        return {**told, "size": 10 if path.endswith("short.png") else None}


class Broken(MemoryFileSystem):
    """A server that fails."""

    protocol = "broken"

    def info(self, path, **options):
        raise PermissionError("403\nForbidden")


class Locked(MemoryFileSystem):
    """A server that lets nobody into one of its folders, and looks for files as most do."""

    protocol = "locked"
    find = fsspec.AbstractFileSystem.find

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("locked://"))

    def ls(self, path, detail=True, **options):
        if path.endswith("/closed"):
            raise PermissionError(13, "Permission denied")
        return super().ls(path, detail, **options)


@pytest.fixture(autouse=True)
def servers() -> None:
    fsspec.register_implementation("locked", Locked, clobber=True)
    fsspec.register_implementation("odd", Odd, clobber=True)
    fsspec.register_implementation("broken", Broken, clobber=True)
    fsspec.register_implementation("undriven", "no_such_package.Files", clobber=True, errtxt="Install undriven-fs")


@pytest.mark.parametrize(
    ("url", "kind", "message"),
    [
        ("memory://missing.png", InputError, "nothing is there. Check the address."),
        ("zip://missing.png::memory://here.zip", InputError, "nothing is there. Check the address."),
        ("zip://a.png::memory://missing.zip", InputError, "nothing is there. Check the address."),
        ("zip://a.png::memory://here.png", InputError, "cannot be had (File is not a zip file)."),
        ("broken://here.png", InputError, "cannot be had (403 Forbidden). Check the address and your access to it."),
        ("nothing://here.png", InputError, "cannot be had (Protocol not known: nothing)."),
        ("undriven://here.png", MissingExtraError, "a package for this address is missing. Install undriven-fs."),
        ("zip://a.png::undriven://a.zip", MissingExtraError, "a package for this address is missing."),
        ("reference://a.png::memory://here.json", InputError, "reference files lead to other addresses. Give those."),
    ],
)
def test_what_cannot_be_had_is_said_in_one_line(url, kind, message, tmp_path, memory, predictor):
    memory.pipe_file("here.png", png())
    memory.pipe_file("here.zip", archive(tmp_path / "a.zip", {"a.png": png()}).read_bytes())
    for read in (read_slice, open_volume, predictor):
        with pytest.raises(kind, match=rf"^{re.escape(url)}: {re.escape(message)}") as caught:
            read(url)
        assert "\n" not in str(caught.value)
    # In a run it is one failure among others.
    summary = predict_files(predictor, [url, url.replace(".png", ""), "memory://here.png"], tmp_path / "out")
    assert (summary.slices, len(summary.failures)) == (1, 2)


def test_what_is_too_large_is_not_copied(memory, monkeypatch):
    monkeypatch.setattr(ctmasknet.data.slices, "MAX_PICTURE", len(png()) - 1)
    monkeypatch.setattr(ctmasknet.data.slices, "MAX_FETCHED", 2 * len(png()) - 1)
    memory.pipe_file("a.png", png())
    memory.pipe_file("folder/1", png())
    memory.pipe_file("folder/2", png())
    copied = []
    monkeypatch.setattr(ctmasknet.data.remote, "_copy", lambda *arguments: copied.append(arguments))
    with pytest.raises(InputError, match=r"^memory://folder: a directory, not a slice"):
        read_slice("memory://folder")
    for url in ("memory://a.png", "memory://folder"):
        with pytest.raises(InputError, match=rf"^{url}: larger than [\d,]+ bytes, too large to be copied here"):
            open_volume(url)
    assert copied == []


def test_what_turns_out_too_large_is_not_copied_to_its_end(memory, monkeypatch):
    memory.pipe_file("a.png", png())
    memory.pipe_file("short.png", png())
    monkeypatch.setattr(ctmasknet.data.slices, "MAX_PICTURE", len(png()) - 1)
    for url in ("odd://a.png", "odd://short.png"):
        with pytest.raises(InputError, match=rf"^{url}: larger than [\d,]+ bytes, too large to be copied here"):
            read_slice(url)
    monkeypatch.setattr(ctmasknet.data.slices, "MAX_PICTURE", len(png()))
    assert read_slice("odd://a.png").source == "odd://a.png"


def test_a_folder_that_cannot_be_listed_whole_is_refused(memory):
    memory.pipe_file("in/open/a.png", png())
    memory.pipe_file("in/closed/b.png", png())
    assert [one.name for one in find_inputs(["locked://in/open"])] == ["locked://in/open/a.png"]
    (failure,) = find_inputs(["locked://in"])
    assert failure.error.startswith("locked://in: cannot be had (Permission denied)")


def test_a_folder_of_too_many_files_is_no_scan(memory, monkeypatch):
    monkeypatch.setattr(ctmasknet.data.remote, "MAX_FILES", 2)
    for k in range(3):
        memory.pipe_file(f"folder/{k}", png())
    with pytest.raises(InputError, match=r"^memory://folder: 3 files are too many\. A scan has 2 at most"):
        open_volume("memory://folder")


@pytest.mark.parametrize("name", ["../../evil.png", "a/../../evil.png", "x::memory://evil.png"])
def test_names_in_an_archive_lead_nowhere_else(name, tmp_path, memory, predictor):
    pytest.importorskip("nibabel")
    memory.pipe_file("evil.png", png())
    packed = archive(tmp_path / "b.zip", {name: png(), "good.png": png()})
    before = sorted(tmp_path.rglob("*"))
    (failure,) = [one.error for one in find_inputs([f"zip://::{packed}"])]
    assert failure.startswith(f"zip://::{packed}: a name in it leads elsewhere ({name})")
    with pytest.raises(InputError, match="zip://"):
        open_volume(f"zip://::{packed}")
    assert sorted(tmp_path.rglob("*")) == before


def test_paths_and_what_files_hold_are_never_taken_for_urls(memory):
    memory.pipe_file("a.png", png())
    with pytest.raises(InputError, match="cannot be opened"):
        read_slice(Path("memory://a.png"))
