import html
import json
import pathlib

import pytest

from configs import nyu
from mtl_sparse.jobs import lomt, sweep
from mtl_sparse.models import resnet
from mtl_sparse.report import page, plots
from mtl_sparse.report.schema import Choices
from tests.conftest import raises
from tests.report.study_test import write_run

# Layers of a backbone in the order of the network, as a run's results.json has them.
LAYERS = ("stem_conv1", "layer1_0/conv1", "layer1_0/conv2", "layer1_0/conv3", "layer1_0/downsample_conv",
          "layer3_3/conv1", "layer3_3/conv2", "layer4_0/conv1", "layer4_2/conv3")  # fmt: skip


def write_single(folder, task, seed, depth_of, lambda_=1e-5):
    """Write a single-task run in which the layers up to `depth_of` have 3 of 100 groups left, the others one."""
    values = {"segmentation": {"iou": 0.3}, "depth": {"mae": 0.1}, "normals": {"cs": 0.8}}[task]
    write_run(folder, (task,), lambda_, seed, group=0.5, **values)
    results = json.loads((folder / "results.json").read_text())
    last = LAYERS.index(depth_of)
    results["sparsity"]["layers"] = [
        {"path": f"backbone/{layer}/kernel", "groups": 100, "zero_groups": 97 if i <= last else 99, "group_size": 9}
        for i, layer in enumerate(LAYERS)
    ]
    head = {"path": "head_depth/aspp0/kernel", "groups": 100, "zero_groups": 0, "group_size": 9}
    results["sparsity"]["layers"].append(head)
    (folder / "results.json").write_text(json.dumps(results))
    return folder


DEEPEST = {"segmentation": "layer4_2/conv3", "depth": "layer3_3/conv1", "normals": "layer1_0/downsample_conv"}


@pytest.fixture
def singles(tmp_path):
    """Return folders of two runs of each task; each second run keeps one more layer."""
    folders = []
    for task, layer in DEEPEST.items():
        more = LAYERS[min(LAYERS.index(layer) + 1, len(LAYERS) - 1)]
        folders += [write_single(tmp_path / f"{task}{seed}", task, seed, [layer, more][seed]) for seed in (0, 1)]
    return folders


def test_the_rule_by_hand():
    """The deepest layer with more than 1 % of the groups in all runs; the vote of fewer runs is deeper."""
    runs = [
        {"stem_conv1": 1.0, "layer1_0/conv1": 0.5, "layer2_0/conv1": 0.02, "layer3_0/conv1": 0.3},
        {"stem_conv1": 1.0, "layer1_0/conv1": 0.005, "layer2_0/conv1": 0.011, "layer3_0/conv1": 0.01},
        {"stem_conv1": 1.0, "layer1_0/conv1": 0.5, "layer2_0/conv1": 0.5, "layer3_0/conv1": 0.2},
    ]
    assert lomt.choose(runs, resnet.points(50), 0.01, 1.0) == (
        "layer2_0/conv1",
        "layer2_0/conv1",
        ("stem_conv1", "layer2_0/conv1"),
    )
    assert lomt.choose(runs, resnet.points(50), 0.01, 2 / 3)[0] == "layer3_0/conv1"
    assert lomt.choose(runs, resnet.points(50), 0.3, 1.0)[0] == "stem_conv1"
    assert lomt.choose(runs[:1], resnet.points(50), 0.01, 1.0)[0] == "layer3_0/conv1"
    with raises("LOMT_NO_LAYER", naming="more than 0.9 of its groups left in 100% of 2 runs"):
        lomt.choose([{"layer1_0/conv1": 0.5}] * 2, resnet.points(50), 0.9, 1.0)


def test_where_a_layers_output_is_read():
    assert lomt.point_of("layer3_3/conv1", resnet.points(50)) == "layer3_3/conv1"
    assert lomt.point_of("layer3_3/conv2", resnet.points(50)) == "layer3_3/conv2"
    assert lomt.point_of("layer3_3/conv3", resnet.points(50)) == "layer3_3", "after the sum with the shortcut"
    assert lomt.point_of("layer3_1/conv2", resnet.points(18)) == "layer3_1", "a basic block's last"
    assert lomt.point_of("layer2_0/downsample_conv", resnet.points(50)) == "layer2_0"
    assert lomt.point_of("stem_conv2", resnet.points(50)) == "stem"
    assert lomt.point_of("layer3_3/conv1", resnet.points(50), raw=True) == "layer3_3/conv1:raw"
    assert lomt.point_of("layer3_3/conv3", resnet.points(50), raw=True) == "layer3_3/conv3:raw", (
        "before the sum with the shortcut"
    )
    assert lomt.point_of("layer2_0/downsample_conv", resnet.points(50), raw=True) == "layer2_0"
    assert lomt.point_of("stem_conv2", resnet.points(50), raw=True) == "stem"


def test_choices_of_single_task_runs(singles, tmp_path):
    config = nyu.get_config()
    dense = write_single(tmp_path / "dense", "depth", 0, "layer4_2/conv3", lambda_=0.0)
    several = write_run(tmp_path / "several", ("depth", "normals"), 1e-5, 0, mae=0.1, cs=0.8)
    choices = lomt.read_choices(config, [*singles, dense, several])
    assert {task: choice.layer for task, choice in choices.items()} == DEEPEST, "what only one run keeps does not count"
    assert [choice.point for choice in choices.values()] == ["layer4_2", "layer3_3/conv1", "layer1_0"]
    assert choices["depth"].kept == LAYERS[:6] and "head_depth/aspp0" not in choices["depth"].active
    assert choices["depth"].active["layer3_3/conv2"] == pytest.approx((0.01, 0.03))
    config.lomt.vote = 0.5
    assert lomt.read_choices(config, singles)["depth"].layer == "layer3_3/conv2"
    config.lomt.raw = True
    raw = [choice.point for choice in lomt.read_choices(config, singles).values()]
    assert raw == ["layer4_2/conv3:raw", "layer3_3/conv2:raw", "layer3_3/conv1:raw"]


def test_with_coupled_groups_a_layer_on_a_branch_is_as_active_as_the_least_active_one(tmp_path):
    """It reads channels of the stream, which another kernel may need; the stem and the shortcut are on no branch."""
    config = nyu.get_config()
    config.tasks = ("depth",)
    folder = write_single(tmp_path / "depth", "depth", 0, "layer4_2/conv3")
    results = json.loads((folder / "results.json").read_text())
    layers = {one["path"]: one for one in results["sparsity"]["layers"]}
    layers["backbone/layer1_0/conv2/kernel"]["zero_groups"] = layers["backbone/stem_conv1/kernel"]["zero_groups"] = 98
    layers["backbone/layer3_3/conv2/kernel"]["zero_groups"] = 100
    (folder / "results.json").write_text(json.dumps(results))
    alone = lomt.read_choices(config, [folder])["depth"]
    results["sparsity"]["coupled"] = [{"name": "backbone/layer1_0/conv1", "groups": 100, "zero_groups": 97}]
    (folder / "results.json").write_text(json.dumps(results))
    coupled = lomt.read_choices(config, [folder])["depth"]
    assert alone.active["layer3_3/conv1"] == (0.03,) and coupled.active["layer3_3/conv1"] == (0.0,)
    least = {"stem_conv1": 0.02, "layer1_0/downsample_conv": 0.03} | {f"layer1_0/conv{i}": 0.02 for i in (1, 2, 3)}
    assert {name: coupled.active[name] for name in least} == {name: (pytest.approx(x),) for name, x in least.items()}


def test_the_job_writes_the_choice_and_trains_with_it_and_without(singles, tmp_path, monkeypatch, capsys):
    config, workdir, swept = nyu.get_config(), tmp_path / "lomt", []

    def run_job(config, folder, settings, options):
        """Write the results of each trial instead of training it."""
        swept.append((pathlib.Path(folder).name, settings))
        trials = sweep.make_trials(config, settings)
        for i, trial in enumerate(trials):
            extra = 0.01 * len(trial.config.model.attach) + 0.001 * i
            made = write_run(pathlib.Path(folder) / trial.name, ALL, 1e-5, trial.config.seed, group=0.5,
                             iou=0.3 + extra, mae=0.2, cs=0.8)  # fmt: skip
            results = json.loads((made / "results.json").read_text())
            results["config"]["model"]["attach"] = list(trial.config.model.attach)
            (made / "results.json").write_text(json.dumps(results))
        (pathlib.Path(folder) / "sweep.json").write_text(json.dumps({"trials": {trial.name: {} for trial in trials}}))

    monkeypatch.setattr(sweep, "run_job", run_job)
    seeds = [{"seed": seed} for seed in range(3)]
    page = lomt.run_job(config, workdir, seeds, sweep.Options(), singles)
    attach = ("layer4_2", "layer3_3/conv1", "layer1_0")
    assert swept == [("multi_task", [{"model.attach": points, **seed} for points in ((), attach) for seed in seeds])]
    found = json.loads((workdir / "lomt.json").read_text())["tasks"]
    assert [found[task]["point"] for task in ALL] == list(attach) and found["depth"]["layer"] == "layer3_3/conv1"
    assert (workdir / "plots" / "attachments.png").stat().st_size > 5_000
    printed = capsys.readouterr().out
    assert "--config.model.attach=layer4_2,layer3_3/conv1,layer1_0" in printed
    assert "LOMT - plain" in printed and "the backbone ends at layer4_2" in printed
    assert "Heads at their tasks' layers" in html.unescape(page.read_text())


ALL = ("segmentation", "depth", "normals")


def test_the_single_tasks_are_trained_first_where_no_runs_are_given(tmp_path, monkeypatch):
    config, swept = nyu.get_config(), []
    config.loss.update(weighting="fixed", weights=(1.0, 2.0, 3.0))

    def run_job(config, folder, settings, options):
        swept.append(settings)
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "run_job", run_job)
    with pytest.raises(KeyboardInterrupt):
        lomt.run_job(config, tmp_path, [{"seed": 0}, {"seed": 1}], sweep.Options())
    assert swept[0][2:4] == [{"tasks": ("depth",), "loss.weights": (2.0,), "seed": seed} for seed in (0, 1)]
    assert len(swept[0]) == 6


def test_bad_runs_are_named(singles, tmp_path):
    config = nyu.get_config()
    with raises("LOMT_RUNS", naming="sparse runs of normals"):
        lomt.read_choices(config, singles[:4])
    other = write_single(tmp_path / "other", "depth", 0, "layer1_0/conv1", lambda_=1e-4)
    assert lomt.read_choices(config, [*singles, other])["depth"].layer == DEEPEST["depth"], "lambda is 1e-5 here"
    config.sparsity.lambda_ = 1e-3
    with raises("LOMT_RUNS", naming="runs of depth") as caught:
        lomt.read_choices(config, [*singles, other])
    assert "sparsity.lambda_=1e-05" in str(caught.value) and "sparsity.lambda_=0.0001" in str(caught.value)
    config.data.name = "celebamask_hq"
    with raises("LOMT_RUNS", naming="data.name=celebamask_hq, got nyud_mt"):
        lomt.read_choices(config, singles)
    config = nyu.get_config()
    config.model.depth = 101
    with raises("LOMT_RUNS", naming="model.depth=101, got a ResNet-50"):
        lomt.read_choices(config, singles)
    results = json.loads((singles[0] / "results.json").read_text())
    for setting, text in (("attach", " with model.attach"), ("widths", ", compact")):
        given = json.loads(json.dumps(results))
        given["config"]["model"][setting] = ["layer4_0"]
        (singles[0] / "results.json").write_text(json.dumps(given))
        with raises("LOMT_RUNS", naming=f"a ResNet-50{text}"):
            lomt.read_choices(nyu.get_config(), [singles[0], *singles[2:]])


def test_only_unfinished_runs_of_a_single_task_are_waited_for(singles, tmp_path):
    config, folder = nyu.get_config(), tmp_path / "half"
    folder.mkdir()
    trials = {"a": {"tasks": ["segmentation", "depth"]}, "b": {"tasks": ["edge"]}}
    (folder / "sweep.json").write_text(json.dumps({"trials": trials}))
    assert lomt.read_choices(config, [*singles, folder]).keys() == set(config.tasks)
    for settings in ({"tasks": ["depth"]}, {"seed": 0}):
        (folder / "sweep.json").write_text(json.dumps({"trials": {**trials, "c": settings}}))
        with raises("RUN_NOT_FINISHED", naming="1 single-task runs have not finished, such as c;"):
            lomt.read_choices(config, [*singles, folder])


SEEDS = [{"seed": 0}, {"seed": 1}]


@pytest.mark.parametrize(
    ("settings", "trials", "shard", "code", "naming"),
    [
        ({"model.attach": ("layer4_0",) * 3}, SEEDS, (0, 1), "OPTION_CONFLICT", "model.attach"),
        ({"tasks": ("depth",)}, SEEDS, (0, 1), "TASK_MISSING", "depth"),
        ({"sparsity.lambda_": 0.0}, SEEDS, (0, 1), "OPTION_MISSING", "sparsity.lambda_"),
        ({"lomt.vote": 0.0}, SEEDS, (0, 1), "OPTION_OUT_OF_RANGE", "lomt.vote=0.0"),
        ({"lomt.active": 3.0}, SEEDS, (0, 1), "OPTION_OUT_OF_RANGE", "lomt.active=3.0"),
        (
            {"loss.weighting": "fixed", "tasks": ("depth", "edge")},
            SEEDS,
            (0, 1),
            "OPTION_OUT_OF_RANGE",
            "loss.weights=(1.0, 1.0, 1.0)",
        ),
        ({}, [{"seed": 0, "optimizer.learning_rate": 1.0}], (0, 1), "OPTION_CONFLICT", "seed, optimizer.learning_rate"),
        ({}, SEEDS, (1, 4), "OPTION_CONFLICT", "--shard"),
    ],
)
def test_bad_options_are_named_before_anything_is_trained(tmp_path, monkeypatch, settings, trials, shard, code, naming):
    config = nyu.get_config()
    config.update_from_flattened_dict(settings)
    monkeypatch.setattr(sweep, "run_job", lambda *_: pytest.fail("something was run"))
    with raises(code, naming=naming):
        lomt.run_job(config, tmp_path / "x", trials, sweep.Options(shard=shard))


def test_a_folder_of_another_choice_keeps_it(singles, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "run_job", lambda *_: None)
    monkeypatch.setattr(page, "write", lambda *_: None)
    config = nyu.get_config()
    lomt.run_job(config, tmp_path / "x", SEEDS, sweep.Options(), singles)
    before = (tmp_path / "x" / "lomt.json").read_text()
    lomt.run_job(config, tmp_path / "x", SEEDS, sweep.Options(), singles)
    config.lomt.vote = 0.5
    with raises("RUN_DIFFERS", naming=str(tmp_path / "x" / "lomt.json")):
        lomt.run_job(config, tmp_path / "x", SEEDS, sweep.Options(), singles)
    assert (tmp_path / "x" / "lomt.json").read_text() == before


def test_where_every_task_keeps_the_end_there_is_one_model_to_train(tmp_path, monkeypatch):
    swept = []
    monkeypatch.setattr(sweep, "run_job", lambda config, folder, settings, options: swept.append(settings))
    monkeypatch.setattr(page, "write", lambda *_: None)
    folders = [write_single(tmp_path / task, task, 0, "layer4_2/conv3") for task in ALL]
    lomt.run_job(nyu.get_config(), tmp_path / "x", SEEDS, sweep.Options(), folders)
    assert swept == [[{"model.attach": (), **seed} for seed in SEEDS]]


def test_the_plot_outlines_the_choice_and_crosses_what_is_not_kept(singles):
    config = nyu.get_config()
    choices = Choices(50, 0.01, 1.0, lomt.read_choices(config, singles))
    axis = plots.attachments(choices).axes[0]
    assert [label.get_text() for label in axis.get_xticklabels()] == list(LAYERS)
    assert [label.get_text() for label in axis.get_yticklabels()][1] == "depth → layer3_3/conv1"
    outlined = {(round(frame.get_y() + 0.46), round(frame.get_x() + 0.5)) for frame in axis.patches}
    assert outlined == {(row, LAYERS.index(DEEPEST[task])) for row, task in enumerate(config.tasks)}
    crossed = {(int(y), int(x)) for line in axis.lines for x, y in line.get_xydata()}
    kept = {(row, LAYERS.index(layer)) for row, task in enumerate(choices.tasks.values()) for layer in task.kept}
    assert crossed == {(row, i) for row in range(3) for i in range(len(LAYERS))} - kept and crossed


def test_published_choices_are_points_of_the_network():
    published = ("layer3_3/conv1", "layer4_0/conv1", "layer2_3/conv2")
    assert set(published) <= set(resnet.points(50))
