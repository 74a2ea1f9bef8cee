"""Pixel-level and image-level tasks together, from the config to the compact model."""

import functools
import json

import jax
import numpy as np
import pytest

from configs import run as run_config
from input_pipeline import loader
from mtl_sparse import tasks
from mtl_sparse.compaction import exactness
from mtl_sparse.jobs import compact, evaluate, export, train
from mtl_sparse.report import records
from mtl_sparse.runtime import files
from mtl_sparse.training import config as config_lib
from mtl_sparse.training import evaluation
from mtl_sparse.training import setup as setup_lib
from mtl_sparse.training import state as state_lib
from mtl_sparse.training import step as step_lib
from tests import own_backbone
from tests.conftest import raises, tiny_faces


@pytest.fixture(scope="module")
def run(faces):
    config = tiny_faces(faces)
    config.model.backbone = "own"
    with own_backbone.registered():
        yield setup_lib.setup(config)


@pytest.fixture(scope="module")
def finished(faces, tmp_path_factory):
    config = tiny_faces(faces)
    config.model.update(width=8)
    config.sparsity.update(lambda_=3e-1, warmup_steps=0)
    config.optimizer.learning_rate = 2e-3
    folder = tmp_path_factory.mktemp("runs") / "faces"
    return config, folder, train.train(config, folder)


def batches(run, split, batch_size):
    return loader.eval_batches(getattr(run.data, split), run.batches.transform(), batch_size=batch_size)


def test_a_batch_has_the_labels_of_the_tasks_alone(run):
    batch = next(batches(run, "test", 4))
    assert {key: value.shape for key, value in batch.items()} == {
        "image": (4, 32, 32, 3),
        "segmentation": (4, 32, 32),
        "attribute:Male": (4,),
        "attribute:Smiling": (4,),
        "mask": (4,),
    }


@pytest.mark.slow
def test_metrics_do_not_depend_on_the_batch_size(run):
    variables = loader.replicate(state_lib.initial(run).variables)
    evaluator = evaluation.Evaluator(run).evaluate
    devices = jax.device_count()
    whole = evaluator(variables, batches(run, "train", 12 * devices))
    for batch_size in (devices, 5 * devices):
        values = evaluator(variables, batches(run, "train", batch_size))
        assert values == pytest.approx(whole, rel=1e-5)
    named = {name for name in whole if name.startswith("attribute:Smiling/")}
    assert named == {f"attribute:Smiling/{x}" for x in ("loss", "accuracy", "balanced_accuracy", "f1", "auroc")}
    assert "segmentation/miou_stride8" in whole


def test_the_constant_baseline_is_the_more_frequent_answer(run):
    constants = evaluation.constant_predictions(run.tasks, batches(run, "train", 5))
    smiling = [int(sample["attribute:Smiling"]) for sample in run.data.train]
    assert constants["attribute:Smiling"] == pytest.approx(np.mean(smiling))
    values = evaluation.evaluate_constant(run.tasks, constants, batches(run, "test", 3))
    constant = np.mean(smiling) >= 0.5
    tested = np.array([sample["attribute:Smiling"] for sample in run.data.test])
    assert values["attribute:Smiling/accuracy"] == pytest.approx(np.mean(tested == constant))


def test_the_loss_of_a_step_is_that_of_its_batch(run):
    """Logits [B] against labels [B]: an extra axis would broadcast to [B, B] silently."""
    config = run.config.copy_and_resolve_references()
    config.tasks = ("attribute:Male",)
    run = setup_lib.setup(config)
    model = run.model.clone(dropout=0.0, classifier_dropout=(0.0, 0.0))
    step = functools.partial(step_lib.train_step, model=model, tasks=run.tasks, tx=run.tx, loss_config=run.config.loss)
    state, batch = state_lib.initial(run), next(run.batches.train(0))
    mapped = jax.pmap(step, axis_name=setup_lib.AXIS, in_axes=(None, 0, None), out_axes=None)
    _, scalars = mapped(loader.replicate(state), loader.shard(batch), 0)
    outputs, _ = model.clone(axis_name=None).apply(
        state.variables, batch["image"], train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(0)}
    )
    x, y = np.float64(outputs["attribute:Male"]), batch["attribute:Male"]
    assert x.shape == y.shape == (8,)
    expected = np.mean(np.where(y == 1, np.log1p(np.exp(-x)), np.log1p(np.exp(x))))
    assert float(scalars["attribute:Male/loss"]) == pytest.approx(expected, rel=1e-4)


def test_a_run_ends_with_its_attributes_in_table_samples_and_records(finished, capsys):
    config, folder, found = finished
    evaluate.run_job(config, folder)
    assert "attribute:Smiling" in capsys.readouterr().out
    assert {"attribute:Male/accuracy", "attribute:Smiling/auroc", "segmentation/miou"} <= found["test"].keys()
    assert 0 < found["sparsity"]["group"] < 1
    samples = records.read_samples(folder)
    assert list(samples["classes"]) == ["background", "skin", "hair"]
    assert samples["prediction/attribute:Smiling"].shape == samples["label/attribute:Smiling"].shape == (2,)
    assert json.loads((folder / "config.json").read_text())["data"]["classes"][2] == ["hair", ["hair"]]


@pytest.mark.slow
def test_the_compact_run_has_the_same_metrics_and_exports(finished):
    config, folder, found = finished
    small_folder = compact.run_job(run_config.get_config(str(folder)), folder)
    small = files.read_json(small_folder / "results.json")
    for name, value in found["test"].items():
        assert small["test"][name] == pytest.approx(value, abs=1e-4, nan_ok=True), name
    model, variables = setup_lib.load_model(small_folder, run_config.get_config(str(small_folder)))
    assert model.layers().heads[1] is not None, "the classification heads are compacted too"
    path = export.run_job(config, folder)
    images = np.random.default_rng(0).normal(size=(3, 32, 32, 3)).astype(np.float32)
    exported = jax.export.deserialize(bytearray(path.read_bytes())).call(images)
    expected = jax.jit(model.apply)(variables, images)
    assert exported["attribute:Male"].shape == (3,)
    assert exactness.largest_difference(expected, exported) < 1e-4


def test_threshold_and_weight_come_from_the_config(run):
    config = run.config.copy_and_resolve_references()
    config.loss.update(threshold=0.9, pos_weight=2.0)
    _, male, _ = tasks.resolve(config)
    assert (male.name, male.label, male.head) == ("attribute:Male", "attribute:Male", "classifier")
    assert float(male.loss(np.float32(0), np.uint8(1))[0]) == pytest.approx(2 * np.log(2))
    right = male.sums(np.float32(0.8), np.uint8(1))["right"]
    np.testing.assert_array_equal(right, [0, 0], err_msg="0.8 does not reach the threshold")


@pytest.mark.parametrize(
    ("name", "code", "also"),
    [
        ("attribute:", "TASK_UNKNOWN", "attribute:NAME"),
        ("attribute", "TASK_UNKNOWN", "attribute:NAME"),
        ("attribute:Smile", "DATA_LABEL_MISSING", "attribute:Smiling"),
        ("normals", "DATA_LABEL_MISSING", "celebamask_hq"),
    ],
)
def test_bad_tasks_are_named(run, name, code, also):
    config = run.config.copy_and_resolve_references()
    config.tasks = ("segmentation", name)
    with raises(code, naming=f"{name!r}") as caught:
        setup_lib.setup(config)
    assert also in str(caught.value)


@pytest.mark.parametrize(
    ("options", "naming"),
    [
        (dict(classifier_dropout=(0.5, 1.0)), "classifier_dropout=(0.5, 1.0)"),
        (dict(classifier_features=(0, 3)), "classifier_features=(0, 3)"),
        (dict(classifier_features=(4, 3, 2)), "classifier_features=(4, 3, 2)"),
    ],
)
def test_bad_classifiers_are_named(run, options, naming):
    config = run.config.copy_and_resolve_references()
    config.model.update(**options)
    with raises("OPTION_OUT_OF_RANGE", naming=naming):
        config_lib.check(config)
