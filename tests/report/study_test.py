"""The statistics of the tables against figures computed by hand, and against scipy's tests."""

import csv
import io
import json
import re

import numpy as np
import pytest
from scipy import stats

from configs import nyu, sweeps
from mtl_sparse.report import page, plots, published, study, study_names, study_plots, study_tables
from mtl_sparse.runtime import files
from mtl_sparse.training import folder as folder_lib
from tests.conftest import raises

LAYERS = [
    {"path": "backbone/stem_conv1/kernel", "groups": 3, "zero_groups": 1, "group_size": 9},
    {"path": "backbone/layer1_0/conv1/kernel", "groups": 4, "zero_groups": 2, "group_size": 9},
]


def write_run(folder, tasks, lambda_, seed, *, group=0.0, name="nyud_mt", weighting="uncertainty", **values):
    """Write a finished run with these test metrics: iou, cs, mae; return its folder."""
    config = nyu.get_config()
    config.tasks, config.seed, config.sparsity.lambda_, config.data.name = tasks, seed, lambda_, name
    config.loss.weighting = weighting
    names = {"iou": "segmentation/image_iou_stride8", "cs": "normals/cosine"}
    names["mae"] = "depth/mae_normalized_stride8"
    results = {
        "test": {names[key]: value for key, value in values.items()},
        "constant": {},
        "headlines": {task: {"metric": f"{task}/x", "higher_is_better": True} for task in tasks},
        "sparsity": {"group": group, "parameter": group + 0.1, "layers": LAYERS, "penalty": "group_lasso"},
        "config": json.loads(config.to_json()),
        "size": {
            "trained": {"parameters": 9 * 10**6, "macs": 9 * 10**7},
            "compact": {"parameters": (1 + seed) * 10**6, "macs": (2 + seed) * 10**7},
        },
        "step": 2,
        "seed": seed,
        "frames": {"train": 4, "validation": 2, "test": 3},
        "versions": {"jax": "0.10.0"},
        "device": "1 x cpu",
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(config.to_json())
    (folder / "results.json").write_text(json.dumps(results))
    rows = [{"step": step, "split": "validation", "sparsity/group": group * step / 2} for step in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


BOTH = ("segmentation", "depth")
SPARSE_IOU, DENSE_IOU = [0.33, 0.36, 0.35], [0.30, 0.34, 0.31]
SPARSE_MAE, DENSE_MAE = [0.130, 0.128, 0.135], [0.140, 0.131, 0.150]


@pytest.fixture
def folders(tmp_path):
    """Return dense and sparse runs on two tasks, three seeds each, and their dense single-task runs, two seeds each."""
    made = []
    for seed in range(3):
        sparse = {"iou": SPARSE_IOU[seed], "mae": SPARSE_MAE[seed], "group": 0.66}
        made.append(write_run(tmp_path / f"sparse{seed}", BOTH, 1e-5, seed, **sparse))
        dense = {"iou": DENSE_IOU[seed], "mae": DENSE_MAE[seed]}
        made.append(write_run(tmp_path / f"dense{seed}", BOTH, 0.0, seed, **dense))
    for seed in range(2):
        made.append(write_run(tmp_path / f"seg{seed}", ("segmentation",), 0.0, seed, iou=[0.30, 0.34][seed]))
        made.append(write_run(tmp_path / f"depth{seed}", ("depth",), 0.0, seed, mae=[0.15, 0.17][seed]))
    return made


def row(found, tasks, lambda_):
    (one,) = [row for row in found.rows if row.tasks == tasks and row.config["sparsity"]["lambda_"] == lambda_]
    return one


def test_rows_are_runs_that_differ_in_their_seed_only(folders):
    found = study.read(folders)
    assert len(found.rows) == 4 and sorted(len(row.runs) for row in found.rows) == [2, 2, 3, 3]
    assert set(found.rows[0].settings) == {"tasks", "sparsity.lambda_"}


def test_rows_of_many_options_are_named_by_their_changes(tmp_path):
    made = []
    for seed in range(2):
        made.append(write_run(tmp_path / f"first{seed}", BOTH, 1e-5, seed, iou=0.3 + 0.01 * seed, mae=0.13))
        other = write_run(tmp_path / f"other{seed}", BOTH, 0.0, seed, iou=0.32 + 0.02 * seed, mae=0.12)
        results = json.loads((other / "results.json").read_text())
        results["config"]["optimizer"].update(l2=0.01, weight_decay=0.0, b1=0.8, b2=0.99)
        results["config"]["sparsity"].update(warmup_steps=0, fixed_norm=False)  # which do nothing there
        (other / "results.json").write_text(json.dumps(results))
        made.append(other)
    found = study.read(made)
    head, first, other = [line for line in study_tables.summary(found) if line[0] != "published"]
    assert head[:2] == ("tasks", "changes") and first[1] == "(the first row)"
    assert other[1] == "b1 0.8, b2 0.99, l2 0.01, weight_decay 0, lambda 0"
    head, iou, mae, gain = study_tables.against_first(found)
    assert head[2:4] == ("metric", "row - first")
    assert iou[2:4] == ("segmentation IoU", "+0.0250") and mae[2:4] == ("depth MAE", "-0.0100")
    by_hand = [100 * ((0.02 + 0.01 * seed) / (0.3 + 0.01 * seed) + 0.01 / 0.13) / 2 for seed in range(2)]
    assert gain[2:4] == ("Δm %", f"{np.mean(by_hand):+.2f}") and gain[6:] == ("2", "neither")
    names = ["λ 1e-05", "dense, b1 0.8, b2 0.99, l2 0.01, 1 more"]
    assert study_names.names(found) == names
    pictures = study_plots.draw(found, tmp_path / "plots")
    drawn = ["ablation.png", "pareto.png", "sparsity_over_steps.png", "groups_per_layer.png"]
    assert [path.name for path in pictures.values()] == drawn
    lines = study_plots.pareto(found).axes[0].lines
    hollow = [
        line.get_xydata().tolist() for line in lines if line.get_markerfacecolor() == "white" and len(line.get_xdata())
    ]
    assert hollow == [[[0, pytest.approx(0.33)]]], "the dense row"
    zero, iou, mae = study_plots.ablation(found).axes
    assert [label.get_text() for label in zero.get_yticklabels()] == names
    assert [bar.lines[0].get_xdata()[0] for bar in iou.containers] == pytest.approx([0.305, 0.33])
    sparse = write_run(tmp_path / "sparse", BOTH, 1e-5, 0, iou=0.3, mae=0.13)
    results = json.loads((made[1] / "results.json").read_text())
    results["config"]["sparsity"]["lambda_"] = 1e-5
    (sparse / "results.json").write_text(json.dumps(results | {"seed": 0}))
    dense_first = study.read([made[1], sparse, made[0]])
    assert {cells[1] for cells in study_tables.against_dense(dense_first)[1:]} == {"lambda 1e-05"}
    assert len(study_tables.against_first(dense_first)) == 1 + 3, (
        "the row that is compared with its dense row is left out"
    )
    few = study.read([made[0], write_run(tmp_path / "few", BOTH, 1e-4, 0, iou=0.3, mae=0.1)])
    assert study_tables.summary(few)[0][:2] == ("tasks", "lambda") and len(study_tables.against_first(few)) == 1


def test_mean_and_standard_deviation_by_hand(folders):
    figure = row(study.read(folders), BOTH, 1e-5).figure("segmentation")
    mean = (0.33 + 0.36 + 0.35) / 3
    assert figure.mean == pytest.approx(mean)
    assert figure.std == pytest.approx((((0.33 - mean) ** 2 + (0.36 - mean) ** 2 + (0.35 - mean) ** 2) / 2) ** 0.5)
    assert study_tables.mean_and_std(figure) == "0.3467 ± 0.0153"
    assert study_tables.mean_and_std(study.Figure.of([0.5])) == "0.5000", "one seed has no standard deviation"


def test_gain_over_single_tasks_by_hand(folders):
    """Singles: IoU 0.32, MAE 0.16. The gain of each seed is the mean of both relative gains; lower MAE is better."""
    found = study.read(folders)
    by_seed = [
        100 * ((iou - 0.32) / 0.32 - (mae - 0.16) / 0.16) / 2 for iou, mae in zip(SPARSE_IOU, SPARSE_MAE, strict=True)
    ]
    gain = found.gain(row(found, BOTH, 1e-5))
    assert gain.mean == pytest.approx(np.mean(by_seed)) and gain.std == pytest.approx(np.std(by_seed, ddof=1))
    assert gain.mean > 10
    assert found.gain(row(found, ("depth",), 0.0)) is None, "a single task is its own measure"
    assert study.read(folders[:6]).gain(study.read(folders[:6]).rows[0]) is None, "no single-task runs"


def test_a_gain_over_a_negative_metric_has_the_sign_of_the_improvement(tmp_path):
    tasks = ("segmentation", "normals")
    made = [
        write_run(tmp_path / "dense", tasks, 0.0, 0, iou=0.5, cs=-0.2),
        write_run(tmp_path / "sparse", tasks, 1e-5, 0, iou=0.5, cs=-0.1),
    ]
    found = study.read(made)
    difference = study.compare_gain(row(found, tasks, 1e-5), row(found, tasks, 0.0))
    np.testing.assert_allclose(difference.mean, (0 + 50) / 2)


def test_what_compaction_removes_of_each_part_by_hand(tmp_path):
    made, left = [], {"backbone": (10, 50), "head_depth": (20, 30)}
    for seed, backbone in enumerate((10, 20)):
        folder = write_run(tmp_path / f"sparse{seed}", BOTH, 1e-5, seed, iou=0.5, mae=0.1)
        results = json.loads((folder / "results.json").read_text())
        for size, parts in (
            (
                "trained",
                {"backbone": (40, 200), "head_depth": (20, 60), "head_segmentation": (20, 40), "other": (20, 0)},
            ),
            ("compact", {**left, "backbone": (backbone, 50), "other": (20, 0)}),
        ):
            sums = [sum(part[i] for part in parts.values()) for i in (0, 1)]
            named = {name: {"parameters": one[0], "macs": one[1]} for name, one in parts.items()}
            results["size"][size] = {"parameters": sums[0], "macs": sums[1], "parts": named}
        (folder / "results.json").write_text(json.dumps(results))
        made.append(folder)
    head, line = study_tables.parts(study.read(made))
    assert dict(zip(head, line, strict=True)) | {"tasks": ""} == {
        "tasks": "",
        "backbone % parameters": "62.5 ± 17.7",
        "head_depth % parameters": "0.0 ± 0.0",
        "head_segmentation % parameters": "100.0 ± 0.0",  # all of this head is removed
        "other % parameters": "0.0 ± 0.0",
        "model % parameters": "45.0 ± 7.1",
        "backbone % MACs": "75.0 ± 0.0",
        "head_depth % MACs": "50.0 ± 0.0",
        "head_segmentation % MACs": "100.0 ± 0.0",
        "other % MACs": "",  # it has none
        "model % MACs": "73.3 ± 0.0",
        "seeds": "2",
    }


def test_runs_without_the_sizes_of_parts_have_no_table_of_them(folders):
    assert len(study_tables.parts(study.read(folders))) == 1


def test_sparse_is_paired_with_dense_by_seed(folders):
    found = study.read(folders)
    sparse, dense = row(found, BOTH, 1e-5), row(found, BOTH, 0.0)
    assert found.dense(sparse) is dense and found.dense(dense) is None
    difference = study.compare(sparse, dense, "segmentation")
    exact = stats.ttest_rel(SPARSE_IOU, DENSE_IOU)
    interval = exact.confidence_interval(0.95)
    assert difference.mean == pytest.approx((0.03 + 0.02 + 0.04) / 3)
    assert (difference.low, difference.high) == pytest.approx((interval.low, interval.high))
    assert difference.p == pytest.approx(exact.pvalue) and difference.n == 3
    unpaired = stats.ttest_ind(SPARSE_IOU, DENSE_IOU).pvalue
    assert difference.p < unpaired / 2, "pairing removes the variation between seeds"


def test_gain_over_dense_is_paired_by_seed(folders):
    found = study.read(folders)
    iou = [ours / theirs - 1 for ours, theirs in zip(SPARSE_IOU, DENSE_IOU, strict=True)]
    mae = [1 - ours / theirs for ours, theirs in zip(SPARSE_MAE, DENSE_MAE, strict=True)]
    by_hand = [50 * (a + b) for a, b in zip(iou, mae, strict=True)]
    gain = study.compare_gain(row(found, BOTH, 1e-5), row(found, BOTH, 0.0))
    interval = stats.ttest_1samp(by_hand, 0).confidence_interval(0.95)
    assert (gain.mean, gain.low, gain.high) == pytest.approx((np.mean(by_hand), interval.low, interval.high))


def test_a_sparse_row_has_a_dense_row_whatever_its_penalty_is(folders, tmp_path):
    """Options of sparsity.* have no effect without a penalty; those of the optimizer have one."""
    made = []
    for name, group, settings in (("debias", "sparsity", {"debias_at": 0.85}), ("l2", "optimizer", {"l2": 0.01})):
        made.append(write_run(tmp_path / name, BOTH, 1e-5, 0, iou=0.3, mae=0.1))
        results = json.loads((made[-1] / "results.json").read_text())
        results["config"][group].update(settings)
        (made[-1] / "results.json").write_text(json.dumps(results))
    found = study.read([*folders, *made])
    debias, l2 = found.rows[-2:]
    assert found.dense(debias).is_dense and found.dense(debias).tasks == BOTH and found.gain(debias) is not None
    assert found.dense(l2) is None and found.gain(l2) is None


def test_a_metric_of_zero_leaves_the_gain_open_and_the_report_whole(tmp_path, capsys):
    runs = [
        write_run(tmp_path / f"{lambda_} {seed}", BOTH, lambda_, seed, iou=0.1 * bool(lambda_), mae=0.1 + seed / 100)
        for seed in range(2)
        for lambda_ in (0.0, 1e-5)
    ]
    found = study.read(runs)
    assert np.isnan(study.compare_gain(row(found, BOTH, 1e-5), row(found, BOTH, 0.0)).mean)
    page.write(runs, tmp_path / "out")
    assert re.search(r"\| Δm % +\| \+nan +\| +\|", capsys.readouterr().out), "no difference and no interval"


def test_only_common_seeds_are_paired(folders):
    fewer = study.read([folder for folder in folders if folder.name not in ("dense1", "dense2")])
    difference = study.compare(row(fewer, BOTH, 1e-5), row(fewer, BOTH, 0.0), "depth")
    assert difference.n == 1 and difference.mean == pytest.approx(0.130 - 0.140) and np.isnan(difference.p)


def test_the_table_has_the_papers_form_and_figures(folders):
    rows = study_tables.summary(study.read(folders))
    assert rows[0] == ("tasks", "lambda", "segmentation IoU ↑", "depth MAE ↓", "% groups zero", "% parameters",
                       "compact M parameters", "compact M MACs", "Δm %", "seeds")  # fmt: skip
    ours, theirs = rows[1:3]
    assert ours[:4] == ("segmentation + depth", "1e-05", "0.3467 ± 0.0153", "0.1310 ± 0.0036")
    assert ours[4:8] == ("66.00 ± 0.00", "76.00 ± 0.00", "2.00 ± 1.00", "30.0 ± 10.0")
    assert theirs == ("published", "", "0.3345 ± 0.0073", "0.1389 ± 0.0027", "66.06", "73.58", "", "", "", "5")
    better = {cells[2]: cells[-1] for cells in study_tables.against_dense(study.read(folders))[1:]}
    assert better == {"segmentation IoU": "sparse", "depth MAE": "neither", "Δm %": "neither"}, "p .04, .10, .06"


def test_lower_error_is_better_and_one_seed_is_not_enough(folders, tmp_path):
    more = [
        write_run(tmp_path / f"more{seed}", BOTH, 1e-6, seed, iou=DENSE_IOU[seed], mae=DENSE_MAE[seed] - less)
        for seed, less in enumerate((0.040, 0.036, 0.038))
    ]
    rows = study_tables.against_dense(study.read([*folders, *more]))
    assert {cells[2]: cells[-1] for cells in rows if cells[1] == "1e-06"} == {
        "segmentation IoU": "",
        "depth MAE": "sparse",
        "Δm %": "sparse",
    }
    rows = study_tables.against_dense(study.read([*folders, more[0]]))
    assert {cells[-1] for cells in rows if cells[1] == "1e-06"} == {""}


def test_formats_hold_the_same_cells(folders):
    rows = study_tables.summary(study.read(folders))
    assert [tuple(line) for line in csv.reader(io.StringIO(study_tables.to_csv(rows)))] == rows
    latex = study_tables.to_latex(rows)
    assert r"segmentation + depth & 1e-05 & 0.3467 $\pm$ 0.0153 & 0.1310 $\pm$ 0.0036 & 66.00" in latex
    assert r"\% groups zero" in latex and r"$\Delta_m$" in latex


def svg_free(text):
    """Return a page without its plots, whose clip paths are url(#...) of the page itself."""
    return re.sub("<svg.*?</svg>", "", text, flags=re.DOTALL)


def test_the_page_holds_everything_and_is_readable_offline(folders, tmp_path, capsys):
    text = page.write(folders, tmp_path / "report").read_text()
    assert "0.3467 ± 0.0153" in text and "0.3345 ± 0.0073" in text
    assert "http" not in text and "src=" not in text and "@import" not in text and "url(" not in svg_free(text)
    assert "10 runs" in text and "0.3467 ± 0.0153" in capsys.readouterr().out
    titles = ["Gain over dense", "Gain against cost", "Metrics against sparsity", "Metrics against lambda"]
    titles += ["Zero groups against lambda", "Sparsity over the run", "Groups left by layer"]
    assert re.findall("<h3>(.*?)</h3>", text) == titles
    assert text.index("<svg") < text.index("<table"), "plots come first"
    tables = {f"{name}.{kind}" for name in ("summary", "against_dense") for kind in ("md", "csv", "tex")}
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"index.html", "plots"} | tables


def test_latency_against_sparsity_is_that_of_the_timed_runs(folders):
    assert study_plots.latency(study.read(folders)) is None, "none was timed"
    assert len(study_tables.speed(study.read(folders))) == 1
    timed = {"sparse0": (0.66, 2.0, 3.0), "sparse1": (0.5, 3.0, 2.0)}
    for folder in folders:
        if folder.name in timed:
            zero, milliseconds, speedup = timed[folder.name]
            other = {"parameters": 1, "p90_ms": 30.0, "images_per_second": 1.0, "gmacs_per_second": 1.0}
            other |= {"memory_mib": 1.0, "batch": 4}
            rows = [
                {"part": part, "model": model, "median_ms": time, "speedup": ratio, "macs": int(8 // ratio), **other}
                for part in ("backbone", "model")
                for model, time, ratio in (
                    ("dense", 24.0, 1.0),
                    ("sparse", 25.0, 0.9),
                    ("compact", milliseconds, speedup),
                )
            ]
            found = {"group_sparsity": zero, "rows": rows, "size": [64, 96], "device": "cpu"}
            (folder / "benchmark.json").write_text(json.dumps(found))
    left, right = study_plots.latency(study.read(folders)).axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in left.lines}
    assert lines == {"compact, batch 4": [[50, 0.75], [66, 0.5]], "dense, batch 4": [[50, 6.0], [66, 6.0]]}
    assert right.lines[0].get_xydata().tolist() == [[50, 2.0], [66, 3.0]]
    assert study_tables.speed(study.read(folders))[1:] == [
        ("segmentation + depth", "1e-05", "4", "3.00 ± 1.41", "2.50 ± 0.71", "2.50 ± 0.71", "2")
    ], "8 MACs, and 2 and 4 of the compact ones"


def test_an_option_that_a_run_lacks_has_no_effect_in_it(folders):
    """Runs made before heads could be attached, and before results had sizes."""
    for folder in folders[::2]:
        results = json.loads((folder / "results.json").read_text())
        del results["config"]["model"]["attach"], results["config"]["lomt"], results["size"]
        del results["config"]["train"]["bn_frames"]
        (folder / "results.json").write_text(json.dumps(results))
    found = study.read(folders)
    assert len(found.rows) == 4 and set(found.rows[0].settings) == {"tasks", "sparsity.lambda_"}
    assert study_tables.summary(found)[1][6] == "", "no size if a run has none"
    config = nyu.get_config()
    config.tasks, config.sparsity.lambda_ = BOTH, 1e-5
    stored = json.loads((folders[0] / "config.json").read_text())
    del stored["model"]["attach"], stored["lomt"], stored["train"]["bn_frames"]
    (folders[0] / "config.json").write_text(json.dumps(stored))
    folder_lib.check_settings(folders[0], config)
    config.model.attach = ("layer4_0", "layer4_0")
    config.train.bn_frames = 8
    with raises("RUN_DIFFERS", naming="train.bn_frames=None there, 8 now"):
        folder_lib.check_settings(folders[0], config)
    config.train.bn_frames = 0
    with raises("RUN_DIFFERS", naming="model.attach=None there, ['layer4_0', 'layer4_0'] now"):
        folder_lib.check_settings(folders[0], config)


def attached(folder, seed, **values):
    """Write a run with attachment points."""
    write_run(folder, BOTH, 1e-5, seed, **values)
    results = json.loads((folder / "results.json").read_text())
    results["config"]["model"]["attach"] = ["layer4_0", "layer3_3/conv1"]
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def test_lomt_against_plain_with_its_own_gain(folders, tmp_path):
    more = [attached(tmp_path / f"lomt{seed}", seed, iou=SPARSE_IOU[seed] + 0.02 + 0.001 * seed, mae=0.13, group=0.5)
            for seed in range(3)]  # fmt: skip
    found = study.read([*folders, *more])
    (lomt,) = [row for row in found.rows if row.attach]
    plain = found.plain(lomt)
    assert (plain.attach, plain.tasks, plain.config["sparsity"]["lambda_"]) == ([], BOTH, 1e-5)
    rows = study_tables.against_plain(found)
    assert rows[1][:4] == ("segmentation + depth", "layer4_0 + layer3_3/conv1", "1e-05", "segmentation IoU")
    assert rows[1][4] == "+0.0210" and rows[1][-1] == "LOMT"
    by_hand = np.mean([100 * np.mean([(iou - 0.32) / 0.32, (0.16 - 0.13) / 0.16])
                       for iou in (0.35, 0.381, 0.372)])  # fmt: skip
    assert found.gain(lomt).mean == pytest.approx(by_hand), "against the single tasks at the backbone's end"
    assert [cells[3] for cells in rows[1:]] == ["segmentation IoU", "depth MAE", "Δm %"]
    assert len(study_tables.against_plain(study.read(folders))) == 1, "none: the head alone"


def test_plots_of_l1_show_zero_weights(tmp_path):
    """Plots show the zero weights of runs with l1, and the zero groups of others."""
    folder = write_run(tmp_path / "l1", ("depth",), 1e-5, 0, mae=0.1, group=0.0)
    results = json.loads((folder / "results.json").read_text())
    results["sparsity"]["weight"] = 0.7
    results["config"]["sparsity"]["penalty"] = "l1"
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "metrics.jsonl").write_text('{"step": 4, "split": "validation", "sparsity/weight": 0.6}\n')
    found = study.read([folder])
    (axis,) = study_plots.sparsity_over_steps(found).axes
    assert axis.get_ylabel() == "% weights zero" and axis.lines[0].get_xydata().tolist() == [[4, 60]]
    (axis,) = study_plots.pareto(found).axes
    assert axis.get_xlabel() == "% weights zero" and axis.lines[0].get_xydata().tolist() == [[70, 0.1]]
    group = write_run(tmp_path / "group", ("depth",), 1e-5, 0, mae=0.1, group=0.5)
    assert study_plots.pareto(study.read([folder, group])).axes[0].get_xlabel() == "% zero (groups; under l1 weights)"
    (group / "metrics.jsonl").unlink()
    assert len(study_plots.sparsity_over_steps(study.read([folder, group])).axes[0].lines) == 1, (
        "an imported run has none"
    )


# The figures of the paper's Tables 1, 2 and 3 as its text has them, row by row: mean and standard deviation of each
# task of the row, then the % of zero groups and of parameters in them. Copied from the paper, not from
# report/published.py.
PAPER_1 = """
0.3140 0.0350  0  0
0.3203 0.0096  0  0
0.3338 0.0068  35.77  43.05
0.1645 0.0016  0  0
0.1572 0.0017  21.95  31.11
0.1625 0.0015  89.90  93.57
0.7077 0.0047  0  0
0.7903 0.0041  17.87  20.42
0.7699 0.0058  55.62  64.39
0.2233 0.0094  0.1656 0.0030  0  0
0.3308 0.0049  0.1379 0.0034  0  0
0.3345 0.0073  0.1389 0.0027  66.06  73.58
0.2276 0.0064  0.7072 0.0087  0  0
0.3353 0.0082  0.7797 0.0128  13.51  15.34
0.3480 0.0180  0.7833 0.0058  64.05  72.97
0.6905 0.0037  0.1719 0.0038  0  0
0.7609 0.0279  0.1299 0.0030  60.62  69.83
0.7967 0.0042  0.1332 0.0015  88.62  93.38
0.2171 0.0128  0.6948 0.0080  0.1657 0.0034  0  0
0.3418 0.0062  0.7814 0.0108  0.1301 0.0064  21.80  23.85
0.3394 0.0107  0.7857 0.0076  0.1336 0.0029  69.72  76.72
"""
PAPER_2 = """
0.8885 0.0048  0  0
0.9084 0.0033  58.1  71.94
0.6296 0.0019  0  0
0.6284 0.0029  87.32  92.31
0.5204 0.0026  0  0
0.5238 0.0004  100  100
0.8363 0.0028  0.9103 0.0217  0  0
0.9136 0.0024  0.9726 0.0035  67.66  77.77
0.6284 0.0108  0.5242 0.0006  0  0
0.7275 0.0016  0.5308 0.0103  63.18  78.1
0.8123 0.0024  0.8641 0.0269  0.5238 0.0012  0  0
0.9040 0.0035  0.8514 0.1578  0.5241 0.0760  77.1  83.41
"""
PAPER_3 = """
0.2962 0.0050  0.7421 0.0048  0.59  74.31
0.7285 0.0096  0.1545 0.0011  5.46  77.78
0.2900 0.0258  0.7389 0.0187  0.1520 0.0052  1.68  69.92
"""


def paper_rows():
    """Return (key in published.TABLES, the numbers) of each row of the three tables."""
    celeb = [("segmentation",), ("attribute:Male",), ("attribute:Smiling",)]
    celeb += [celeb[0] + celeb[1], celeb[1] + celeb[2], celeb[0] + celeb[1] + celeb[2]]
    settings = [("nyud_mt", tasks, "group_lasso", lambda_) for tasks in sweeps.TABLE1 for lambda_ in (0.0, 1e-6, 1e-5)]
    settings += [("celebamask_hq", tasks, "group_lasso", lambda_) for tasks in celeb for lambda_ in (0.0, 1e-5)]
    pairs = (("segmentation", "normals"), ("normals", "depth"), ("segmentation", "normals", "depth"))
    settings += [("nyud_mt", tasks, "l1", 1e-5) for tasks in pairs]
    lines = [line for table in (PAPER_1, PAPER_2, PAPER_3) for line in table.strip().splitlines()]
    return list(zip(settings, [[float(number) for number in line.split()] for line in lines], strict=True))


def test_every_published_figure_is_the_papers():
    rows = paper_rows()
    assert len(rows) == len(published.TABLES) == 21 + 12 + 3
    for (name, tasks, penalty, lambda_), (*figures, group, parameter) in rows:
        found = published.TABLES[name, frozenset(tasks), penalty, lambda_]
        assert [number for task in tasks for number in found.tasks[task]] == figures, (tasks, lambda_)
        assert found.tasks.keys() == set(tasks)
        assert (found.group, found.parameter) == pytest.approx((group / 100, parameter / 100)), (tasks, lambda_)


def test_published_figures_are_for_runs_with_the_papers_options():
    """On the real data, of its size and backbone, at a fixed lambda."""
    config = json.loads(nyu.get_config().to_json())
    found = published.lookup(config)
    assert found.tasks == {"segmentation": (0.3394, 0.0107), "normals": (0.7857, 0.0076), "depth": (0.1336, 0.0029)}
    assert (found.group, found.parameter) == pytest.approx((0.6972, 0.7672))
    changes = (
        ("sparsity", {"target": 0.7}),
        ("sparsity", {"prune": "runs/demo"}),
        ("data", {"size": [96, 128]}),
        ("data", {"embedded": config["data"]["embedded"] | {"frames": 480}}),
        ("model", {"depth": 18}),
        ("model", {"attach": ["layer3_3/conv1"] * 3}),
    )
    for part, change in changes:
        assert published.lookup(config | {part: config[part] | change}) is None
    smile = published.TABLES["celebamask_hq", frozenset(["attribute:Smiling"]), "group_lasso", 1e-5]
    assert smile.tasks == {"attribute:Smiling": (0.5238, 0.0004)} and smile.group == 1.0


def test_bad_folders_are_named(folders, tmp_path):
    (tmp_path / "empty").mkdir()
    with raises("FOLDER_NOT_A_RUN", naming=str(tmp_path / "empty")):
        study.read([*folders, tmp_path / "empty"])
    (tmp_path / "empty" / "config.json").write_text("{}")
    with raises("RUN_NOT_FINISHED", naming=str(tmp_path / "empty")):
        study.read([*folders, tmp_path / "empty"])
    twice = write_run(tmp_path / "again", BOTH, 1e-5, 0, iou=0.3, mae=0.1)
    with raises("STUDY_RUN_TWICE", naming=f"{twice} and {tmp_path / 'sparse0'}"):
        study.read([*folders, twice])
    with raises("STUDY_SEVERAL_DATA_SETS", naming="celebamask_hq, nyud_mt"):
        study.read([*folders, write_run(tmp_path / "faces", BOTH, 0.0, 0, iou=0.3, mae=0.1, name="celebamask_hq")])
    (folders[0] / "results.json").write_text('{"test":')
    with raises("FILE_DAMAGED", naming=str(folders[0] / "results.json")):
        study.read(folders)


def test_a_sweep_leaves_out_what_has_not_finished(folders, tmp_path):
    names = [*(folder.name for folder in folders), "sparse9"]
    (tmp_path / "sweep.json").write_text(json.dumps({"trials": {name: {} for name in names}}))
    found = study.read([tmp_path])
    assert found.unfinished == ("sparse9",) and len(found.rows) == 4
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "sweep.json").write_text(json.dumps({"trials": {"a": {}, "b": {}}}))
    with raises("RUN_NOT_FINISHED", naming="none of the 2 runs"):
        study.read([tmp_path / "none"])


def test_predictions_are_shown_side_by_side_without_images_and_labels(folders):
    assert study_plots.predictions(study.read(folders)) is None, "no run kept any"
    rng = np.random.default_rng(0)
    kept = {}
    for name, frames in (("sparse0", ["a", "b", "c"]), ("dense0", ["c", "b"]), ("depth0", ["b", "c"])):
        samples = {"name": np.array(frames), "image": rng.integers(0, 255, (len(frames), 6, 8, 3), dtype=np.uint8)}
        for task in ("depth",) if name == "depth0" else BOTH:
            shape = (len(frames), 6, 8)
            labels = rng.integers(1, 9, shape) if task == "segmentation" else rng.uniform(0.1, 1, shape)
            samples |= {f"label/{task}": labels, f"prediction/{task}": np.roll(labels, 1, 0)}
        kept[name] = samples
        (folder,) = [folder for folder in folders if folder.name == name]
        np.savez(folder / "samples.npz", **samples)
    axes = np.reshape(study_plots.predictions(study.read(folders)).axes, (3, 4))
    assert [axis.get_title() for axis in axes[0]] == [
        f"{task}, image {frame}" for task in BOTH for frame in ("b", "c")
    ], "frames that all rows have"
    assert [axis.get_ylabel().replace("\n", " ") for axis in axes[:, 0]] == [
        "λ 1e-05",
        "dense",
        "depth alone, dense",
    ]
    of = {"a": 0, "b": 1, "c": 2}
    shown = axes[0, 1].images[0].get_array()
    np.testing.assert_array_equal(shown, plots.class_colors()[kept["sparse0"]["prediction/segmentation"][of["c"]]])
    assert [len(axis.images) for axis in axes[2]] == [0, 0, 1, 1], "a single task's row has no other predictions"


def test_weightings_are_ranked_at_each_sparsity(tmp_path):
    """Gains over single tasks (IoU 0.4, MAE 0.2) by hand: their order is the same but for the last two."""
    made = [
        write_run(tmp_path / "seg", ("segmentation",), 0.0, 0, iou=0.4, weighting="equal"),
        write_run(tmp_path / "depth", ("depth",), 0.0, 0, mae=0.2, weighting="equal"),
    ]
    for name, ious in {"equal": (0.40, 0.44), "gls": (0.44, 0.36), "nash": (0.42, 0.40)}.items():
        for iou, lambda_ in zip(ious, (0.0, 1e-5), strict=True):
            made.append(write_run(tmp_path / f"{name}{lambda_}", BOTH, lambda_, 0, iou=iou, mae=0.2, weighting=name))
    found = study.read(made)
    assert study_tables.weightings(found) == [
        ("weighting", "Δm %, dense", "rank", "Δm %, lambda 1e-05", "rank"),
        ("gls", "5.00", "1", "-5.00", "3"),
        ("nash", "2.50", "2", "0.00", "2"),
        ("equal", "0.00", "3", "5.00", "1"),
        ("rank correlation", "1.00", "", "-1.00", ""),
    ]
    figure = study_plots.weightings(found)
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["equal", "nash", "gls"]
    few = study.read([folder for folder in made if "nash" not in folder.name])
    assert study_plots.weightings(few) is None and len(study_tables.weightings(few)) == 1


def test_options_without_effect_do_not_distinguish_dense_runs(folders):
    """Other options of `sparsity`, in the check of the folder and in the changes of a row."""
    config = nyu.get_config()
    config.tasks = BOTH
    for lambda_, folder in ((1e-5, folders[0]), (0.0, folders[1])):
        config.sparsity.update(lambda_=lambda_, start_step=30)
        if lambda_:
            with raises("RUN_DIFFERS", naming="sparsity.start_step=0 there, 30 now"):
                folder_lib.check_settings(folder, config)
        else:
            folder_lib.check_settings(folder, config)
    config.sparsity.target = 0.5
    with raises("RUN_DIFFERS", naming="sparsity.start_step=0 there, 30 now; sparsity.target=0.0 there, 0.5 now"):
        folder_lib.check_settings(folders[1], config)
    for folder in (folders[2], *folders[7::2]):  # a sparse seed, and depth alone
        results = json.loads((folder / "results.json").read_text())
        results["config"]["sparsity"] |= {"start_step": 30, "penalty": "group_mcp"}
        (folder / "results.json").write_text(json.dumps(results))
    found = study.read([folders[1], folders[2], *folders])
    changes = [row.changes for row in found.rows]
    assert len(changes) == 5 and changes[:2] == [{}, {"sparsity.lambda_": 1e-5}] and {"tasks": ["depth"]} in changes
    other = {"sparsity.lambda_": 1e-5, "sparsity.start_step": 0, "sparsity.penalty": "group_lasso"}
    assert other in changes
    assert [study_names.setting(row, "sparsity.start_step") for row in found.rows] == ["", "30", "0", "", ""]


def points(axis):
    """Return label -> points of each line with error bars in an axis."""
    return {bars.get_label(): bars.lines[0].get_xydata().tolist() for bars in axis.containers}


def test_gain_against_cost_by_hand(folders, tmp_path):
    """A third row is worse and as expensive as the sparse one: no line of the front leads to it."""
    worse = [write_run(tmp_path / f"worse{seed}", BOTH, 1e-4, seed, iou=0.2, mae=0.16) for seed in range(3)]
    for folder in folders[1:6:2]:  # the dense row
        results = json.loads((folder / "results.json").read_text())
        results["size"]["compact"]["macs"] = 9 * 10**7
        (folder / "results.json").write_text(json.dumps(results))
    found = study.read([*folders, *worse])
    (axis,) = study_plots.tradeoff(found).axes
    sparse, dense, third = (found.gain(row(found, BOTH, lambda_)).mean for lambda_ in (1e-5, 0.0, 1e-4))
    assert points(axis) == {
        "λ 1e-05": [[30, pytest.approx(sparse)]],
        "dense": [[90, pytest.approx(dense)]],
        "λ 0.0001": [[30, pytest.approx(third)]],
    }
    (front,) = [line for line in axis.lines if line.get_label() == "Pareto front"]
    assert sparse > dense > third and front.get_xydata().tolist() == [[30, pytest.approx(sparse)]]
    assert [text.get_text() for text in axis.texts] == ["λ 1e-05"]
    (axis,) = study_plots.tradeoff(study.read([*folders[:6], *worse])).axes
    assert points(axis)["dense"] == [[90, 0]] and "the dense row" in axis.get_ylabel(), "without single-task runs"
    assert study_plots.tradeoff(study.read(folders[:6:2])) is None, "one row"


def test_a_long_legend_leaves_room_for_the_plot(tmp_path):
    """A grid over several options: one line of the legend for each row of the study."""
    runs = []
    for i in range(30):
        runs.append(write_run(tmp_path / str(i), ("depth",), 1e-5, 0, group=0.5, mae=0.1))
        values = files.read_json(runs[-1] / "results.json")
        values["config"]["optimizer"] |= {"learning_rate": 1e-4 * (1 + i), "b1": 0.9 - 0.01 * (i % 7)}
        values["config"]["train"]["batch_size"] = 8 + i % 5
        files.write_json(runs[-1] / "results.json", values)
    figure = study_plots.sparsity_over_steps(study.read(runs))
    plots.save(figure, tmp_path / "plot.png")
    assert figure.axes[0].get_position().height * figure.get_figheight() > 2.5, "inches"


def test_gain_over_dense_is_drawn_with_its_interval(folders):
    found = study.read(folders)
    gain = study.compare_gain(row(found, BOTH, 1e-5), row(found, BOTH, 0.0))
    (axis,) = study_plots.gains(found).axes
    (bars,) = axis.containers
    _, _, (interval,) = bars.lines
    np.testing.assert_allclose(interval.get_segments()[0][:, 0], [gain.low, gain.high])
    assert bars.lines[0].get_xydata().tolist() == [[pytest.approx(gain.mean), 0]]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["λ 1e-05"]
    assert study_plots.gains(study.read([folders[0], *folders[1:6:2]])) is None, "one seed has no interval"


def test_milliseconds_are_those_of_the_whole_compact_model(folders):
    other = {"parameters": 1, "p90_ms": 9.0, "images_per_second": 1.0, "gmacs_per_second": 1.0, "memory_mib": 1.0}
    rows = [
        {"part": part, "model": model, "batch": batch, "median_ms": time, "speedup": 2.0, "macs": 8, **other}
        for part, model, batch, time in (
            ("backbone", "compact", 2, 1.0),
            ("model", "dense", 2, 8.0),
            ("model", "compact", 2, 6.0),
            ("model", "compact", 8, 9.0),
        )
    ]
    for folder in folders[:2]:
        (folder / "benchmark.json").write_text(json.dumps({"group_sparsity": 0.5, "rows": rows, "device": "cpu"}))
    _, axis = study_plots.tradeoff(study.read(folders)).axes
    assert [x for found in points(axis).values() for x, _ in found] == [3.0, 3.0], "per image of a batch of two"


def test_few_values_far_from_the_others_are_written_above(tmp_path):
    made = [
        write_run(tmp_path / "seg", ("segmentation",), 0.0, 0, iou=0.4, weighting="equal"),
        write_run(tmp_path / "depth", ("depth",), 0.0, 0, mae=0.2, weighting="equal"),
    ]
    names = [f"w{i:02}" for i in range(12)]
    for i, name in enumerate(names):
        iou = 0.04 if i == 11 else 0.4 + 0.004 * i
        made.append(write_run(tmp_path / name, BOTH, 0.0, 0, iou=iou, mae=0.2, weighting=name))
    (axis,) = study_plots.weightings(study.read(made)).axes
    assert axis.get_title(loc="left") == "beyond the axis: w11, dense: -45"
    low, high = axis.get_xlim()
    assert -5 < low < 0 and 5 < high < 10, "the others are from 0 to 5 %"
    (axis,) = study_plots.weightings(study.read(made[:-1])).axes
    assert axis.get_title(loc="left") == ""
