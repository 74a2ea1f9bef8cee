"""The JSON files of all versions are read, written without losing a key, and refused if they are too new or damaged."""

import copy
import json
import pathlib

import pytest

from mtl_sparse.report import schema
from tests.conftest import raises

RESULTS = sorted((pathlib.Path(__file__).parents[2] / "docs" / "results").rglob("*.json"))
CLASSES = {one.kind: one for one in (schema.Results, schema.Timing, schema.Sweep, schema.Choices, schema.CompactLayer)}
ROW = {"part": "model", "model": "dense", "batch": 1, "parameters": 2, "macs": 3, "median_ms": 1.5, "p90_ms": 2.0,
       "speedup": 1.0, "images_per_second": 9.0, "gmacs_per_second": 0.5, "memory_mib": 4.0}  # fmt: skip
LAYER = {"path": "backbone/stem_conv1/kernel", "groups": 3, "zero_groups": 3, "group_size": 9, "zero_weights": 27}
CHOICE = {"layer": "stem_conv1", "point": "stem", "kept": ["stem_conv1"], "active": {"stem_conv1": [0.5, 1.0]},
          "folders": ["runs/a", "runs/b"]}  # fmt: skip
# Options that runs had no names for, and what they did.
EARLIER = {
    "keep_connected": False, "groups": "input", "macs_exponent": 0.5, "at_least": 1, "max_removed": 1.0,
    "prune_at": 0.5, "norm": "initial",
}  # fmt: skip
EARLIER_LOSS = {
    "gradients_of": "params",
    "options": {
        "uw_so_temperature": 1.0, "dwa_temperature": 2.0, "stch_mu": 1.0, "stch_warmup_epochs": 4,
        "famo_learning_rate": 0.025, "famo_weight_decay": 1e-3, "gradnorm_alpha": 1.5, "gradnorm_learning_rate": 0.025,
        "cagrad_c": 0.4, "fairgrad_alpha": 2.0,
    },
}  # fmt: skip
EARLIER_ELSEWHERE = (
    ("sparsity", EARLIER),
    ("train", {"early_stop": "run"}),
    ("model", {"backbone": "resnet"}),
    ("loss", EARLIER_LOSS),
    ("optimizer", {"step_epochs": 100, "step_factor": 0.5}),
)
# A whole file of each kind, without its version.
WHOLE = {
    "results": {
        "test": {"depth/mae": 0.5, "depth/loss": 1},
        "constant": {"depth/mae": 0.7},
        "headlines": {"depth": {"metric": "depth/mae", "higher_is_better": False}},
        "sparsity": {
            "group": 1.0, "parameter": 1.0, "weight": 1.0, "lambda": 1e-5, "target": 0.7, "penalty": "l1",
            "dead_layers": ["backbone/stem_conv1/kernel"], "dead_blocks": ["backbone/layer1_0"], "layers": [LAYER],
            "coupled": [{"name": "backbone/stem_conv1", "groups": 3, "zero_groups": 2}],
        },
        "size": {"trained": {"parameters": 9, "macs": 99}, "compact": {"parameters": 1, "macs": 11}},
        "step": 4,
        "seed": 1,
        "frames": {"train": 8, "test": 3},
        "config": {"sparsity": {**EARLIER, "lambda_": 0.0, "keep_connected": True}, "tasks": ["depth"]},
        "versions": {"jax": "0.10.0"},
        "device": "1 x cpu",
    },
    "benchmark": {
        "device": "cpu", "size": [32, 48], "rounds": 5, "compact": {"multiple": 8}, "group_sparsity": 0.5, "rows": [ROW]
    },
    "sweep": {"trials": {"tasks=depth__seed=0": {"tasks": ["depth"], "seed": 0, "model.init_from": None}}},
    "lomt": {"depth": 10, "active": 0.01, "vote": 1.0, "tasks": {"depth": CHOICE}},
    "compact": {
        "layer": "stem_conv1", "groups": 3, "zero": 3, "groups_after": 0, "zero_after": 0, "parameters": 27,
        "parameters_after": 0, "macs": 99, "macs_after": 0, "why": "removed",
    },
}  # fmt: skip


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: str(path.relative_to(path.parents[2])))
def test_the_files_under_docs_are_read_and_written_without_losing_a_key(path):
    """Files of the present version, and of version 0, made before the schema: without version and newer options."""
    value = json.loads(path.read_text())
    assert value.pop("version", schema.VERSION) == schema.VERSION
    found = CLASSES[path.stem].read(path).to_json()
    assert found.pop("version") == schema.VERSION
    if path.stem == "results":
        for section, options in EARLIER_ELSEWHERE:
            given, read = value["config"][section], found["config"][section]
            assert given.items() <= read.items()
            for name in read.keys() - given.keys():
                assert read.pop(name) == options[name]
    assert found == value and list(found) == list(value), "and in the same order"


@pytest.mark.parametrize("kind", WHOLE)
def test_a_file_round_trips(kind, tmp_path):
    found = CLASSES[kind].from_json(WHOLE[kind])
    found.write(tmp_path / f"{kind}.json")
    assert json.loads((tmp_path / f"{kind}.json").read_text()) == {"version": schema.VERSION, **WHOLE[kind]}
    assert CLASSES[kind].read(tmp_path / f"{kind}.json") == found
    assert schema.migrate(kind, WHOLE[kind] | {"version": schema.VERSION}) == found.to_json()


@pytest.mark.parametrize("kind", WHOLE)
def test_a_file_of_a_later_version_is_refused(kind, tmp_path):
    path = tmp_path / f"{kind}.json"
    path.write_text(json.dumps(WHOLE[kind] | {"version": schema.VERSION + 1}))
    with raises("SCHEMA_TOO_NEW", naming=str(path)) as caught:
        CLASSES[kind].read(path)
    assert f"version={schema.VERSION + 1}" in str(caught.value)


def test_what_the_first_runs_did_not_write_is_taken_from_their_config():
    value = copy.deepcopy(WHOLE["results"])
    kept = {name: value["sparsity"][name] for name in ("group", "parameter", "layers")}
    del kept["layers"][0]["zero_weights"], value["size"], value["config"]["sparsity"]["keep_connected"]
    value["sparsity"] = kept
    value["config"]["sparsity"] |= {"lambda_": 3e-4, "penalty": "group_mcp"}
    before = copy.deepcopy(value)
    found = schema.Results.from_json(value)
    assert value == before, "the dictionary given stays"
    sparsity = found.sparsity
    assert (sparsity.lambda_, sparsity.target, sparsity.penalty) == (3e-4, 0.0, "group_mcp")
    assert sparsity.dead_layers == ("backbone/stem_conv1/kernel",) and sparsity.dead_blocks == ()
    assert sparsity.weight is None and sparsity.layers[0].zero_weights is None and found.size is None
    assert found.config["sparsity"]["keep_connected"] is False
    written = found.to_json()
    assert "size" not in written and "weight" not in written["sparsity"]
    assert schema.Results.from_json(written) == found


def test_the_first_benchmarks_are_read():
    value = {name: value for name, value in WHOLE["benchmark"].items() if name not in ("rounds", "compact")}
    found = schema.Timing.from_json(value)
    assert (found.rounds, found.compact, found.rows[0].median_ms) == (0, {}, 1.5)


def test_a_config_gets_the_options_that_it_was_made_before():
    config = {"seed": 0, "sparsity": {"lambda_": 1.0}}
    assert schema.migrate("config", config) == {"seed": 0, "sparsity": {"lambda_": 1.0, **EARLIER}}
    for decays, norm in ((False, "initial"), (True, "unpenalized")):  # an option that "norm" replaced
        found = schema.migrate("config", {"sparsity": {"norm_decays": decays}})
        assert found == {"sparsity": {**EARLIER, "norm": norm}}
    free = schema.migrate("config", {"sparsity": {"norm_decays": True, "fixed_norm": False}})
    assert free == {"sparsity": {**EARLIER, "norm": "initial", "fixed_norm": False}}, "it had no effect there"
    assert config == {"seed": 0, "sparsity": {"lambda_": 1.0}}
    later = {"sparsity": {name: "another" for name in EARLIER}}
    assert schema.migrate("config", later) == later


DAMAGED = {
    "a missing key": ("results", ("step",), None, "'step'"),
    "a missing key inside": ("results", ("sparsity", "layers", 0, "groups"), None, "results/sparsity/layers[0]"),
    "another type": ("results", ("seed",), "one", "results/seed"),
    "another type in a list": ("benchmark", ("rows", 0, "median_ms"), "fast", "benchmark/rows[0]/median_ms"),
    "a list for an object": ("sweep", ("trials",), ["a", "b"], "sweep/trials"),
    "an object for a list": ("lomt", ("tasks", "depth", "kept"), {}, "lomt/tasks/depth/kept"),
    "a version in words": ("compact", ("version",), "one", "version='one'"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_what_is_damaged_is_named(case, tmp_path):
    kind, (*parents, last), replacement, naming = DAMAGED[case]
    value = node = copy.deepcopy(WHOLE[kind])
    for key in parents:
        node = node[key]
    if replacement is None:
        del node[last]
    else:
        node[last] = replacement
    path = tmp_path / f"{kind}.json"
    path.write_text(json.dumps(value))
    with raises("FILE_DAMAGED", naming=naming) as caught:
        CLASSES[kind].read(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("kind", [*WHOLE, "config"])
def test_a_file_that_holds_no_object_is_damaged(kind):
    with raises("FILE_DAMAGED", naming=f"{kind}.json"):
        schema.migrate(kind, [1, 2])


def test_runs_from_before_other_backbones_have_a_resnet():
    path = pathlib.Path(__file__).parents[2] / "docs/results/evidence/lambda_=0.0,seed=0/results.json"
    assert "backbone" not in json.loads(path.read_text())["config"]["model"]
    assert schema.Results.read(path).config["model"]["backbone"] == "resnet"
