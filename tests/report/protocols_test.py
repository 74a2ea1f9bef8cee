"""The protocols of MTAN's data sets: Δm over all their metrics by hand, and published figures beside ours."""

import json
import pathlib

import numpy as np
import pytest

from configs import nyu
from mtl_sparse.report import page, protocols, study, study_tables

METRICS = protocols.METRICS["nyuv2_13"]
TASKS = ("segmentation", "depth", "normals")
KEYS = [f"{task}/{metric.key}" for task, metrics in METRICS.items() for metric in metrics]
SIGNS = [1, 1, -1, -1, -1, -1, 1, 1, 1]
SINGLE = protocols.PUBLISHED["nyuv2_13"][0].values


def write_run(folder, tasks, values, *, seed=0, lambda_=0.0, weighting="equal", name="nyuv2_13", **loss):
    """Write a finished run whose test metrics are the nine `values`, as far as they are of its tasks."""
    config = nyu.get_config()
    config.tasks, config.seed, config.sparsity.lambda_, config.data.name = tasks, seed, lambda_, name
    config.loss.update(weighting=weighting, **loss)
    test = {key: value for key, value in zip(KEYS, values, strict=True) if key.partition("/")[0] in tasks}
    test |= {"segmentation/image_iou_stride8": 0.1, "normals/cosine": 0.2, "depth/mae_normalized_stride8": 0.3}
    results = {
        "test": test,
        "constant": {},
        "headlines": {task: {"metric": f"{task}/x", "higher_is_better": True} for task in tasks},
        "sparsity": {"group": 0.0, "parameter": 0.0, "layers": [], "penalty": "group_lasso"},
        "config": json.loads(config.to_json()),
        "step": 2,
        "seed": seed,
        "frames": {"train": 4, "validation": 2, "test": 3},
        "versions": {},
        "device": "1 x cpu",
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(config.to_json())
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "metrics.jsonl").write_text('{"step": 2, "split": "validation", "sparsity/group": 0.0}\n')
    return folder


def singles(parent, values=SINGLE, **options):
    return [write_run(parent / f"single_{task}", (task,), values, **options) for task in TASKS]


def multi(found):
    return [row for row in found.rows if len(row.tasks) == 3]


WITH_VALUES = [one for one in protocols.PUBLISHED["nyuv2_13"] if one.values and one.gain is not None]


@pytest.mark.parametrize("one", WITH_VALUES, ids=lambda one: one.method)
def test_published_gains_follow_from_the_published_metrics(one, tmp_path):
    """Figures of a paper, as if they were runs of ours, end with the paper's Δm: the mean over nine metrics."""
    found = study.read([*singles(tmp_path), write_run(tmp_path / "multi", TASKS, one.values)])
    (row,) = multi(found)
    assert found.gain(row, by_metric=True).mean == pytest.approx(one.gain, abs=0.015)
    assert abs(found.gain(row).mean - one.gain) > 0.3, "the mean over tasks is another number"


def test_both_means_by_hand(tmp_path):
    base = [0.5, 0.5, 1.0, 0.2, 20.0, 10.0, 0.5, 0.5, 0.5]
    ours = [0.6, 0.5, 0.9, 0.1, 22.0, 10.0, 0.5, 0.4, 0.5]
    relative = [20, 0, 10, 50, -10, 0, 0, -20, 0]
    found = study.read([*singles(tmp_path, base), write_run(tmp_path / "multi", TASKS, ours)])
    (row,) = multi(found)
    assert found.gain(row, by_metric=True).mean == pytest.approx(np.mean(relative))
    assert found.gain(row).mean == pytest.approx(((20 + 0) / 2 + (10 + 50) / 2 + (-10 - 20) / 5) / 3)
    without = study.read([*singles(tmp_path / "more", base)[:2], tmp_path / "multi"])
    assert without.gain(multi(without)[0]) is None and without.gain(multi(without)[0], by_metric=True) is None


def test_the_gain_over_equal_weights_is_paired_by_seed(tmp_path):
    rng, made, by_hand = np.random.default_rng(0), [], []
    for seed in range(2):
        equal, other = (np.array(SINGLE) * rng.uniform(0.8, 1.2, 9) for _ in range(2))
        made.append(write_run(tmp_path / f"equal{seed}", TASKS, equal, seed=seed))
        made.append(write_run(tmp_path / f"other{seed}", TASKS, other, seed=seed, weighting="uncertainty"))
        gains = 100 * np.array(SIGNS) * (other - equal) / equal
        by_hand.append(np.mean([gains[:2].mean(), gains[2:4].mean(), gains[4:].mean()]))
    made.append(write_run(tmp_path / "smooth", TASKS, equal, weighting="uncertainty", label_smoothing=0.0))
    made += singles(tmp_path)
    found = study.read(made)
    equal, other, smooth = multi(found)
    assert found.equal(other) is equal and found.equal(equal) is None
    assert found.equal(smooth) is None, "another loss of the segmentation"
    assert study.compare_gain(other, equal).mean == pytest.approx(np.mean(by_hand))
    assert found.gain(other) is not None, "the single-task runs add their loss as it is"
    assert found.gain(smooth) is None
    lines = study_tables.protocol(found)
    assert [line[1] for line in lines[1:4]] == [
        "label_smoothing 0.1, weighting equal",
        "label_smoothing 0.1, weighting uncertainty",
        "label_smoothing 0, weighting uncertainty",
    ]
    assert [line[-2] for line in lines[1:4]] == ["", f"{np.mean(by_hand):+.2f}", ""]


def test_published_figures_stand_beside_ours_with_their_protocol(tmp_path):
    ours = [*SINGLE[:2], 0.5, 0.2, 24.0, 18.0, 0.33, 0.6, 0.7]
    folders = [*singles(tmp_path), write_run(tmp_path / "multi", TASKS, ours, lambda_=1e-5)]
    lines = study_tables.protocol(study.read(folders))
    head, first, *published = lines
    assert head[:4] == ("protocol", "row", "segmentation mIoU ↑", "segmentation Pix Acc ↑")
    assert head[-4:] == ("Δm by metric %", "Δm %", "% over equal weights", "source") and len(head) == 2 + 9 + 4
    assert first[:6] == ("ours", "lambda 1e-05", "0.3830", "0.6376", "0.5000", "0.2000")
    assert first[-1] == "1 seed" and float(first[-4]) > 0
    kinds = [line[0] for line in published]
    assert kinds == ["published, A"] * 11 + ["published, B"] * 5
    assert published[1] == (
        "published, A", "equal weights", "0.3929", "0.6533", "0.5493", "0.2263", "28.1500", "23.9600", "0.2209",
        "0.4750", "0.6108", "-5.59", "", "", "Navon et al. 2022 (2202.01017)",
    )  # fmt: skip
    assert published[11] == ("published, B", "GLS", *[""] * 11, "+1.82", "LibMTL, ResNet-50, one run")
    assert {len(line) for line in lines} == {len(head)}


def test_columns_follow_their_metric_whatever_the_order_of_the_tasks(tmp_path):
    folder = write_run(tmp_path / "multi", TASKS[::-1], SINGLE)
    head, first, single, *_ = study_tables.protocol(study.read([folder]))
    assert head[2] == "normals Mean ↓" and first[2:11] == single[2:11]
    assert single[1] == "single tasks" and single[2] == "25.0100" and single[-6:-4] == ("0.3830", "0.6376")


def test_the_summary_has_all_metrics_and_the_page_says_how_to_read_them(tmp_path, capsys):
    folders = [*singles(tmp_path), write_run(tmp_path / "multi", TASKS, WITH_VALUES[0].values)]
    found = study.read(folders)
    head = study_tables.summary(found)[0]
    names = [f"{task} {metric.name} {'↑' if metric.higher_is_better else '↓'}" for task in TASKS
             for metric in METRICS[task]]  # fmt: skip
    assert list(head[1:10]) == names and head[-3:] == ("Δm %", "Δm by metric %", "seeds")
    text = page.write(folders, tmp_path / "report").read_text()
    capsys.readouterr()
    assert "-5.59" in text and "published, B" in text and "at the resolution of the labels" in text
    assert text.count('<tr class="published">') == len(protocols.PUBLISHED["nyuv2_13"])
    assert (tmp_path / "report" / "protocol.csv").exists()


def test_other_data_sets_and_metrics_have_no_protocol(tmp_path):
    other = study.read([write_run(tmp_path / "other", TASKS, SINGLE, name="nyud_mt")])
    assert len(study_tables.protocol(other)) == 1 and not other.has_several_metrics
    folder = write_run(tmp_path / "normalized", TASKS, SINGLE)
    results = json.loads((folder / "results.json").read_text())
    del results["test"]["depth/mae"]
    (folder / "results.json").write_text(json.dumps(results))
    found = study.read([folder])
    assert [name for _, name, _ in found.metrics("depth")] == ["MAE"], "normalized depth has the paper's metric"
    assert len(found.metrics("normals")) == 5


def test_cityscapes_has_four_metrics(tmp_path):
    two = TASKS[:2]
    made = [write_run(tmp_path / task, (task,), SINGLE, name="cityscapes_7") for task in two]
    better = [*(1.1 * np.array(SINGLE[:2])), *(0.8 * np.array(SINGLE[2:4])), *SINGLE[4:]]
    made.append(write_run(tmp_path / "multi", two, better, name="cityscapes_7"))
    found = study.read(made)
    (row,) = [row for row in found.rows if len(row.tasks) == 2]
    assert found.gain(row, by_metric=True).mean == pytest.approx(15)
    assert [line[0] for line in study_tables.protocol(found)[1:]] == ["ours"]


def test_the_page_of_the_documentation_has_the_same_figures():
    text = (pathlib.Path(__file__).parents[2] / "docs" / "protocols.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    rows = [row for row in rows if len(row) == 14]
    head, *lines = rows
    assert head[2:11] == [metric.name for metrics in METRICS.values() for metric in metrics]
    wanted = []
    for one in protocols.PUBLISHED["nyuv2_13"]:
        values = [f"{value:g}" for value in one.values] or [""] * 9
        gains = [f"{gain:+.2f}" if gain is not None else "" for gain in (one.gain, one.over_equal)]
        wanted.append([one.protocol, one.method, *values, *gains, one.source])
    assert lines == wanted
