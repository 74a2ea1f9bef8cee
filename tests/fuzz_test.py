"""Random options, damaged data folders and checkpoints: everything works, or raises a UserError of one sentence.

The default suite tries a few of each; `pytest -m slow tests/fuzz_test.py` tries many.
"""

import json
import math
import pathlib
import shutil

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from input_pipeline import datasets, loader
from mtl_sparse.runtime.errors import UserError
from mtl_sparse.training import checkpoints
from mtl_sparse.training import config as config_lib
from mtl_sparse.training import setup as setup_lib
from mtl_sparse.training import state as state_lib
from mtl_sparse.training import step as step_lib
from tests.conftest import tiny

ANYTHING = {"deadline": None, "suppress_health_check": list(HealthCheck), "phases": [Phase.explicit, Phase.generate]}


def few_and_many(few, many):
    """Run a test of random examples with few of them, and, marked slow, with many."""

    def decorate(test):
        return pytest.mark.parametrize("count", [few, pytest.param(many, marks=pytest.mark.slow)])(test)

    return decorate


def one_sentence(error):
    text = str(error)
    assert 20 < len(text) < 1200 and "Traceback" not in text, text


# Options.

# Where the data are and how they are drawn: other values would only be slow.
_FIXED = ("data.embedded.", "data.folder", "data.prepared", "run.num_workers", "data.name")
_VALUES = {
    bool: [False, True],
    int: [-(10**9), -1, 0, 1, 2, 3, 7, 100, 10**9],
    float: [-1e30, -1.0, 0.0, 1e-30, 0.3, 0.999, 1.0, 1.5, 1e30, math.inf, -math.inf, math.nan],
    str: ["", "nonsense", "7x7", "deep", "resnet_d", "adaptive", "plain", "l1", "group_mcp", "cosine", "plateau",
          "equal", "uncertainty", "fixed", "bfloat16", "metres", "none", "all", "{}", "[1, 2]"],
    tuple: [(), (0,), (1,), (-1, 2), (32, 48), (64, 64), (0.5, 2.0), ("depth",), ("depth", "edge"), ("nonsense",),
            ("layer1_0",), ("layer4_1", "layer2_0/conv1"), (("face", ("skin",)),), (math.nan, 1.0)],
}  # fmt: skip


@few_and_many(12, 400)
def test_any_setting_trains_a_step_or_is_refused(rooms, count):
    kinds = {name: type(value) for name, value in config_lib.leaves(tiny(rooms)) if not name.startswith(_FIXED)}
    assert len(kinds) > 70
    change = st.sampled_from([(name, value) for name, kind in kinds.items() for value in _VALUES[kind]])
    outcomes = {"trains": 0, "refused": 0}

    @settings(max_examples=count, **ANYTHING)
    @given(st.lists(change, min_size=1, max_size=3, unique_by=lambda pair: pair[0]))
    @example([("seed", 1)])
    @example([("optimizer.b1", math.nan)])
    @example([("train.batch_size", 10**9)])
    def fuzz(changes):
        config = tiny(rooms)
        config.tasks = ("depth",)
        with config.unlocked():
            config.update_from_flattened_dict(dict(changes))
        try:
            run = setup_lib.setup(config)
            batch = next(run.batches.train(0))
            jax.eval_shape(step_lib.make_train_step(run), state_lib.shapes(run), loader.shard(batch))
        except UserError as error:
            one_sentence(error)
            outcomes["refused"] += 1
        else:
            assert all(np.isfinite(leaf).all() for leaf in batch.values())
            outcomes["trains"] += 1

    fuzz()
    assert min(outcomes.values()) > 0, outcomes


# Files.


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


@st.composite
def damages(draw):
    """Draw (which file, kind of damage, where), as numbers modulo the folder's files and their sizes."""
    kinds = ("flip", "cut", "delete", "zeros", "empty", "junk", "other array")
    return draw(st.integers(0, 10**6)), draw(st.sampled_from(kinds)), draw(st.integers(0, 10**9))


def damage(folder, which, kind, where):
    """Damage one file of the folder, and return its path."""
    path = files(folder)[which % len(files(folder))]
    data = bytearray(path.read_bytes())
    place = where % max(len(data), 1)
    if kind == "delete":
        path.unlink()
    elif kind == "other array" and path.suffix == ".npy":
        random = np.random.default_rng(where)
        shape = [(1,), (32, 48), (48, 32), (32, 48, 3), (0, 48), (16, 24, 3)][where % 6]
        np.save(path, random.normal(size=shape).astype([np.float64, np.uint8, "c8", "U3"][where % 4]))
    else:
        if kind == "flip" and data:
            data[place] ^= 1 << where % 8
        elif kind == "zeros":
            data[place : place + 500] = bytes(len(data[place : place + 500]))
        elif kind == "junk":
            data = bytearray(np.random.default_rng(where).bytes(len(data)))
        else:
            data = data[: 0 if kind == "empty" else place]
        path.write_bytes(data)
    return path


def copied(folder, target):
    shutil.rmtree(target, ignore_errors=True)
    return pathlib.Path(shutil.copytree(folder, target))


def samples(data):
    """Return {split: all its samples}."""
    return {split: [dict(sample) for sample in getattr(data, split)] for split in ("train", "validation", "test")}


@few_and_many(8, 300)
def test_a_damaged_folder_is_refused_or_its_samples_are_valid(rooms, tmp_path, count):
    """A flipped bit may change a label unnoticed; it is still a label that training can take."""

    @settings(max_examples=count, **ANYTHING)
    @given(damages())
    def fuzz(what):
        folder = copied(rooms, tmp_path / "NYUD_MT")
        shutil.rmtree(tmp_path / "NYUD_MT.tfds", ignore_errors=True)
        damage(folder, *what)
        config = tiny(folder)
        try:
            run = setup_lib.setup(config)
            for split in ("train", "validation", "test"):
                source, transform = getattr(run.data, split), run.batches.transform()
                for i in range(len(source)):
                    example = transform(source[i])
                    assert example["image"].shape == (32, 48, 3) and np.isfinite(example["image"]).all()
                    assert example["segmentation"].max() <= 40 and example["segmentation"].min() >= 0
                    assert np.isfinite(example["depth"]).all() and np.isfinite(example["normals"]).all()
        except UserError as error:
            one_sentence(error)

    fuzz()


@few_and_many(12, 400)
def test_damaged_prepared_data_are_refused_or_unchanged(rooms, tmp_path, count):
    config = tiny(rooms)
    prepared = pathlib.Path(f"{rooms}.tfds")
    undamaged = samples(datasets.load(config.data))
    config.data.prepared = str(tmp_path / "prepared")
    outcomes = {"refused": 0, "the same": 0}

    @settings(max_examples=count, **ANYTHING)
    @given(damages())
    @example((3, "delete", 0))
    @example((0, "flip", 10**6))
    def fuzz(what):
        damage(copied(prepared, tmp_path / "prepared"), *what)
        try:
            found = samples(datasets.load(config.data))
        except UserError as error:
            one_sentence(error)
            outcomes["refused"] += 1
        else:
            jax.tree.map(np.testing.assert_array_equal, undamaged, found)
            outcomes["the same"] += 1

    fuzz()
    assert outcomes["refused"] > 0, outcomes


@few_and_many(25, 1000)
def test_a_damaged_checkpoint_is_noticed(tmp_path, count):
    """Either one of the two saved states is read, bit-equal, or there is an error of a checkpoint."""
    states = {step: {"a": np.arange(5000, dtype=np.float32) * step, "b": {"c": np.int32(step)}} for step in (1, 2)}
    saved = checkpoints.Checkpoints(tmp_path / "whole")
    for step, state in states.items():
        saved.save("latest", step, state, {"best": step / 3})
    saved.wait()
    saved.close()
    outcomes = {1: 0, 2: 0, "refused": 0}

    @settings(max_examples=count, **ANYTHING)
    @given(damages())
    @example((0, "delete", 0))
    def fuzz(what):
        folder = copied(tmp_path / "whole", tmp_path / "run")
        damage(folder / "checkpoints" / "latest", *what)
        saved = checkpoints.Checkpoints(folder, owned=True)
        try:
            state, progress = saved.restore("latest", states[1])
        except UserError as error:
            one_sentence(error)
            assert error.code.startswith("CHECKPOINT_")
            outcomes["refused"] += 1
        else:
            step = int(state["b"]["c"])
            assert progress == {"best": step / 3}
            assert state["a"].tobytes() == states[step]["a"].tobytes()
            outcomes[step] += 1
        finally:
            saved.close()
        left = json.dumps(sorted(str(path.relative_to(folder)) for path in folder.glob("checkpoints/*/*")))
        assert left.count("1") + left.count("2") >= 2, left

    fuzz()
    assert outcomes[1] > 0 and outcomes[2] > 0, outcomes
