"""Tables 1 to 5: against the paper's print, scipy, and counts made by hand."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_data import class_folder, lesion_folder
from paper.__main__ import ITEMS, main, make
from paper.drawing import save_table
from paper.request import Request
from paper.roi_counts import RoICounts, roi_counts
from paper.table1 import table1
from paper.table2 import table2
from paper.table3 import table3
from paper.table4 import table4
from paper.table5 import table5
from phantom import phantom
from torch import nn

from ctmasknet import ConfigError, DataError, create_model, evaluate
from ctmasknet.data.datasets import open_dataset
from ctmasknet.evaluation.contributions import roi_contributions
from ctmasknet.evaluation.evaluate import Table
from ctmasknet.models import COVIDCTMaskNet
from ctmasknet.results import RoIBatch, run_length_encode

QUICK: dict[str, Any] = {"min_size": 128, "rpn_pre_nms_top_n_test": 60, "rpn_post_nms_top_n_test": 30}
NAMES = ("control", "pneumonia", "covid")


def column(table: Table, name: str) -> list[Any]:
    index = [title for title, _ in table.columns].index(name)
    return [row[index] for row in table.rows]


def counts(seed: int = 0, patients: int = 0) -> RoICounts:
    """More RoIs from control to COVID-19, none above 0.9 in controls; 30 slices each."""
    rng = np.random.default_rng(seed)
    labels = np.repeat([0, 1, 2], 30)
    made = rng.poisson([[0.4, 0.2, 0.0]] * 30 + [[3, 1, 0.2]] * 30 + [[20, 9, 3]] * 30)
    who = tuple(f"p{label}{i % patients}" if patients else None for label in range(3) for i in range(30))
    return RoICounts(NAMES, labels, made, who)


# --- the table itself ------------------------------------------------------------------------------------------


def test_a_table_as_markdown_with_aligned_columns_and_as_csv(tmp_path: Path) -> None:
    table = Table("T", (("name", "s"), ("value", ".2f")), (("a|b", 1.23456), ("c", None), ("d", "few")), ("Note.",))
    assert str(table).splitlines() == [
        "**T**",
        "",
        "| name | value |",
        "| ---  |  ---: |",
        "| a\\|b |  1.23 |",
        "| c    |   N/A |",
        "| d    |   few |",
        "",
        "Note.",
    ]
    text, values = save_table(table, tmp_path / "new", "t")
    assert text.read_text() == f"{table}\n"
    with values.open() as file:
        assert list(csv.reader(file)) == [["name", "value"], ["a|b", "1.23456"], ["c", ""], ["d", "few"]]


# --- Table 1 ---------------------------------------------------------------------------------------------------


def flops_by_hand(name: str, size: int) -> float:
    """Two per multiplication of every convolution and matrix product, summed by hooks on the layers."""
    total = 0.0

    def count(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Linear):
            total += 2 * output.numel() * module.in_features
        elif isinstance(module, nn.ConvTranspose2d):
            total += 2 * inputs[0].numel() * module.out_channels * module.kernel_size[0] * module.kernel_size[1]
        elif isinstance(module, nn.Conv2d):
            total += 2 * output.numel() * module.in_channels * module.kernel_size[0] * module.kernel_size[1]

    torch.manual_seed(0)
    model = create_model(name, box_score_thresh=-0.01)
    for module in model.modules():
        module.register_forward_hook(count) if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d) else None
    with torch.inference_mode():
        model([torch.from_numpy(phantom(0, size=size).image).float().expand(3, -1, -1) / 255])
    return total


def test_table1_counts_values_trainable_parameters_and_flops() -> None:
    name = "maskrcnn_resnet18_t2"
    table = table1((name,), size=128, repeats=1, device="cpu")
    assert column(table, "values, M")[0] == pytest.approx(3.921260)
    assert column(table, "float32, MB")[0] == pytest.approx(4 * 3.921260, abs=0.01)
    assert column(table, "GFLOPs")[0] == pytest.approx(flops_by_hand(name, 128) / 1e9, rel=1e-6)
    assert column(table, "latency, ms")[0] > 0


def test_table1_quotes_the_paper_and_its_rivals() -> None:
    table = table1(("ctmasknet_resnet18_t1",), size=128, repeats=1, device="cpu")
    assert [row[7:] for row in table.rows] == [
        (6.35, 0.6, "3K", "20.6K", "21.1K", "7.06"),
        (1.8, None, None, None, None, None),
        (25.61, 25.61, "3K", "370", "438", "0.129"),
        (11.69, 11.69, "528", None, "90", "0.170"),
    ]
    assert column(table, "values, M")[0] == pytest.approx(6.287730)
    assert column(table, "trainable, M")[0] == pytest.approx(0.596099)  # as the released code trains
    assert column(table, "model")[1:] == ["COVIDNet-CT (best) [GWW20]", "COVNet [LQX+20]", "ResNet18 [BGCB20]"]
    assert "N/A" in str(table)


@pytest.mark.slow
def test_table1_holds_all_fourteen() -> None:
    assert len(table1(size=128, repeats=1).rows) == 14 + 3


# --- Tables 2 and 3 --------------------------------------------------------------------------------------------


def test_table2_puts_measured_and_paper_rows_apart(tmp_path: Path) -> None:
    data = lesion_folder(tmp_path / "data", range(1, 4))
    found = []
    for sample in open_dataset("segmentation", data):
        for mask in sample.target["masks"].numpy() != 0:
            entry = {"image_id": sample.name, "category_id": 1, "score": 0.9, "segmentation": run_length_encode(mask)}
            found.append(entry)
    (tmp_path / "rival.json").write_text(json.dumps(found[1:]))  # one lesion is missed
    table = table2([evaluate(tmp_path / "rival.json", data)])
    assert column(table, "source") == ["measured"] + 8 * ["paper"]
    assert table.rows[0][0] == "rival"
    # Slice 1 has one lesion, which is the one missed: AP 0, 1 and 1.
    assert column(table, "AP@0.5")[0] == pytest.approx(2 / 3)
    assert column(table, "AP@0.5, 95% CI")[0] is None
    assert column(table, "AP@0.5")[1:] == [0.6192, 0.3699, 0.4995, 0.4993, 0.5357, 0.5988, 0.4491, 0.5020]
    assert column(table, "AP@[0.5:0.95]")[1:] == [0.4468, 0.3137, 0.3932, 0.3759, 0.3465, 0.4476, 0.3404, 0.3871]
    assert column(table, "training, min")[1:] == [137.38, 128.75, 108.8, 126.9, 119.23, 134.01, 129.2, 145.54]
    assert "not to be compared" in table.notes[1]


def test_table2_has_a_row_for_ggo_and_consolidation_apart(tmp_path: Path) -> None:
    data = lesion_folder(tmp_path / "data", range(1, 3))
    model = create_model("maskrcnn_resnet18_t2", num_classes=3, **QUICK)
    table = table2([evaluate(model, data)])
    assert table.rows[0][0].endswith("GGO and consolidation apart")


def test_table3_measures_and_quotes(tmp_path: Path) -> None:
    data = class_folder(tmp_path / "data", patient=1)
    slices = open_dataset("classification", data)
    # Right on every slice but one of COVID-19, called pneumonia.
    called = [s.label if s.name != "2_p1_1_0" else 1 for s in slices]
    rows = [{"image_id": n, "probabilities": np.eye(3)[c].tolist()} for n, c in zip(slices.names, called, strict=True)]
    (tmp_path / "rival.json").write_text(json.dumps(rows))
    table = table3([evaluate(tmp_path / "rival.json", data)])
    assert [column(table, name)[0] for name in ("COVID-19", "pneumonia", "normal")] == [0.5, 1, 1]
    assert column(table, "overall")[0] == pytest.approx(5 / 6)
    assert column(table, "overall")[1:] == [0.9663, 0.7818, 0.9395, 0.8866, 0.8245, 0.9289, 0.9199, 0.9564]
    assert column(table, "COVID-19")[1:] == [0.9268, 0.8751, 0.9135, 0.8405, 0.8698, 0.9176, 0.8925, 0.9388]


def test_tables_refuse_evaluations_of_the_other_task(tmp_path: Path) -> None:
    found = evaluate(create_model("ctmasknet_resnet18_t2", **QUICK), class_folder(tmp_path / "d", 1), samples=0)
    with pytest.raises(ConfigError, match="an evaluation of classification, this table is for segmentation"):
        table2([found])


def test_training_minutes_come_from_the_weights_record(tmp_path: Path) -> None:
    model = create_model("maskrcnn_resnet18_t2", **QUICK)
    model.metadata = {"training": {"minutes": 65}}
    found = evaluate(model, lesion_folder(tmp_path / "data", range(1, 2)))
    assert column(table2([found]), "training, min")[0] == 65


# --- Tables 4 and 5 --------------------------------------------------------------------------------------------


def test_table4_gives_the_spread_and_the_interval_of_the_mean() -> None:
    stats = pytest.importorskip("scipy.stats")
    made = counts()
    row = next(r for r in made.summary() if (r["class"], r["threshold"]) == ("covid", 0.5))
    values = made.counts[made.labels == 2, 1]
    assert row["mean"] == pytest.approx(values.mean())
    assert row["spread"] == pytest.approx(1.96 * values.std(ddof=1))
    expected = stats.t.interval(0.95, len(values) - 1, values.mean(), stats.sem(values))
    assert row["interval"] == pytest.approx(expected)
    assert row["patient_interval"] is None  # patients unknown
    known = next(r for r in counts(patients=6).summary() if r["class"] == "covid")
    assert known["patient_interval"][0] < known["mean"] < known["patient_interval"][1]


def test_table4_quotes_the_paper() -> None:
    table = table4(counts(), model="m")
    paper = [row[5:7] for row in table.rows if row[1] == "paper"]
    assert paper[0] == (42.71, 61.06)
    assert paper[4] == (0.15, 1.25)
    assert paper[8] == (0.0, 0.0)


def test_table5_is_scipys_one_sided_test() -> None:
    stats = pytest.importorskip("scipy.stats")
    made = counts()
    tests = {(t["first"], t["second"], t["threshold"]): t for t in made.tests()}
    for label, name in ((1, "pneumonia"), (0, "control")):
        expected = stats.ks_2samp(made.counts[60:, 0], made.counts[made.labels == label, 0], alternative="less")
        assert tests["covid", name, 0.2]["statistic"] == pytest.approx(expected.statistic)
        assert tests["covid", name, 0.2]["p"] == pytest.approx(expected.pvalue)
    assert tests["covid", "pneumonia", 0.2]["p"] < 1e-6  # COVID-19 has more: significant
    reverse = made.tests([(1, 2)])[0]
    assert reverse["p"] > 0.5  # the other way round it is not
    assert tests["covid", "control", 0.9] == {
        "first": "covid",
        "second": "control",
        "threshold": 0.9,
        "statistic": None,
        "p": None,
    }  # no control RoI above 0.9: N/A, as in the paper


def test_table5_quotes_the_paper() -> None:
    table = table5(counts(), model="m")
    paper = [row[5:] for row in table.rows if row[1] == "paper"]
    assert paper[0] == (0.96, 1e-10, "yes")
    assert paper[7] == (0.067, 0.091, "no")
    assert paper[5] == (None, None, None)


def test_a_class_without_slices_is_na_in_tables_4_and_5() -> None:
    whole = counts()
    kept = whole.labels != 1
    without = RoICounts(NAMES, whole.labels[kept], whole.counts[kept], (None,) * 60)
    for table in (table4(without, model="m"), table5(without, model="m")):
        measured = [row for row in table.rows if row[1] == "measured" and "pneumonia" in row[2]]
        assert all(value is None for row in measured for value in row[5:])
        assert "nan" not in str(table)


def test_counts_come_from_the_models_roi_batch(tmp_path: Path) -> None:
    model = create_model("ctmasknet_resnet18_t2", **QUICK)
    data = class_folder(tmp_path / "data", patient=1, per_class=1)
    found = RoICounts.of(evaluate(model, data, samples=0).rows, NAMES)
    for index, sample in enumerate(open_dataset("classification", data)):
        with torch.inference_mode():
            scores = model([(sample.image.float() / 255).expand(3, -1, -1)])[0]["scores"]
        assert found.counts[index].tolist() == [int((scores > t).sum()) for t in (0.2, 0.5, 0.9)]


def test_equally_many_slices_of_each_class_are_drawn_by_the_seed(tmp_path: Path) -> None:
    data = class_folder(tmp_path / "data", patient=1, per_class=3)
    (data / "0_p1_1_2.png").unlink()
    model = create_model("ctmasknet_resnet18_t2", **QUICK)
    model.save_pretrained(tmp_path / "weights")
    drawn = []
    for seed, limit in ((0, 1), (0, 1), (1, 1), (0, None)):
        request = Request((str(tmp_path / "weights"),), (str(data),), seed, limit, rows=tmp_path / f"rows{len(drawn)}")
        counts, _ = roi_counts(request, "Table 4")
        rows = (tmp_path / f"rows{len(drawn)}").rglob("rows-*.jsonl")
        names = sorted(json.loads(line)["image_id"] for path in rows for line in path.read_text().splitlines())
        assert [int((counts.labels == label).sum()) for label in range(3)] == [limit or 2] * 3
        drawn.append(names)
    assert drawn[0] == drawn[1] != drawn[2]


def test_rows_without_roi_batches_are_refused() -> None:
    with pytest.raises(DataError, match="need a COVID-CT-Mask-Net classifier"):
        RoICounts.of([{"label": 0, "probabilities": [1, 0, 0]}], NAMES)


# --- contributions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("replicate", [True, False])
def test_contributions_are_how_fast_a_logit_changes_with_an_roi(replicate: bool) -> None:
    torch.manual_seed(1)
    model = create_model("ctmasknet_resnet18_t2", replicate=replicate, **QUICK)
    assert isinstance(model, COVIDCTMaskNet)
    image = torch.from_numpy(phantom(1, size=128).image).float().expand(3, -1, -1) / 255
    model.eval()
    with torch.inference_mode():
        result = model([image])[0]
    batch = RoIBatch(*(result[key].numpy() for key in ("boxes", "scores", "labels", "deltas")))
    found = roi_contributions(model, batch)
    np.testing.assert_allclose(found.logits, result["logits"], atol=1e-5)
    assert found.copies.sum() == len(result["scores"])
    starts = np.cumsum(found.copies) - found.copies
    np.testing.assert_allclose(found.boxes, result["boxes"][starts], atol=1e-4)
    slots = torch.zeros(128, 5, dtype=torch.float64)
    slots[: len(result["scores"])] = torch.cat([result["scores"][:, None], result["deltas"]], 1)
    for region in (0, 3):
        scaled = slots.clone()
        rows = slice(int(starts[region]), int(starts[region] + found.copies[region]))
        step = 1e-6  # module S is piecewise linear: a longer one may cross an edge
        scaled[rows] *= 1 + step
        with torch.inference_mode():
            change = (model.module_s.double()(scaled[None]) - model.module_s(slots[None])) / step
        model.module_s.float()
        np.testing.assert_allclose(found.contributions[region], change[0], atol=2e-4)


# --- the command -------------------------------------------------------------------------------------------------


def test_paper_commands_write_and_print(tmp_path: Path, capsys: Any) -> None:
    data = class_folder(tmp_path / "data", patient=1, per_class=1)
    weights = tmp_path / "weights"
    model = create_model("ctmasknet_resnet18_t2", **QUICK)
    model.save_pretrained(weights)
    common = ["--weights", str(weights), "--data", str(data), "-o", str(tmp_path / "out")]
    assert main(["table3", *common]) == 0
    assert "Class sensitivity" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"table3.md", "table3.csv", "table3.png"}
    rows = ["--rows", str(tmp_path / "rows"), "--limit", "1", "--name", "mine"]
    assert main(["table5", *common, *rows]) == 0
    assert (tmp_path / "out" / "mine.csv").exists()
    assert main(["table4", *common, *rows]) == 0  # from the same rows
    capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table6"], "'table6' is not in the paper: use one of table1"),
        (["table2"], "Table 2 needs data: give --data DIR"),
        (["table4", "--data", "d", "--weights", "a", "b"], "Table 4 takes one, not 2: a, b"),
        (["figure1", "--weights", "maskrcnn_resnet99"], "did you mean"),
        (["figure3", "--data", "d", "--weights", "maskrcnn_resnet18_t9"], "unknown variant"),
    ],
)
def test_paper_commands_name_the_mistake(arguments: list[str], message: str, capsys: Any, tmp_path: Path) -> None:
    assert main([*arguments, "-o", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_named_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("paper.__main__.make", lambda *_, **__: pytest.fail("work was done"))
    (tmp_path / "file").write_text("in the way")
    assert main(["table1", "-o", str(tmp_path / "file" / "result")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_every_table_and_figure_of_the_paper_has_a_command() -> None:
    assert set(ITEMS) == {*(f"table{i}" for i in range(1, 6)), *(f"figure{i}" for i in range(1, 5)), "contributions"}


def test_an_item_is_written_under_its_name(tmp_path: Path) -> None:
    _, paths = make("figure1", Request(weights=("maskrcnn_resnet18_t2",)), tmp_path)
    assert [path.name for path in paths] == [f"figure1.{suffix}" for suffix in ("md", "csv", "pdf", "svg", "png")]
