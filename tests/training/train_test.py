"""Runs of the whole job at the smallest size: what they write, refuse and repeat."""

import collections
import json
import shutil

import jax
import numpy as np
import pytest

from configs import run as run_config
from mtl_sparse.compaction import exactness
from mtl_sparse.jobs import evaluate, train
from mtl_sparse.report import run_page, schema
from mtl_sparse.runtime.errors import UserError
from mtl_sparse.training import checkpoints, evaluation, loop
from mtl_sparse.training import setup as setup_lib
from mtl_sparse.training import state as state_lib
from mtl_sparse.training import step as step_lib
from tests.conftest import raises, tiny


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


PAGES = []  # of the run below, in the order in which they were written


@pytest.fixture(scope="module")
def finished(rooms, tmp_path_factory):
    """Return the folder of a finished run of 4 steps, and its results."""
    workdir, write = tmp_path_factory.mktemp("run"), run_page.write

    def write_and_keep(*arguments):
        PAGES.append(write(*arguments).read_text())

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(run_page, "write", write_and_keep)
        return workdir, train.train(tiny(rooms), workdir)


def test_the_page_of_a_run_grows_while_it_trains(finished):
    """Both the first epoch and the finished run have one."""
    first, *_, last = PAGES
    assert "Training: step 2 of 4" in first and "Groups per layer" in first and "Sample predictions" not in first
    assert "Finished; best validation" in last and "Sample predictions" in last and "http-equiv" not in last
    assert run_page.path(finished[0]).read_text() == last


def test_a_run_writes_all_files_of_its_folder(finished):
    workdir, results = finished
    assert json.loads((workdir / "results.json").read_text()) == results
    assert json.loads((workdir / "config.json").read_text()) == results["config"]
    assert {path.name for path in (workdir / "plots").iterdir()} == {
        "curves.png", "sparsity.png", "groups_per_layer.png", "samples.png"
    }  # fmt: skip
    assert list(workdir.glob("events.out.tfevents.*"))
    rows = lines(workdir)
    assert [row["step"] for row in rows if row["split"] == "train"] == [1, 2, 3, 4]
    assert [row["step"] for row in rows if row["split"] == "validation"] == [2, 4]
    assert set(results["sparsity"]) == {
        "group", "parameter", "weight", "lambda", "target", "penalty", "dead_layers", "dead_blocks", "layers"
    }  # fmt: skip
    assert len(results["sparsity"]["layers"]) == 15
    assert results["test"].keys() - results["constant"].keys() == {"segmentation/loss", "depth/loss", "normals/loss"}
    assert results["frames"] == {"train": 18, "validation": 2, "test": 9}
    for size in results["size"].values():
        assert size["parts"].keys() == {"backbone", "head_segmentation", "head_depth", "head_normals"}
        for kind in ("parameters", "macs"):
            of_parts = [part[kind] for part in size["parts"].values()]
            assert sum(of_parts) == size[kind] and min(of_parts) > 0
    assert results["seed"] == 0 and results["versions"]["jax"] == jax.__version__


def test_uncertainty_weights_are_trained(finished):
    rows = [row for row in lines(finished[0]) if row["split"] == "train"]
    values = [[row[f"{task}/log_variance"] for task in ("segmentation", "depth", "normals")] for row in rows]
    assert (np.abs(np.diff(values, axis=0)) > 0).all()


@pytest.mark.slow
def test_the_best_checkpoint_has_the_statistics_of_one_large_batch(finished, rooms, tmp_path):
    """Evaluated, it gives what it gives on that batch in training mode; the training itself is not changed."""
    config = tiny(rooms)
    config.train.bn_frames = 7
    run = setup_lib.setup(config)
    train.train(config, tmp_path)
    best, latest, without = (
        checkpoints.Checkpoints(folder).restore(kind, state_lib.shapes(run))[0]
        for folder, kind in ((tmp_path, "best"), (tmp_path, "latest"), (finished[0], "latest"))
    )
    jax.tree.map(np.testing.assert_array_equal, latest, without)
    transform = run.batches.transform()
    count = 7 // jax.device_count() * jax.device_count()  # each device has an equal part
    images = np.stack([transform(run.data.train[int(i)])["image"] for i in np.linspace(0, 17, count).round()])
    model = run.model.clone(dropout=0.0, axis_name=None)
    trained, _ = model.apply(best.variables, images, train=True, mutable=["batch_stats"])
    assert exactness.largest_difference(trained, model.apply(best.variables, images)) < 1e-4
    assert exactness.largest_difference(trained, model.apply(without.variables, images)) > 1e-2


def test_the_penalty_reaches_the_backbone_of_a_run(config, tmp_path, monkeypatch):
    """A large lambda prunes within four steps; the reported sparsity is that of the saved parameters.

    The step and the evaluation are each traced, and so compiled, once; the model is compacted once, and the best
    checkpoint restored once.
    """
    traced = collections.Counter()
    counted = ((step_lib, "train_step"), (evaluation, "eval_sums"), (setup_lib, "compact"))
    for module, name in (*counted, (checkpoints.Checkpoints, "restore")):
        original = getattr(module, name)

        def counting(*args, original=original, name=name, **kwargs):
            traced[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, counting)
    config.sparsity.update(lambda_=1.0, warmup_steps=0)
    reported = train.train(config, tmp_path)["sparsity"]
    assert traced == {"train_step": 1, "eval_sums": 1, "compact": 1, "restore": 1}
    assert 0.02 < reported["group"] < 1
    saved = checkpoints.Checkpoints(tmp_path)
    state, _ = saved.restore("best", state_lib.shapes(setup_lib.setup(config)))
    saved.close()
    groups = zero = 0
    for kernel in jax.tree.leaves(state.params["model"]["backbone"]):
        if kernel.ndim == 4:
            groups += kernel.shape[2]
            zero += int((np.asarray(kernel) == 0).all((0, 1, 3)).sum())
    assert reported["group"] == pytest.approx(zero / groups)
    heads = jax.tree.leaves({name: tree for name, tree in state.params["model"].items() if name != "backbone"})
    assert not any((np.asarray(leaf) == 0).all((0, 1, 3)).any() for leaf in heads if leaf.ndim == 4)


def test_starting_a_finished_run_again_trains_nothing_and_reports_the_same(finished, rooms):
    workdir, results = finished
    before = (workdir / "metrics.jsonl").read_text()
    assert train.train(tiny(rooms), workdir) == results
    assert (workdir / "metrics.jsonl").read_text() == before


def test_a_run_whose_outputs_are_constant_ends_with_its_results(finished, rooms, tmp_path, monkeypatch, capsys):
    """Such a model has no compact form. Other errors of compaction are not hidden."""
    original, results = finished
    workdir = shutil.copytree(original, tmp_path / "run")
    (workdir / "results.json").unlink()

    def failing(code):
        def compact(*args, **kwargs):
            raise UserError(code, "no model is left")

        monkeypatch.setattr(setup_lib, "compact", compact)

    failing("COMPACTION_FAILED")
    with raises("COMPACTION_FAILED", naming="no model"):
        train.train(tiny(rooms), workdir)
    failing("FUNCTION_DEAD")
    assert train.train(tiny(rooms), workdir) == {name: value for name, value in results.items() if name != "size"}
    assert schema.Results.read(workdir / "results.json").size is None
    assert "every output is constant" in capsys.readouterr().out


def test_other_options_in_the_same_folder_are_refused(finished, rooms):
    config = tiny(rooms)
    config.run.log_every_steps = 7
    config.optimizer.learning_rate = 0.5
    for job in (train.train, evaluate.run_job):
        with raises("RUN_DIFFERS", naming="(optimizer.learning_rate=0.002 there, 0.5 now)") as caught:
            job(config, finished[0])
        assert str(finished[0]) in str(caught.value)


def test_other_data_in_the_same_folder_are_refused(finished, own_rooms):
    np.save(own_rooms / "depth" / "00003.npy", np.ones((32, 48), np.float32))
    with raises("DATA_CHANGED", naming=str(finished[0])):
        evaluate.run_job(tiny(own_rooms), finished[0])


def test_a_run_whose_validation_is_never_finite_is_an_error(rooms, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "validation_score", lambda *_: float("nan"))
    with raises("NO_BEST_CHECKPOINT", naming="sparsity.fixed_norm"):
        train.train(tiny(rooms), tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(
            {
                "tasks": ("depth",),
                "data.depth_target": "metres",
                "loss.weighting": "fixed",
                "loss.weights": (2.0,),
                "sparsity.metric": "plain",
            },
            marks=pytest.mark.slow,
        ),
        {
            "tasks": ("edge",),
            "model.dtype": "bfloat16",
            "data.flip": True,
            "data.max_scale": 1.5,
            "loss.weighting": "equal",
            "model.attach": ("layer3_0/conv1",),
        },
    ],
    ids=["depth in metres, plain prox", "bfloat16 with augmentation, equal weights, an earlier head"],
)
@pytest.mark.slow
def test_variants_run_to_their_report(config, tmp_path, options):
    config.update_from_flattened_dict(options)
    config.train.epochs = 1
    config.model.dropout = 0.0
    results = train.train(config, tmp_path)
    assert list(results["headlines"]) == list(options["tasks"])
    assert all(np.isfinite(value) for value in results["test"].values())
    if "depth" in options["tasks"]:
        assert {"depth/mae", "depth/mae_normalized"} <= results["test"].keys()
    saved = checkpoints.Checkpoints(tmp_path)
    state, _ = saved.restore("latest", state_lib.shapes(setup_lib.setup(config)))
    saved.close()
    assert {leaf.dtype.name for leaf in jax.tree.leaves((state.params, state.batch_stats))} == {"float32"}
    if "model.attach" in options:
        backbone = state.params["model"]["backbone"]
        assert set(backbone["layer3_0"]) == {"conv1", "bn1"} and "layer4_0" not in backbone
        own = run_config.get_config(str(tmp_path))
        model, variables = setup_lib.load_model(tmp_path, own)
        assert model.points() == ("layer3_0/conv1",)
        small, _ = setup_lib.compact(own, model, variables)
        assert small.widths.attach == ("layer3_0/conv1",)
        own.model.update(widths=small.widths.to_json(), attach=("layer2_0",))
        with raises("OPTION_CONFLICT", naming="model.attach=('layer2_0',)"):
            setup_lib.load_model(tmp_path, own)
