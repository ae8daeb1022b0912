"""Weights from the Hub: the real client against a server on this machine that speaks the Hub's interface."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from hub_client import Client
from hub_server import OWNER, TOKEN, HubServer, running_hub, sha256
from safetensors.torch import load, save

from ctmasknet import ConfigError, WeightsError, create_model, from_pretrained
from ctmasknet.cli import main
from ctmasknet.weights.assemble import int8_file
from ctmasknet.weights.files import state_digest
from ctmasknet.weights.manifest import MANIFEST, ManifestEntry, backbone_entry

NAME = "maskrcnn_resnet18_t2"
REPOSITORY = f"{OWNER}/seg"
SMALL: dict[str, Any] = {"min_size": 64, "max_size": 128, "rpn_post_nms_top_n_test": 50}
AT_ONCE = 3.0  # seconds an error may take


# --- run in the client's process


def checksum(weights: str, name: str | None = None, **options: Any) -> int:
    model = create_model(name, weights=weights) if name else from_pretrained(weights, **options)
    return state_digest(model.state_dict())


def warnings_of(weights: str, caplog_level: int = 30) -> tuple[int, list[str]]:
    import logging

    records: list[str] = []
    handler = logging.Handler(caplog_level)
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("ctmasknet").addHandler(handler)
    try:
        return checksum(weights), records
    finally:
        logging.getLogger("ctmasknet").removeHandler(handler)


def default_of(entry: ManifestEntry) -> int:
    from ctmasknet.weights import hub

    known, hub.default_entry = hub.default_entry, lambda variant: entry
    try:
        return checksum("default", entry.variant)
    finally:
        hub.default_entry = known


def imagenet_body(sha256: str | None = None) -> dict[str, torch.Tensor]:
    from ctmasknet.weights import assemble

    known = assemble.backbone_entry
    if sha256 is not None:
        assemble.backbone_entry = lambda name: (*known(name)[:2], sha256)
    try:
        body = create_model(NAME, weights_backbone=True).backbone.body.state_dict()
        return {key: body[key].clone() for key in ("conv1.weight", "bn1.running_mean", "layer2.1.conv2.weight")}
    finally:
        assemble.backbone_entry = known


def command(*arguments: str) -> tuple[int, str, str]:
    import contextlib
    import io

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    return code, out.getvalue(), err.getvalue()


def int8_network(weights: str) -> tuple[bytes, bytes]:
    model = from_pretrained(weights)
    return model.int8_network(model)


# --- fixtures


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with running_hub() as server:
        yield server


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    torch.manual_seed(1)
    model = create_model(NAME, **SMALL)
    folder = model.save_pretrained(tmp_path_factory.mktemp("seg"))
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def expected(files: dict[str, bytes]) -> int:
    return state_digest(load(files["model.safetensors"]))


@pytest.fixture(scope="module")
def revision(hub: HubServer, files: dict[str, bytes]) -> str:
    return hub.add(REPOSITORY, files)


@pytest.fixture(scope="module")
def processes(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    client = Client(hub.url, tmp_path_factory.mktemp("home"))
    client(create_model, NAME)  # imports torch, so that times below are those of the work
    yield client
    client.close()


@pytest.fixture
def online(hub: HubServer, processes: Client) -> Client:
    processes.wipe()
    hub.faults.clear()
    return processes


def fails_at_once(client: Client, message: str, function: Any, *arguments: Any, **options: Any) -> str:
    started = time.monotonic()
    with pytest.raises(WeightsError, match=message) as caught:
        client(function, *arguments, **options)
    assert time.monotonic() - started < AT_ONCE
    assert "\n" not in str(caught.value)
    return str(caught.value)


def damaged(files: dict[str, bytes], change: str) -> dict[str, bytes]:
    """The repository's files with other tensors in its weights."""
    tensors = load(files["model.safetensors"])
    key = "roi_heads.box_head.fc6.weight"
    if change == "missing":
        del tensors[key]
    elif change == "unexpected":
        tensors["surplus"] = torch.zeros(1)
    elif change == "of another shape":
        tensors[key] = torch.zeros(2, 2)
    return files | {"model.safetensors": save(tensors, {"format": "pt"})}


# --- what should work


def test_every_spelling_of_a_repository_gives_the_published_weights(online, hub, revision, expected):
    assert online(checksum, REPOSITORY) == expected
    assert online(checksum, f"{REPOSITORY}@{revision}") == expected
    assert online(checksum, REPOSITORY, revision=revision) == expected
    assert online(checksum, f"{REPOSITORY}@main", NAME) == expected


def test_a_cached_pinned_variant_makes_no_request(online, hub, revision, expected):
    assert online(checksum, f"{REPOSITORY}@{revision}", verify=True) == expected
    before = hub.count()
    assert online(checksum, f"{REPOSITORY}@{revision}") == expected
    assert online(checksum, REPOSITORY, revision=revision, verify=True) == expected
    assert online(checksum, f"{REPOSITORY}@{revision}", NAME) == expected
    assert hub.count() == before


def test_a_branch_follows_new_commits_and_fetches_only_what_changed(online, hub, files):
    name = f"{OWNER}/moving"
    hub.add(name, files)
    first = online(checksum, name)
    tensors = load(files["model.safetensors"])
    tensors["backbone.body.conv1.weight"] += 1
    hub.add(name, {"model.safetensors": save(tensors, {"format": "pt"})})
    before = hub.count("GET")
    assert online(checksum, name) == state_digest(tensors) != first
    assert hub.count("GET") == before + 3  # the first bytes of the config and of the weights, and the weights


def test_an_int8_network_comes_along_where_the_config_states_one(online, hub, files, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    network = int8_file(from_pretrained(tmp_path), b"<net/>", b"weights")
    facts = json.loads(files["config.json"])
    facts["metadata"]["int8"] = {"sha256": sha256(network), "measured": "not measured"}
    stated = files | {"config.json": json.dumps(facts).encode()}
    hub.add(f"{OWNER}/int8", stated | {"int8.safetensors": network})
    assert online(int8_network, f"{OWNER}/int8") == (b"<net/>", b"weights")
    hub.add(f"{OWNER}/replaced", stated | {"int8.safetensors": network + b" "})
    fails_at_once(online, "int8.safetensors has SHA-256", int8_network, f"{OWNER}/replaced")


def test_an_existing_folder_goes_before_the_hub(online, hub, revision, files, tmp_path, monkeypatch):
    folder = tmp_path / OWNER / "seg"
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    before = hub.count()
    assert from_pretrained(REPOSITORY).variant.name == NAME
    assert hub.count() == before


def test_default_comes_from_the_hub_where_it_is_not_bundled(online, hub, revision, files, expected):
    content = files["model.safetensors"]
    entry = ManifestEntry(
        NAME, "test", sha256(content), len(content), ("background", "lesion"), {}, "mit", None, REPOSITORY, revision
    )
    assert online(default_of, entry) == expected
    before = hub.count()
    assert online(default_of, entry) == expected
    assert hub.count() == before
    wrong = replace(entry, sha256="0" * 64)
    fails_at_once(online, "not the one it should have.*not kept", default_of, wrong)
    assert not online.cached("model.safetensors")


@pytest.mark.skipif(int(huggingface_hub.__version__.split(".")[0]) < 2, reason="older clients fail, and start anew")
def test_a_connection_lost_half_way_is_resumed_where_it_broke(online, hub, revision, expected):
    hub.faults["model.safetensors"] = "broken"
    before = hub.count("GET")
    assert online(checksum, f"{REPOSITORY}@{revision}") == expected
    assert hub.count("GET") == before + 5  # the config and half the weights, first bytes first; the other half


@pytest.mark.skipif(int(huggingface_hub.__version__.split(".")[0]) < 2, reason="older clients fail, and start anew")
def test_a_stalled_download_is_resumed_where_it_stopped(hub, revision, expected, tmp_path):
    client = Client(hub.url, tmp_path, HF_HUB_DOWNLOAD_TIMEOUT="1")
    hub.faults["model.safetensors"] = "stalled"
    before = hub.count("GET")
    try:
        assert client(checksum, f"{REPOSITORY}@{revision}") == expected
    finally:
        client.close()
    assert hub.count("GET") == before + 5


def test_two_processes_at_once_do_not_disturb_each_other(hub, revision, expected, tmp_path):
    client = Client(hub.url, tmp_path, processes=2)
    try:
        running = [client.submit(checksum, f"{REPOSITORY}@{revision}", verify=True) for _ in range(2)]
        assert [each.result(timeout=120) for each in running] == [expected] * 2
    finally:
        client.close()
    assert not list(tmp_path.rglob("*.incomplete"))


def test_a_file_damaged_in_the_cache_is_fetched_again(online, hub, revision, expected):
    pinned = f"{REPOSITORY}@{revision}"
    online(checksum, pinned)
    (blob,) = (path.resolve() for path in online.cached("model.safetensors"))
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    found, said = online(warnings_of, pinned)
    assert found == expected
    assert any("damaged and is fetched again" in line for line in said)
    assert sha256(blob.read_bytes()) == blob.name


def test_a_cache_that_shares_blobs_between_repositories_is_understood(online, hub, revision, expected):
    # As the client stores what it fetched by Xet: the blob links to a file named after another hash.
    pinned = f"{REPOSITORY}@{revision}"
    online(checksum, pinned)
    (blob,) = (path.resolve() for path in online.cached("model.safetensors"))
    shared = online.home / "hub" / "blobs" / "ab" / ("ab" * 32)
    shared.parent.mkdir(parents=True)
    blob.rename(shared)
    blob.symlink_to(shared)
    before = hub.count()
    assert online(warnings_of, pinned) == (expected, [])
    assert hub.count() == before
    shared.write_bytes(shared.read_bytes()[:-1])
    assert online(checksum, pinned) == expected
    assert sha256(blob.read_bytes()) == blob.name


# --- what fails, and how


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("short", r"model\.safetensors failed.*should be of size"),
        ("wrong", r"not the one it should have.*not kept"),
        ("down", r"out of order \(HTTP 503\)"),
        ("busy", r"busy \(HTTP 429\)"),
        ("silent", "cannot be reached"),
        ("dripping", r"cannot be reached \(no data in 2 s\)"),
    ],
)
def test_a_bad_transfer_is_named_at_once_and_not_kept(fault, message, online, hub, revision, expected):
    hub.faults["config.json" if fault in ("down", "busy", "silent") else "model.safetensors"] = fault
    fails_at_once(online, message, checksum, f"{REPOSITORY}@{revision}")
    assert not online.cached("model.safetensors")
    hub.faults.clear()
    assert online(checksum, f"{REPOSITORY}@{revision}") == expected


@pytest.mark.parametrize("change", ["missing", "unexpected", "of another shape"])
def test_tensors_that_do_not_fit_are_named(change, online, hub, files):
    repository = f"{OWNER}/{change.replace(' ', '-')}"
    hub.add(repository, damaged(files, change))
    fails_at_once(online, f"1 {change}", checksum, repository)
    fails_at_once(online, f"1 {change}", checksum, repository)  # nor is it good the second time


def test_a_file_that_was_published_truncated_is_not_kept(online, hub, files):
    name = f"{OWNER}/truncated"
    hub.add(name, files | {"model.safetensors": files["model.safetensors"][:5000]})
    fails_at_once(online, "not a readable safetensors file.*not kept", checksum, name)
    assert not online.cached("model.safetensors")


def test_another_variant_is_named(online, hub, revision):
    fails_at_once(online, f"holds {NAME}, not maskrcnn_resnet34_t2", checksum, REPOSITORY, "maskrcnn_resnet34_t2")


def test_a_missing_repository_revision_or_file_is_named(online, hub, revision, files):
    fails_at_once(online, "nobody/nothing: no such folder here, and no such repository", checksum, "nobody/nothing")
    fails_at_once(online, "has no revision 'v9'", checksum, f"{REPOSITORY}@v9")
    fails_at_once(online, "has no revision '0000", checksum, f"{REPOSITORY}@{'0' * 40}")
    hub.add(f"{OWNER}/bare", {"config.json": files["config.json"]})
    fails_at_once(online, r"holds no model\.safetensors", checksum, f"{OWNER}/bare")
    hub.add(f"{OWNER}/pickled", {"config.json": files["config.json"], "pytorch_model.bin": b"\x80"})
    fails_at_once(online, r"holds no model\.safetensors", checksum, f"{OWNER}/pickled")


def test_a_gated_repository_says_how_to_get_in_and_lets_the_token_in(online, hub, files, expected, tmp_path):
    hub.add(f"{OWNER}/gated", files, gated=True)
    message = fails_at_once(online, "gated: ask for access", checksum, f"{OWNER}/gated")
    assert "HF_TOKEN" in message
    member = Client(hub.url, tmp_path, HF_TOKEN=TOKEN)
    try:
        assert member(checksum, f"{OWNER}/gated") == expected
    finally:
        member.close()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "golden.safetensors"])
def test_a_pickle_under_an_accepted_name_is_not_run(name, online, hub, files, tmp_path):
    target = tmp_path / "executed"
    payload = b"\x80\x02cposix\nsystem\n" + f"(Vtouch {target}\ntR.".encode()
    repository = f"{OWNER}/payload-{name.split('.')[0]}"
    hub.add(repository, files | {name: payload})
    fails_at_once(online, name.replace(".", r"\."), checksum, repository, verify=True)
    assert not target.exists()


@pytest.mark.parametrize(
    "text",
    [
        "../../etc/nothing",
        "owner/..",
        "../seg",
        "a/b/c",
        "owner/../../x@main",
        "owner\\name",
        "-owner/name",
        "owner/na me",
        "owner/name.git",
        "owner/model.safetensors",
        "https://example.org/owner/name",
    ],
)
def test_what_is_no_repository_id_is_never_asked_for(text, online, hub):
    before = hub.count()
    fails_at_once(online, "no such file", checksum, text)
    assert hub.count() == before


@pytest.mark.parametrize("revision", ["../../x", "a//b", "/main", "refs/../x", "a b", "", "-x"])
def test_what_cannot_be_a_revision_is_never_asked_for(revision, online, hub):
    before = hub.count()
    fails_at_once(online, "is not a branch, tag or commit", checksum, REPOSITORY, revision=revision)
    fails_at_once(online, "is not a branch, tag or commit", checksum, f"{REPOSITORY}@{revision}")
    assert hub.count() == before


def test_revisions_belong_to_repositories(tmp_path):
    with pytest.raises(WeightsError, match="names a revision and"):
        from_pretrained("owner/name@main", revision="v1")
    with pytest.raises(WeightsError, match="is for Hub repositories"):
        from_pretrained(tmp_path, revision="v1")
    with pytest.raises(WeightsError, match="is a variant, not a path"):
        from_pretrained(NAME)


# --- without a network


def test_without_a_network_the_cache_serves_and_the_rest_fails_at_once(files, expected, tmp_path):
    with running_hub() as hub:
        revision = hub.add(REPOSITORY, files)
        client = Client(hub.url, tmp_path)
        assert client(checksum, REPOSITORY) == expected
    try:
        assert client(checksum, f"{REPOSITORY}@{revision}") == expected
        found, said = client(warnings_of, REPOSITORY)
        assert found == expected
        assert any("cannot be reached" in line and "the copy" in line for line in said)
        fails_at_once(client, "cannot be reached.*check the network", checksum, f"{OWNER}/other")
        fails_at_once(client, "cannot be reached", checksum, f"{REPOSITORY}@{'1' * 40}")
    finally:
        client.close()


def test_the_offline_variable_is_obeyed_and_named(online, hub, revision, expected):
    pinned = f"{REPOSITORY}@{revision}"
    online(checksum, REPOSITORY)
    offline = Client(hub.url, online.home, HF_HUB_OFFLINE="1")
    before = hub.count()
    try:
        assert offline(checksum, pinned) == expected
        assert offline(checksum, REPOSITORY) == expected
        assert offline(command, "download", pinned)[0] == 0
        message = fails_at_once(offline, "HF_HUB_OFFLINE forbids downloads", checksum, f"{OWNER}/other@main")
        assert f"ctmasknet download {OWNER}/other@main" in message
        fails_at_once(offline, r"golden\.safetensors is not in the cache", checksum, pinned, verify=True)
    finally:
        offline.close()
    assert hub.count() == before


# --- golden files


def test_verify_runs_the_golden_input(online, hub, revision, files, expected, tmp_path):
    assert online(checksum, REPOSITORY, verify=True) == expected
    tensors = load(files["model.safetensors"])
    tensors["roi_heads.box_predictor.bbox_pred.weight"] *= 1.5
    others = f"{OWNER}/other-outputs"
    hub.add(others, files | {"model.safetensors": save(tensors, {"format": "pt"})})
    with pytest.raises(WeightsError, match="does not reproduce its recorded outputs: boxes differ"):
        online(checksum, others, verify=True)
    assert online(checksum, others) == state_digest(tensors)
    silent = f"{OWNER}/no-golden"
    hub.add(silent, {name: files[name] for name in ("config.json", "model.safetensors")})
    fails_at_once(online, r"holds no golden\.safetensors", checksum, silent, verify=True)


# --- ImageNet bodies


@pytest.fixture(scope="module")
def imagenet(hub: HubServer) -> tuple[dict[str, torch.Tensor], str]:
    """A file of the shape of timm's, at the commit that the manifest pins."""
    torch.manual_seed(2)
    tensors = timm.create_model("resnet18").state_dict()
    content = save(tensors)
    name, revision, _ = backbone_entry("resnet18")
    hub.add(name, {"model.safetensors": content})
    repository = hub.repositories[name]
    repository.commits[revision] = repository.commits[repository.head]
    return tensors, sha256(content)


def test_weights_backbone_starts_the_body_from_the_pinned_file(online, hub, imagenet):
    tensors, digest = imagenet
    body = online(imagenet_body, digest)
    assert all(torch.equal(value, tensors[key]) for key, value in body.items())
    asked = [path for _, path in hub.requests if "resnet18.a1_in1k" in path]
    assert all(backbone_entry("resnet18")[1] in path for path in asked)
    before = hub.count()
    online(imagenet_body, digest)
    assert hub.count() == before


def test_weights_backbone_with_other_bytes_than_timms_is_refused(online, hub, imagenet):
    fails_at_once(online, "not the one it should have", imagenet_body)
    assert not online.cached("model.safetensors")


def test_weights_backbone_and_weights_exclude_each_other():
    with pytest.raises(ConfigError, match="not both"):
        create_model(NAME, weights="default", weights_backbone=True)


@pytest.mark.parametrize("backbone", ["resnet18", "resnet34", "resnet50"])
def test_the_manifest_knows_every_body(backbone):
    assert backbone_entry(backbone)[0] == f"timm/{backbone}.a1_in1k"
    size = json.loads(MANIFEST.read_text())["backbones"][backbone]["bytes"]
    payload = sum(t.numel() * t.element_size() for t in timm.create_model(backbone).state_dict().values())
    assert 0 < size - payload < 40_000  # the rest is the safetensors header


# --- the command


def test_the_command_download_fetches_everything_once(online, hub, revision):
    code, out, _ = online(command, "download", REPOSITORY, NAME)
    assert code == 0
    assert f"{REPOSITORY}@{revision}" in out
    assert "bundled" in out
    before = hub.count()
    code, out, _ = online(command, "download", f"{REPOSITORY}@{revision}", "--json")
    assert code == 0
    assert '"bytes"' in out
    assert online(checksum, f"{REPOSITORY}@{revision}", verify=True)
    assert hub.count() <= before + 1  # whether the card, which this repository lacks, is there by now
    code, _, err = online(command, "download", "nobody/nothing")
    assert code == 2
    assert err.count("\n") == 1
