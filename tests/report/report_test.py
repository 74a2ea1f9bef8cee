import dataclasses
import json

import numpy as np

from mtl_sparse.report import plots, records, tables
from mtl_sparse.report.schema import CompactLayer, CoupledSparsity, ModelSize, Results, Size, Timing, TimingRow
from mtl_sparse.runtime import files
from mtl_sparse.runtime.labels import VOID
from tests.conftest import raises

RESULTS = {
    "test": {"depth/loss": 0.1, "depth/mae_normalized": 0.0625},
    "constant": {"depth/mae_normalized": 0.2},
    "headlines": {"depth": {"metric": "depth/mae_normalized", "higher_is_better": False}},
    "sparsity": {
        "group": 0.5,
        "parameter": 0.75,
        "lambda": 1.5e-4,
        "target": 0.0,
        "penalty": "group_lasso",
        "weight": 0.8,
        "dead_layers": ["backbone/stem_conv1/kernel"],
        "dead_blocks": [],
        "layers": [
            {"path": "backbone/layer1_0/conv2/kernel", "groups": 4, "zero_groups": 1, "group_size": 9},
            {"path": "backbone/stem_conv1/kernel", "groups": 3, "zero_groups": 3, "group_size": 9},
            {"path": "backbone/layer1_10/conv1/kernel", "groups": 2, "zero_groups": 0, "group_size": 9},
            {"path": "backbone/layer1_0/conv1/kernel", "groups": 5, "zero_groups": 2, "group_size": 9},
        ],
    },
    "step": 7,
    "seed": 0,
    "frames": {"train": 4, "validation": 2, "test": 3},
    "config": {},
    "versions": {"jax": "0.10.0"},
    "device": "1 x cpu",
}


def results(**sparsity):
    """Return the results above with other values in their sparsity."""
    found = Results.from_json(RESULTS)
    return dataclasses.replace(found, sparsity=dataclasses.replace(found.sparsity, **sparsity))


def test_run_table_has_each_metric_beside_the_constant_baseline():
    table = tables.run_table(results())
    row = next(line for line in table.splitlines() if "mae_normalized" in line)
    assert [cell.strip() for cell in row.strip("|").split("|")] == ["depth", "**mae_normalized**", "0.0625", "0.2000"]
    assert "loss" not in table
    assert table.endswith(
        "50.0 % of groups zero, 75.0 % of the penalized weights in them, lambda 0.00015; 4 conv layers, dead layers: "
        "stem_conv1; best validation at step 7"
    )


def test_the_target_stands_beside_the_sparsity():
    asked = results(target=0.52, dead_blocks=("backbone/layer1_0",)).sparsity
    sentence = tables.sparsity_sentences(asked)
    assert "50.0 % of groups zero (target 52.0 %), 75.0 %" in sentence
    assert sentence.endswith("dead blocks: layer1_0")
    of_weights = tables.sparsity_sentences(dataclasses.replace(asked, penalty="l1"))
    assert of_weights.startswith("80.0 % of weights zero (target 52.0 %); 50.0 % of groups zero, 75.0 %")


def test_groups_per_layer_are_drawn_in_network_order():
    axis = plots.groups_per_layer(results()).axes[0]
    names = [label.get_text() for label in axis.get_xticklabels()]
    assert names == ["stem_conv1", "layer1_0/conv1", "layer1_0/conv2", "layer1_10/conv1"]
    heights = [bar.get_height() for bar in axis.patches]
    assert heights == [3, 5, 4, 2, 0, 3, 3, 2], "all groups, then those left"


COUPLED = (CoupledSparsity("backbone/layer1_0/conv1", 6, 2), CoupledSparsity("backbone/stem_conv2", 3, 1))


def test_coupled_groups_are_drawn_by_the_first_layer_that_reads_them():
    found = results(coupled=COUPLED)
    axis = plots.groups_per_layer(found).axes[0]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["stem_conv2", "layer1_0/conv1"]
    assert [bar.get_height() for bar in axis.patches] == [3, 6, 2, 4]
    assert "4 conv layers, 2 sets of coupled groups" in tables.sparsity_sentences(found.sparsity)


def test_a_target_of_macs_is_compared_with_what_compaction_left():
    size = Size(ModelSize(100, 1000), ModelSize(30, 260))
    found = dataclasses.replace(results(), size=size, config={"sparsity": {"target_macs": 0.25, "target_params": 0.0}})
    assert "; 26.0 % of the MACs left after compaction (target 25.0 %); best" in tables.run_table(found)
    steps = np.array([1, 2, 3])
    series = {name: (steps, np.array([0.0, 0.2, 0.5])) for name in ("sparsity/group", "sparsity/parameter")}
    series["sparsity/macs_left"] = steps, np.array([1.0, 0.6, 0.26])
    metrics = {"validation": series, "train": {"lambda": (steps, np.array([1e-5, 1e-4, 1e-4]))}}
    above = plots.sparsity_over_steps(metrics, found).axes[0]
    lines = {line.get_label(): np.asarray(line.get_ydata()) for line in above.lines}
    np.testing.assert_allclose(lines["MACs removed"], [0, 40, 74])
    np.testing.assert_allclose(lines["target for MACs removed"], 75)


def test_sparsity_is_drawn_with_its_target_and_lambda():
    steps = np.array([1.0, 2.0])
    metrics = {
        "train": {"lambda": (steps, np.array([0.0, 1e-4]))},
        "validation": {name: (steps, np.array([0.0, 0.5])) for name in ("sparsity/group", "sparsity/parameter")},
    }
    above, below = plots.sparsity_over_steps(metrics, results(target=0.52)).axes
    lines = {line.get_label(): line.get_ydata() for line in above.lines}
    np.testing.assert_allclose(lines["groups"], [0, 50])
    np.testing.assert_allclose(lines["target for groups"], [52, 52])
    assert below.get_yscale() == "log"
    np.testing.assert_allclose(below.lines[0].get_ydata(), [0, 1e-4])


def test_metrics_are_read_by_split(tmp_path):
    rows = [
        {"step": 1, "split": "train", "loss": 3.0},
        {"step": 2, "split": "train", "loss": 2.0},
        {"step": 2, "split": "validation", "loss": 9.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    series = records.read_metrics(tmp_path)
    np.testing.assert_array_equal(series["train"]["loss"], [[1, 2], [3, 2]])
    np.testing.assert_array_equal(series["validation"]["loss"], [[2], [9]])


def test_samples_round_trip_and_are_drawn(tmp_path):
    label = np.array([[[0, 1], [VOID, 2]]], np.int32)
    records.write_samples(
        tmp_path,
        images=np.zeros((1, 2, 2, 3), np.uint8),
        names=["0001"],
        labels={"segmentation": label, "depth": np.ones((1, 2, 2), np.float32)},
        predictions={
            "segmentation": np.eye(3)[[[[0, 1], [1, 2]]]],
            "depth": np.full((1, 2, 2, 1), 0.5, np.float32),
        },
        classes=("wall", "floor"),
    )
    samples = records.read_samples(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["samples.npz"], "no part of it is left"
    np.testing.assert_array_equal(samples["prediction/segmentation"], [[[0, 1], [1, 2]]])
    assert samples["image"].dtype == np.uint8
    figure = plots.sample_grid(samples)
    shown = [axis.images[0].get_array() for axis in figure.axes]
    assert len(shown) == 5
    vectors = plots.pictures(np.zeros((2, 2, 3)) + [0, 0, 1.0], np.zeros((2, 2, 3)))
    np.testing.assert_allclose(vectors[0][0, 0], [0.5, 0.5, 1.0])
    colors = plots.class_colors()
    np.testing.assert_allclose(shown[1][0, 1], colors[1])
    np.testing.assert_allclose(shown[1][1, 0], 0, err_msg="void is black")
    np.testing.assert_allclose(shown[2][1, 0], colors[1])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["wall", "floor", "class 2"]


def test_a_truncated_file_of_samples_is_named(tmp_path):
    records.write_samples(tmp_path, images=np.zeros((1, 2, 2, 3), np.uint8), names=["0001"], labels={}, predictions={})
    whole = (tmp_path / "samples.npz").read_bytes()
    (tmp_path / "samples.npz").write_bytes(whole[: len(whole) // 2])
    with raises("FILE_DAMAGED", naming=str(tmp_path / "samples.npz")):
        records.read_samples(tmp_path)


def test_attributes_are_written_beside_their_image(tmp_path):
    """Green where the prediction at the threshold is right, red where it is wrong, black without a label."""
    records.write_samples(
        tmp_path,
        images=np.zeros((2, 8, 8, 3), np.uint8),
        names=["17", "65"],
        labels={
            "segmentation": np.zeros((2, 8, 8), np.int32),
            "attribute:Smiling": np.array([1, 0], np.uint8),
            "attribute:Wearing_Hat": np.array([0, VOID], np.uint8),
        },
        predictions={
            "segmentation": np.zeros((2, 8, 8, 3)),
            "attribute:Smiling": np.array([0.62, 0.8]),
            "attribute:Wearing_Hat": np.array([0.55, 0.1]),
        },
        threshold=0.6,
    )
    figure = plots.sample_grid(records.read_samples(tmp_path))
    assert len(figure.axes) == 2 * (1 + 2 + 1)
    texts = [[(text.get_text(), text.get_color()) for text in axis.texts] for axis in figure.axes[3::4]]
    green, red = "#2e7d32", "#b03a2e"
    assert texts == [
        [("Smiling: 62 %", green), ("Wearing Hat: 55 %", green)],
        [("Smiling: 80 %", red), ("Wearing Hat: 10 %", "black")],
    ]
    assert figure.axes[3].get_title() == "attributes (red: wrong)"


def test_the_sample_grid_has_room_for_all_forty_attributes(tmp_path):
    names = [f"attribute:Of_This_Name_{i}" for i in range(40)]
    records.write_samples(
        tmp_path,
        images=np.zeros((2, 64, 64, 3), np.float32),
        names=["17", "65"],
        labels={name: np.array([1, 0], np.uint8) for name in names} | {"age": np.array([20.0, 30.0])},
        predictions={name: np.array([0.62, 0.8]) for name in names} | {"age": np.array([21.0, 31.0])},
    )
    figure = plots.sample_grid(records.read_samples(tmp_path))
    figure.draw_without_rendering()
    image, texts = figure.axes[0].get_window_extent(), figure.axes[1]
    assert len(texts.texts) == 40 and image.width > 100
    boxes = [text.get_window_extent() for text in texts.texts]
    overlaps = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
    assert not overlaps
    assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 + 1 for box in boxes)
    assert min(box.y0 for box in boxes) > image.y0 - 2, "no text overlaps the next row"


def test_class_colors_can_be_told_apart():
    colors = plots.class_colors()[:40]
    distance = np.linalg.norm(colors[:, None] - colors[None], axis=-1) + np.eye(40)
    assert distance.min() > 0.05


def test_a_folder_without_a_run_is_named(tmp_path):
    with raises("FILE_MISSING", naming=str(tmp_path / "results.json")):
        plots.draw(tmp_path)
    (tmp_path / "results.json").write_text('{"test": ')
    with raises("FILE_DAMAGED", naming=str(tmp_path / "results.json")):
        plots.draw(tmp_path)
    with raises("FILE_DAMAGED", naming=str(tmp_path / "results.json")):
        files.read_json(tmp_path / "results.json")


LAYER = {"groups": 1, "zero": 0, "groups_after": 1, "zero_after": 0, "why": ""}
LAYERS = [
    CompactLayer(
        "backbone/conv1", parameters=3 * 10**6, parameters_after=10**6, macs=10**7, macs_after=10**6, **LAYER
    ),
    CompactLayer("backbone/conv2", parameters=10**6, parameters_after=0, macs=10**7, macs_after=0, **LAYER),
    CompactLayer(
        "head_depth/out", parameters=10**6, parameters_after=10**6, macs=10**6, macs_after=10**6, **LAYER
    ),
]  # fmt: skip


def stacked(axis):
    """Return label -> heights of dense and compact."""
    return {bars.get_label(): [round(bar.get_height(), 6) for bar in bars] for bars in axis.containers}


def test_costs_are_drawn_by_part_of_the_model():
    other = {"parameters": 1, "p90_ms": 9.0, "speedup": 1.0, "images_per_second": 1.0, "gmacs_per_second": 1.0}
    rows = tuple(
        TimingRow(part=part, model=model, batch=batch, median_ms=time * batch, macs=1, memory_mib=1.0, **other)
        for batch in (8, 2)
        for part, model, time in (("backbone", "dense", 4 / batch), ("backbone", "compact", 1 / batch),
                                  ("model", "dense", 7 / batch), ("model", "compact", 3 / batch))
    )  # fmt: skip
    timing = Timing(device="cpu", group_sparsity=0.5, rows=rows)
    parameters, macs, time = plots.costs(results(), LAYERS, timing).axes
    assert stacked(parameters) == {"backbone": [4, 1], "head depth": [1, 1]}
    assert stacked(macs) == {"backbone": [20, 1], "head depth": [1, 1]}
    assert stacked(time) == {"backbone": [2, 0.5], "heads": [1.5, 1]}, "per image at the smallest batch"
    assert time.get_title() == "ms per image, batch 2: 2.3 times less"
    found = dataclasses.replace(results(), size=Size(ModelSize(4 * 10**6, 2 * 10**7), ModelSize(10**6, 10**7)))
    assert [stacked(axis) for axis in plots.costs(found).axes] == [{"model": [4, 1]}, {"model": [20, 10]}]
    assert plots.costs(results()) is None
