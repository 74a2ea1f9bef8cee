"""Checkpoints of the reference implementation, against the outputs of PyTorch in data/torch_reference.npz."""

import json
import pathlib
import sys
import types
import zlib

import jax
import numpy as np
import optax
import pytest

from configs import nyu
from configs import run as run_config
from mtl_sparse import import_reference
from mtl_sparse.jobs import compact, evaluate, export
from mtl_sparse.jobs import import_reference as import_job
from mtl_sparse.pretrained import state_dicts
from mtl_sparse.report import records
from mtl_sparse.runtime.errors import UserError
from mtl_sparse.tasks import resolve
from mtl_sparse.training import setup as setup_lib
from tests.conftest import raises, tiny

PATH = pathlib.Path(__file__).parents[1] / "data" / "torch_reference.npz"
REFERENCE = dict(np.load(PATH)) if PATH.exists() else {}
CASES = sorted({key.partition("/")[0] for key in REFERENCE} - {"start"})
# A small model that starts from PyTorch's initial weights; tasks in the order of the decoders' names in TASKS.
START = {
    "depth": 18,
    "tasks": {
        "segmentsemantic": ("deeplab", 40),
        "depth_euclidean": ("deeplab", 1),
        "surface_normal": ("deeplab", 3),
        "class_male": ("classifier", 1),
    },
    "width": 8,
    "head_features": 64,
}


def drawn(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Draw a state dictionary seeded by the tensors' names, such that activations keep a moderate scale."""
    state = {}
    for name, shape in shapes.items():
        random = np.random.default_rng(zlib.crc32(name.encode()))
        if name.endswith("num_batches_tracked"):
            value = np.zeros(shape, np.int64)
        elif name.endswith("running_var"):
            value = random.uniform(0.5, 2.0, shape)
        elif name.endswith(("bias", "running_mean")):
            value = random.normal(0.0, 0.1, shape)
        elif len(shape) == 1:
            value = random.uniform(0.4, 1.2, shape)
        else:
            value = random.normal(0.0, (2 / np.prod(shape[1:])) ** 0.5, shape)
        state[name] = value.astype(np.int64 if value.dtype == np.int64 else np.float32)
    return state


def drawn_start(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Draw a state dictionary as of a new PyTorch model: U(-b, b), b = 1 / sqrt(fan-in); BatchNorm at 1 and 0."""
    state = {}
    for name, shape in shapes.items():
        kernel = name.removesuffix("bias") + "weight"
        bound = np.prod(shapes.get(kernel, shape)[1:], initial=1.0) ** -0.5
        if name.endswith("num_batches_tracked"):
            state[name] = np.zeros(shape, np.int64)
        elif len(shapes.get(kernel, shape)) == 1:  # BatchNorm
            state[name] = np.full(shape, name.endswith(("weight", "running_var")), np.float32)
        else:
            random = np.random.default_rng(zlib.crc32(name.encode()))
            state[name] = random.uniform(-bound, bound, shape).astype(np.float32)
    return state


def labelled_batch() -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Draw four images [4, 64, 64, 3], and for each decoder of START its labels [4, 8, 8, ...] or [4]."""
    random = np.random.default_rng(0)
    normals = random.normal(size=(4, 8, 8, 3)) + [0, 0, 2]
    return random.normal(size=(4, 64, 64, 3)), {
        "segmentsemantic": random.integers(0, 40, (4, 8, 8)),
        "depth_euclidean": random.uniform(0.1, 1, (4, 8, 8)),
        "surface_normal": normals / np.linalg.norm(normals, axis=-1, keepdims=True),
        "class_male": np.array([0.0, 1.0, 1.0, 0.0]),
    }


def images(height: int, width: int) -> np.ndarray:
    """Draw two images, NHWC."""
    return np.random.default_rng(height).normal(size=(2, height, width, 3)).astype(np.float32)


def weights_of(case, reference=REFERENCE):
    """Return the state dictionary that the outputs stored under this name were computed with."""
    return drawn(shapes_of(case, reference))


def shapes_of(case, reference=REFERENCE):
    """Return the shapes of the state dictionary stored under this name."""
    return {name: tuple(shape) for name, shape in json.loads(str(reference[f"{case}/shapes"])).items()}


@pytest.mark.parametrize("case", [pytest.param(x, marks=pytest.mark.slow if x == "101" else ()) for x in CASES])
def test_outputs_are_pytorchs(case):
    """Depths 18, 50, 101, each head, odd and even sizes, one at which every atrous tap meets the map."""
    state = weights_of(case)
    model, variables = import_reference.from_state_dict(state)
    assert (model.depth, model.width, model.head_features) == (50 if case == "single" else int(case), 8, 16)
    apply = jax.jit(model.apply)
    keys = [key for key in REFERENCE if key.startswith(f"{case}/") and "x" in key.split("/")[1]]
    assert len(keys) >= 1
    for key in keys:
        _, size, decoder = key.split("/")
        height, width = map(int, size.split("x"))
        raw = apply(variables, images(height, width))[import_reference.TASKS[decoder]]
        expected = REFERENCE[key]
        assert raw.shape == expected.shape
        np.testing.assert_allclose(raw, expected, atol=1e-4 * np.abs(expected).max(), rtol=0, err_msg=key)


def first_losses(model, variables, steps):
    """Return {decoder: losses before each Adam step} on `labelled_batch`, in the dtype of the variables."""
    image, labels = labelled_batch()
    config = nyu.get_config()
    config.tasks = tuple(name for name, *_ in model.heads)
    tasks = {task.name: task for task in resolve(config)}
    dtype = jax.tree.leaves(variables)[0].dtype
    model = model.clone(dropout=0.0, classifier_dropout=(0.0, 0.0), dtype=dtype)
    adam = optax.adam(1e-3)

    def loss(params, batch_stats):
        found, new = model.apply({"params": params, "batch_stats": batch_stats}, image, True, mutable=["batch_stats"])
        losses = {}
        for decoder, label in labels.items():
            task = tasks[import_reference.TASKS[decoder]]
            total, valid = task.elementwise(found[task.name], label)
            losses[decoder] = total.sum() / valid.sum()
        return sum(losses.values()), (losses, new["batch_stats"])

    @jax.jit
    def step(carry):
        params, batch_stats, state = carry
        grads, (losses, batch_stats) = jax.grad(loss, has_aux=True)(params, batch_stats)
        updates, state = adam.update(grads, state)
        return (optax.apply_updates(params, updates), batch_stats, state), losses

    carry, seen = (variables["params"], variables["batch_stats"], adam.init(variables["params"])), []
    for _ in range(steps):
        carry, losses = step(carry)
        seen.append(losses)
    return {decoder: np.array([float(losses[decoder]) for losses in seen]) for decoder in labels}


@pytest.mark.slow
def test_the_first_ten_steps_from_pytorchs_start_have_pytorchs_losses():
    model, variables = import_reference.from_state_dict(drawn_start(shapes_of("start")))
    with jax.enable_x64(True):
        found = first_losses(model, jax.tree.map(np.float64, variables), 10)
    for decoder, losses in found.items():
        np.testing.assert_allclose(losses, REFERENCE[f"start/{decoder}"], rtol=1e-4, err_msg=decoder)


@pytest.mark.slow
def test_a_fresh_model_starts_near_the_losses_of_a_fresh_pytorch_model():
    """No head starts saturated: a cross entropy near log 40 = 3.69, and a depth near the middle of its range.

    The loss of the normals depends on the direction drawn; classifier_test.py and deeplab_test.py have the rest.
    """
    model, _ = import_reference.from_state_dict(drawn_start(shapes_of("start")))
    image, _ = labelled_batch()
    for seed in range(3):
        variables = jax.jit(model.init)(jax.random.key(seed), image)
        losses = {decoder: loss for decoder, (loss,) in first_losses(model, variables, 1).items()}
        assert losses["segmentsemantic"] == pytest.approx(REFERENCE["start/segmentsemantic"][0], abs=0.2)
        assert losses["depth_euclidean"] == pytest.approx(REFERENCE["start/depth_euclidean"][0], abs=0.05)
        assert losses["class_male"] == pytest.approx(REFERENCE["start/class_male"][0], abs=0.02)


def test_every_tensor_is_used_once():
    """The variables have each weight of the checkpoint, and nothing else."""
    state = weights_of("18")
    _, variables = import_reference.from_state_dict(state)
    used = [value for name, value in state.items() if not name.endswith("num_batches_tracked")]
    leaves = jax.tree.leaves(variables)
    assert sum(leaf.size for leaf in leaves) == sum(value.size for value in used) and len(leaves) == len(used)
    sums = sorted(float(np.sum(np.abs(value), dtype=np.float64)) for value in used)
    assert sorted(float(np.sum(np.abs(leaf), dtype=np.float64)) for leaf in leaves) == pytest.approx(sums, rel=1e-6)


def test_the_task_of_a_single_task_checkpoint():
    state = weights_of("single")
    model, _ = import_reference.from_state_dict(state)
    assert model.heads == (("normals", "deeplab", 3),)
    assert import_reference.from_state_dict(state, task="mine")[0].heads == (("mine", "deeplab", 3),)
    one = {name: value[:1] if name.startswith("decoders.4.") else value for name, value in state.items()}
    with raises("OPTION_MISSING", naming="task=") as caught:
        import_reference.from_state_dict(one)
    assert "depth or edge" in str(caught.value)
    assert import_reference.from_state_dict(one, task="edge")[0].heads == (("edge", "deeplab", 1),)
    classifier = {name: value for name, value in weights_of("18").items() if "segmentsemantic" not in name}
    single = {name.replace("class_male.", ""): value for name, value in classifier.items()}
    model, _ = import_reference.from_state_dict(single, task="attribute:Young")
    assert model.heads == (("attribute:Young", "classifier", 1),) and model.classifier_features == (64, 32)


def without(state, *names):
    return {name: value for name, value in state.items() if name not in names}


def test_what_does_not_fit_is_listed():
    state = weights_of("50")
    conv = "backbone.layer3.2.conv2.weight"
    with raises("WEIGHTS_DIFFER", naming="1 missing: params/backbone/layer3_2/conv2/kernel") as caught:
        import_reference.from_state_dict(without(state, conv))
    assert "ResNet-50" in str(caught.value) and str(caught.value).endswith("conv2/kernel"), "nothing else is listed"
    with raises("WEIGHTS_DIFFER", naming="1 unexpected: backbone.fc.weight"):
        import_reference.from_state_dict({**state, "backbone.fc.weight": np.zeros((3, 3))})
    with raises("WEIGHTS_DIFFER", naming="1 of another shape: backbone.layer3.2.conv2.weight ((3, 3, 1, 32)"):
        import_reference.from_state_dict({**state, conv: state[conv][:, :1]})
    with raises("WEIGHTS_DIFFER", naming=conv) as caught:
        import_reference.from_state_dict({**state, conv: np.zeros(16)})
    assert "4 axes" in str(caught.value) and "(16,)" in str(caught.value)
    with raises("WEIGHTS_DIFFER", naming="1 missing: params/backbone/stem_conv1/kernel"):
        import_reference.from_state_dict(without(state, "backbone.stem1.0.weight"))
    with raises("WEIGHTS_UNSUPPORTED", naming="[3, 4, 5, 3] bottlenecks"):
        import_reference.from_state_dict({k: v for k, v in state.items() if not k.startswith("backbone.layer3.5.")})
    with raises("WEIGHTS_UNSUPPORTED", naming="sketch"):
        import_reference.from_state_dict({**state, "decoders.sketch.4.bias": np.zeros(2)})
    with raises("WEIGHTS_UNSUPPORTED", naming="decoders"):
        import_reference.from_state_dict({k: v for k, v in state.items() if k.startswith("backbone")})


@pytest.fixture(scope="module")
def imported(rooms, tmp_path_factory):
    """(config, folder, state dictionary) of a run imported from a checkpoint with as many classes as the rooms."""
    folder = tmp_path_factory.mktemp("imported")
    shapes = {name: tuple(shape) for name, shape in json.loads(str(REFERENCE["18/shapes"])).items()}
    shapes = {name: shape for name, shape in shapes.items() if "class_male" not in name}
    shapes |= {
        f"decoders.segmentsemantic.4.{part}": (40, *rest) for part, rest in (("weight", (16, 1, 1)), ("bias", ()))
    }
    state = drawn(shapes)
    np.savez(folder / "weights.npz", **state)
    config = tiny(rooms)
    config.loss.weighting = "famo"  # which has a state
    import_job.run_job(config, folder / "run", folder / "weights.npz")
    return run_config.get_config(str(folder / "run")), folder / "run", state


@pytest.mark.parametrize("start", [{"start_step": 534}, {"start_at": 0.3, "warmup": 0.1, "warmup_steps": 0}])
def test_a_checkpoint_is_imported_with_a_config_whose_penalty_starts_late(rooms, tmp_path, start):
    np.savez(tmp_path / "weights.npz", **weights_of("single"))
    config = tiny(rooms)
    config.tasks = ("normals",)
    config.sparsity.update(target=0.6, debias_at=0.9, **start)
    import_job.run_job(config, tmp_path / "run", tmp_path / "weights.npz")
    assert run_config.get_config(str(tmp_path / "run")).sparsity.target == 0.6


@pytest.mark.slow
def test_an_imported_run_exports_with_the_same_outputs(imported, tmp_path):
    config, folder, state = imported
    config = config.copy_and_resolve_references()
    path = export.run_job(config, folder)
    program = jax.export.deserialize(bytearray(path.read_bytes()))
    model, variables = import_reference.from_state_dict(state)
    batch = images(*config.data.size)
    raw = jax.jit(model.apply)(variables, batch)["segmentation"]
    np.testing.assert_allclose(program.call(batch)["segmentation"], raw, atol=1e-4 * float(np.abs(raw).max()))


def test_an_imported_run_is_evaluated_and_compacted_like_any_other(imported, capsys):
    config, folder, state = imported
    assert config.tasks == ("segmentation",) and (config.model.depth, config.model.width) == (18, 8)
    model, variables = setup_lib.load_model(folder, config)
    expected, given = import_reference.from_state_dict(state)
    jax.tree.map(np.testing.assert_array_equal, variables, given)
    assert model.heads == expected.heads
    found = evaluate.run_job(config, folder)
    assert 0 <= found["test"]["segmentation/miou"] < 0.2 and found["sparsity"]["group"] == 0
    run = setup_lib.setup(config)
    seen = next(run.batches.evaluation("test"))["image"]
    assert seen.min() >= 0 and 0.5 < seen.max() <= 1, "as the reference implementation trains"
    samples = records.read_samples(folder)["image"]
    assert samples.dtype == np.uint8 and samples.max() > 128
    assert not (folder / "plots" / "curves.png").exists() and (folder / "plots" / "samples.png").exists()
    small = compact.run_job(config, folder)
    again = json.loads((small / "results.json").read_text())
    assert again["test"] == pytest.approx(found["test"], abs=1e-4)
    with raises("FOLDER_IN_USE", naming=str(folder)):
        import_job.run_job(config, folder, folder / "weights.npz")


def test_files_that_cannot_be_read(tmp_path, rooms):
    with raises("FILE_MISSING", naming="weights.pt"):
        state_dicts.read(tmp_path / "weights.pt")
    (tmp_path / "half.npz").write_bytes(b"PK\x03\x04half")
    with raises("FILE_DAMAGED", naming="half.npz"):
        state_dicts.read(tmp_path / "half.npz")
    np.savez(tmp_path / "code.npz", weight=np.array([{"code": 1}], object))
    with raises("FILE_DAMAGED", naming="code.npz") as caught:
        state_dicts.read(tmp_path / "code.npz")
    assert "ValueError: Object arrays" in str(caught.value), "NumPy's refusal of pickles"


def test_safetensors_are_read_without_pytorch(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy", reason="extra torch")
    safetensors.save_file({"a.weight": np.ones((2, 3), np.float32)}, tmp_path / "a.safetensors")
    np.testing.assert_array_equal(state_dicts.read(tmp_path / "a.safetensors")["a.weight"], np.ones((2, 3)))
    (tmp_path / "half.safetensors").write_bytes(b"half")
    with raises("FILE_DAMAGED", naming="half.safetensors"):
        state_dicts.read(tmp_path / "half.safetensors")


class Harmful:
    def __reduce__(self):
        return (pathlib.Path.touch, (pathlib.Path("harmed"),))


def test_a_reference_checkpoint_is_read_and_a_pickle_that_would_run_code_is_refused(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch", reason="extra torch")
    monkeypatch.chdir(tmp_path)
    state = {"backbone.stem1.0.weight": torch.ones(2, 3, 3, 3)}
    torch.save({"model": state, "epoch": 3, "optimizer": {"state": {}, "lr": 0.1}}, "reference.pt")
    found = state_dicts.read("reference.pt")
    assert list(found) == list(state) and found["backbone.stem1.0.weight"].shape == (2, 3, 3, 3)

    # The reference implementation saves the optimizer as an object, of a class and with a function that only it has.
    released = types.ModuleType("proxssi.optimizers.adamw_hf"), types.ModuleType("proxssi.groups.resnet_gp")
    released[0].AdamW = type("AdamW", (torch.optim.Optimizer,), {"__module__": released[0].__name__})
    function = released[1].conv_groups_fn = lambda params: params
    function.__module__, function.__qualname__ = released[1].__name__, "conv_groups_fn"
    weights = [torch.nn.Parameter(torch.ones(2))]
    groups = [{"params": weights, "groups_fn": function}]
    with monkeypatch.context() as patched:
        for module in (types.ModuleType("proxssi"), *released):
            patched.setitem(sys.modules, module.__name__, module)
        for optimizer in (released[0].AdamW(groups, {"lr": 0.1}), torch.optim.Adam(weights)):
            optimizer.state[weights[0]]["exp_avg"] = torch.zeros(2)
            name = f"{type(optimizer).__module__}.pt"
            torch.save({"model": state, "epoch": 3, "optimizer": optimizer}, name)
    for name in ("proxssi.optimizers.adamw_hf.pt", "torch.optim.adam.pt"):
        assert list(state_dicts.read(name)) == list(state)
    torch.save({"model": Harmful()}, "harmful.pt")
    with raises("WEIGHTS_UNSAFE", naming="harmful.pt"):
        state_dicts.read("harmful.pt")
    assert not pathlib.Path("harmed").exists()
    torch.save([1, 2], "list.pt")
    with raises("WEIGHTS_INVALID", naming="list.pt"):
        state_dicts.read("list.pt")
    pathlib.Path("half.pt").write_bytes(b"half")
    with pytest.raises(UserError, match=r"half\.pt") as caught:
        state_dicts.read("half.pt")
    assert caught.value.code in ("FILE_DAMAGED", "WEIGHTS_UNSAFE"), "depends on PyTorch's version"


def test_the_stored_outputs_are_those_of_pytorch():
    pytest.importorskip("torch", reason="extra torch")
    from tests import torch_reference

    found = torch_reference.outputs() | torch_reference.first_losses()
    assert found.keys() == REFERENCE.keys()
    for key, value in found.items():
        if key.endswith("shapes"):
            assert str(value) == str(REFERENCE[key])
        else:
            np.testing.assert_allclose(value, REFERENCE[key], atol=1e-5 * np.abs(value).max(), rtol=0)
