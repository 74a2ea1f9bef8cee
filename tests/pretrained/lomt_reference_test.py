"""Checkpoints of LOMT, whose heads read convolutions inside the backbone, against PyTorch's in data/torch_lomt.npz."""

import json
import pathlib

import jax
import numpy as np
import pytest

from configs import run as run_config
from mtl_sparse import import_reference
from mtl_sparse.jobs import compact, evaluate, export
from mtl_sparse.jobs import import_reference as import_job
from mtl_sparse.models import multitask, resnet
from mtl_sparse.pretrained import reference, state_dicts
from tests.conftest import raises, tiny
from tests.pretrained.reference_test import drawn, images, shapes_of, weights_of

PATH = pathlib.Path(__file__).parents[1] / "data" / "torch_lomt.npz"
REFERENCE = dict(np.load(PATH)) if PATH.exists() else {}
CASES = sorted({key.partition("/")[0] for key in REFERENCE})
# What does not imply its attachment points: no published choice has this depth.
EIGHTEEN = {"depth": "layer3_1/conv2:raw", "edge": "layer2_0/conv1:raw"}
NYU = reference.PUBLISHED[0][1]


def converted(case, state=None, attach=None):
    """Return (model, variables) of a case's checkpoint."""
    attach = attach or (EIGHTEEN if case == "18" else None)
    return import_reference.from_state_dict(weights_of(case, REFERENCE) if state is None else state, attach=attach)


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_pytorchs(case):
    """First, second and last convolutions of bottlenecks and basic blocks; published choices need no name."""
    model, variables = converted(case)
    apply = jax.jit(model.apply)
    keys = [key for key in REFERENCE if key.startswith(f"{case}/") and "x" in key.split("/")[1]]
    assert len(keys) >= 2
    for key in keys:
        _, size, decoder = key.split("/")
        raw = apply(variables, images(*map(int, size.split("x"))))[import_reference.TASKS[decoder]]
        expected = REFERENCE[key]
        assert raw.shape == expected.shape
        np.testing.assert_allclose(raw, expected, atol=1e-4 * np.abs(expected).max(), rtol=0, err_msg=key)


def test_published_choices_are_named_by_the_tasks_and_the_widths_of_the_heads():
    model, variables = converted("nyu")
    assert dict(zip([task for task, *_ in model.heads], model.attach, strict=True)) == NYU
    backbone = variables["params"]["backbone"]
    assert set(backbone["layer4_0"]) == {"conv1"} and "layer4_1" not in backbone, "nothing after the last head"
    assert {"bn1", "conv2", "bn2", "conv3"} < set(backbone["layer3_3"]), "the deeper heads need the whole block"
    assert converted("faces")[0].attach == ("layer3_0/conv2:raw", "layer3_4/conv3:raw", "layer4_2/conv3:raw")
    for depth, choices in reference.PUBLISHED:
        assert set(choices.values()) <= set(resnet.points(depth))
        assert set(choices) <= set(import_reference.TASKS.values())


def test_the_learned_weights_of_the_losses_are_ignored():
    """The reference implementation registers them in the model, under the names of the tasks, in float64."""
    state = weights_of("nyu", REFERENCE)
    weights = {decoder: np.array(1.0) for decoder in ("segmentsemantic", "depth_euclidean", "edge_texture")}
    jax.tree.map(np.testing.assert_array_equal, converted("nyu")[1], converted("nyu", {**state, **weights})[1])
    with raises("WEIGHTS_DIFFER", naming="1 unexpected: sharpness"):
        converted("nyu", {**state, "sharpness": np.array(1.0)})


def test_attachment_points_that_are_not_implied_must_be_given():
    state = weights_of("18", REFERENCE)
    with raises("OPTION_MISSING", naming="--config.model.attach") as caught:
        import_reference.from_state_dict(state)
    assert "depth (32 channels), edge (16 channels)" in str(caught.value)
    # A segmentation that reads 64 channels alone: both published choices of ResNet-50 fit.
    alone = {
        name: value
        for name, value in weights_of("nyu", REFERENCE).items()
        if not name.startswith(("decoders.surface", "decoders.depth", "decoders.edge"))
    }
    with raises("OPTION_MISSING", naming="2 published choices fit"):
        import_reference.from_state_dict(alone)
    model, _ = import_reference.from_state_dict(alone, attach={"segmentation": "layer3_5/conv1:raw"})
    assert model.attach == ("layer3_5/conv1:raw",)


@pytest.mark.parametrize(
    ("changed", "code", "naming"),
    [
        ({"edge": "layer3_0/conv1:raw"}, "WEIGHTS_DIFFER", "expected the head of edge to read the 32 channels"),
        ({"edge": "layer2_9/conv1:raw"}, "WEIGHTS_UNSUPPORTED", "got 'layer2_9/conv1:raw' for edge"),
        ({"edge": "layer1_1"}, "WEIGHTS_UNSUPPORTED", "from layer2_0/conv1:raw on, got 'layer1_1'"),
        ({"normals": "layer3_0"}, "OPTION_CONFLICT", "(depth, edge), got those of depth, edge, normals"),
    ],
)
def test_attachment_points_that_do_not_fit_are_named(changed, code, naming):
    with raises(code, naming=naming):
        converted("18", attach={**EIGHTEEN, **changed})


def test_layers_after_the_last_head_are_left_out_and_all_others_are_needed():
    state = weights_of("nyu", REFERENCE)
    model, variables = converted("nyu")
    assert {"/".join(path): leaf.shape for path, leaf in _flat(variables)} == multitask.shapes(model)
    for name in ("backbone.layer2.3.conv2.weight", "backbone.layer3.3.bn1.weight", "backbone.layer3.5.conv3.weight"):
        with raises("WEIGHTS_DIFFER", naming="1 missing: "):
            converted("nyu", {key: value for key, value in state.items() if key != name})
    converted("nyu", {key: value for key, value in state.items() if key != "backbone.layer4.0.bn1.weight"})


def _flat(tree, path=()):
    if not isinstance(tree, dict):
        return [(path, tree)]
    return [leaf for name, part in tree.items() for leaf in _flat(part, (*path, name))]


@pytest.fixture(scope="module")
def imported(rooms, tmp_path_factory):
    """(config, folder, state dictionary) of a run imported from LOMT's checkpoint of 40 classes, in two calls."""
    folder = tmp_path_factory.mktemp("imported_lomt")
    shapes = shapes_of("nyu", REFERENCE)
    shapes |= {
        f"decoders.segmentsemantic.4.{part}": (40, *rest) for part, rest in (("weight", (16, 1, 1)), ("bias", ()))
    }
    state = drawn(shapes)
    np.savez(folder / "weights.npz", **state)
    config = tiny(rooms)
    import_job.run_job(config, folder / "run", folder / "weights.npz")
    return run_config.get_config(str(folder / "run")), folder, state


@pytest.mark.slow
def test_an_imported_run_is_compacted_evaluated_and_exported_like_any_other(imported):
    config, folder, state = imported
    assert config.tasks == ("segmentation", "depth", "normals", "edge"), "in the order of the checkpoint"
    assert config.model.attach == tuple(NYU[task] for task in config.tasks)
    found = evaluate.run_job(config, folder / "run")
    small = json.loads((compact.run_job(config, folder / "run") / "results.json").read_text())
    assert small["test"] == pytest.approx(found["test"], abs=1e-4)
    program = jax.export.deserialize(bytearray(export.run_job(config, folder / "run").read_bytes()))
    model, variables = import_reference.from_state_dict(state)
    batch = images(*config.data.size)
    for task, raw in jax.jit(model.apply)(variables, batch).items():
        np.testing.assert_allclose(program.call(batch)[task], raw, atol=1e-4 * float(np.abs(raw).max()), err_msg=task)


@pytest.mark.slow
def test_the_points_of_the_command_line_are_those_of_its_tasks(imported, rooms, tmp_path):
    _, folder, _ = imported
    config = tiny(rooms)
    config.tasks = ("edge", "normals", "depth", "segmentation")
    config.model.attach = ("layer2_1/conv2", "layer4_1/conv2:raw", "layer3_0/conv2", "layer3_4/conv1:raw")
    import_job.run_job(config, tmp_path / "run", folder / "weights.npz")
    made = run_config.get_config(str(tmp_path / "run"))
    assert dict(zip(made.tasks, made.model.attach, strict=True)) == dict(
        zip(config.tasks, config.model.attach, strict=True)
    )
    config.model.attach = config.model.attach[:3]
    with raises("OPTION_CONFLICT", naming="one attachment point for each of config.tasks (edge, normals"):
        import_job.run_job(config, tmp_path / "other", folder / "weights.npz")


def test_a_file_as_the_reference_implementation_saves_it(tmp_path):
    torch = pytest.importorskip("torch", reason="extra torch")
    state = {"backbone.stem1.0.weight": torch.ones(2, 3, 3, 3), "edge_texture": torch.tensor(1.0, dtype=torch.float64)}
    weights = {"edge_texture": torch.nn.Parameter(torch.tensor(1.0, dtype=torch.float64))}
    saved = {"epoch": 3, "model": state, "optimizer": {}, "log_vars": weights, "lambda_param": 0}
    torch.save(saved, tmp_path / "checkpoint.pt")
    assert list(state_dicts.read(tmp_path / "checkpoint.pt")) == list(state)
