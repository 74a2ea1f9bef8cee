"""Rows are named by what they are, and by the options that set them apart."""

import json

import pytest

from mtl_sparse.report import study, study_names, study_tables
from tests.report.study_test import BOTH, write_run

PUBLISHED = {"bias_correction": False, "fixed_norm": False, "anneal_revival": False, "warmup": 0.0, "warmup_steps": 0}


@pytest.fixture
def make(tmp_path):
    """Return a function (lambda, tasks, seed, group of options=changes) that writes a run and returns its folder."""

    def write(lambda_, tasks=BOTH, seed=0, **changes):
        metrics = {"iou": 0.3, "mae": 0.1}
        kept = {key: value for key, value in metrics.items() if ("segmentation" if key == "iou" else "depth") in tasks}
        folder = write_run(tmp_path / f"run{len(list(tmp_path.iterdir()))}", tasks, lambda_, seed, **kept)
        results = json.loads((folder / "results.json").read_text())
        for group, values in changes.items():
            results["config"][group].update(values)
        (folder / "results.json").write_text(json.dumps(results))
        return folder

    return write


def names(*folders):
    return study_names.names(study.read(folders))


def test_forms_of_sparsity(make):
    found = names(
        make(0.0),
        make(1e-5),
        make(1e-5, sparsity={"target": 0.7}),
        make(1e-5, sparsity={"target_macs": 0.25}),
        make(1e-5, sparsity={"target_params": 0.1}),
        make(1e-5, sparsity={"target": 0.9, "penalty": "l1"}),
        make(1e-5, sparsity={"target_macs": 0.25, "prune": "taylor"}),
        make(1e-5, sparsity={"prune": "runs/demo"}),
        make(1e-5, sparsity=PUBLISHED),
    )
    assert found == [
        "dense",
        "λ 1e-05",
        "target 0.7",
        "target 0.25 of MACs",
        "target 0.1 of parameters",
        "ℓ1, target 0.9",
        "pruned at once by taylor, target 0.25 of MACs",
        "zeros of runs/demo",
        "published form, λ 1e-05",
    ]


def test_zeros_of_runs_that_differ_in_their_seed_are_of_one_row(make):
    """The source's seed is no option of the row."""
    zeros = [make(0.0, seed=seed, sparsity={"prune": f"runs/l0__seed={seed}"}) for seed in (0, 11)]
    assert names(make(0.0), *zeros, make(0.0, sparsity={"prune": "runs/norm__seed=0"})) == [
        "dense", "zeros of runs/l0__seed=*", "zeros of runs/norm__seed=*"
    ]  # fmt: skip


def test_zeros_of_two_sources_with_the_same_seed_are_two_rows(make):
    zeros = [make(1e-5, seed=0, sparsity={"prune": f"runs/l0__seed={source}"}) for source in (0, 1)]
    assert names(*zeros) == ["zeros of runs/l0__seed=0", "zeros of runs/l0__seed=1"]


def test_tasks_are_named_where_a_row_has_not_all(make):
    found = names(make(0.0), make(0.0, tasks=("depth",)), make(1e-5, tasks=("segmentation",)))
    assert found == ["dense", "depth alone, dense", "segmentation alone, λ 1e-05"]


def test_unusual_options_have_words(make):
    found = names(
        make(1e-5, sparsity={"target": 0.7}, loss={"weighting": "equal"}),
        make(1e-5, sparsity={"target": 0.7, "debias_at": 0.85}, loss={"weighting": "equal"}),
        make(1e-5, sparsity={"target": 0.7}, loss={"weighting": "nash"}),
        make(1e-5, sparsity={"target": 0.7, "fixed_norm": False}, loss={"weighting": "equal"}),
    )
    assert found == [
        "target 0.7, equal",
        "target 0.7, equal, debiased",
        "target 0.7, nash",
        "target 0.7, equal, no fixed norm",
    ]


def test_names_are_short_and_all_differ(make):
    """Of more than three options the rest is counted; rows that would have the same name get all their options."""
    many = {"l2": 0.01, "b1": 0.8, "b2": 0.99, "eps": 1e-6}
    usual = [make(1e-5), make(0.0), make(1e-4), make(1e-3)]
    changed = make(1e-5, optimizer=many)
    assert names(*usual, changed)[-1] == "λ 1e-05, b1 0.8, b2 0.99, eps 1e-06, 1 more"
    found = names(*usual, changed, make(1e-5, optimizer=many | {"l2": 0.02}))
    assert found[-2:] == [f"λ 1e-05, b1 0.8, b2 0.99, eps 1e-06, l2 {value}" for value in (0.01, 0.02)]
    assert len(set(found)) == 6


def test_tables_begin_with_names_or_options(make):
    found = study.read([make(0.0), make(0.0, seed=1), make(1e-5), make(1e-5, seed=1)])
    named, plain = study_tables.summary(found, named=True), study_tables.summary(found)
    assert [line[0] for line in named] == ["row", "dense", "published", "λ 1e-05", "published"]
    assert [line[1:] for line in named] == [line[2:] for line in plain], "the other cells are the same"
    assert {line[0] for line in study_tables.against_dense(found, named=True)[1:]} == {"λ 1e-05"}
