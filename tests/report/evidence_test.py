"""The figures in docs/results.md and docs/engineering_notes.md are those of the results in docs/results."""

import dataclasses
import json
import pathlib

import pytest

from configs import nyu_cpu, sweeps
from mtl_sparse.report import published, schema, study, study_tables
from mtl_sparse.sparsity import control
from mtl_sparse.training import folder as folder_lib

DOCS = pathlib.Path(__file__).parents[2] / "docs"
RESULTS = DOCS / "results"
PILOT = ("dense", "t70", "fixed", "free", "none", "ramp7", "dense16", "t70_16")
TEXT = " ".join((DOCS / "results.md").read_text().split())


def read(*names):
    return study.read([RESULTS / name for name in names])


def early():
    """Return the runs whose penalty acts from the first step."""
    return read(*(f"early/{folder.name}" for folder in sorted((RESULTS / "early").iterdir())))


def row(found, **settings):
    """Return the one row on all three tasks with these options of sparsity."""
    rows = [row for row in found.rows if len(row.tasks) == 3 and not row.config["optimizer"]["l2"]]
    (one,) = [row for row in rows if all(row.config["sparsity"][name] == value for name, value in settings.items())]
    return one


DENSE, T70 = {"lambda_": 0.0}, {"target": 0.7, "debias_at": 0.0, "penalty": "group_lasso"}


NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}


def of_seeds(row, seeds):
    """Return the row with its runs of these seeds only."""
    return dataclasses.replace(row, runs={seed: run for seed, run in row.runs.items() if seed in seeds})


# Options of configs/nyu_cpu.py when the runs were made, where they differ now.
AS_RECORDED = {
    "data.split": "",
    "sparsity.keep_connected": False,
    "sparsity.start_at": 0.0,
    "sparsity.start_step": 534,
    "sparsity.warmup": 0.0,
    "sparsity.warmup_steps": 100,
}


def acting(settings):
    """Return a trial's options without those that start the penalty at once, in steps or as a fraction."""
    at_once = ("sparsity.start_at", "sparsity.start_step", "sparsity.warmup", "sparsity.warmup_steps")
    return json.loads(json.dumps({name: value for name, value in settings.items() if value or name not in at_once}))


def gains(rows):
    return [rows[0], *(cells for cells in rows if "Δm %" in cells)]


@pytest.mark.parametrize(
    ("names", "make"),
    [
        (PILOT, study_tables.summary),
        (PILOT, study_tables.against_dense),
        (("evidence",), study_tables.summary),
        (("evidence",), lambda found: gains(study_tables.against_dense(found))),
        (("evidence",), lambda found: gains(study_tables.against_first(found))),
        (("evidence",), study_tables.speed),
    ],
)
def test_every_table_follows_from_the_results(names, make):
    rows = make(read(*(f"pilot/{name}" if names is PILOT else name for name in names)))
    assert len(rows) > 1
    page = "engineering_notes.md" if names is PILOT else "results.md"
    assert study_tables.to_markdown(rows) in (DOCS / page).read_text()


def test_the_results_are_those_of_the_sweep(tmp_path):
    """Each has its trial's name and options, and the published split."""
    trials = sweeps.trials("evidence:cpu")
    listed = schema.Sweep.read(RESULTS / "evidence" / "sweep.json").trials
    assert [acting(settings) for settings in listed.values()] == [acting(settings) for settings in trials]
    runs = {folder.name: folder for folder in (RESULTS / "evidence").iterdir() if folder.is_dir()}
    assert runs.keys() <= listed.keys()
    for name, folder in runs.items():
        config = nyu_cpu.get_config()
        config.update_from_flattened_dict(AS_RECORDED | listed[name])
        results = schema.Results.read(folder / "results.json")
        (tmp_path / "config.json").write_text(json.dumps(results.config))
        folder_lib.check_settings(tmp_path, config)
        assert results.frames == {"train": 715, "validation": 80, "test": 654}


def test_the_text_on_target_07():
    found = read("evidence")
    gain, t70 = study.compare_gain(row(found, **T70), row(found, **DENSE)), row(found, **T70)
    assert f"Δm of {gain.mean:+.2f} % (95 % interval {gain.low:+.2f} to {gain.high:+.2f})" in TEXT
    assert gain.low < 0 < gain.high, "no difference to be seen"
    assert f"that {NUMBERS[gain.n]} seeds could show" in TEXT and f"any of {NUMBERS[gain.n]} seeds" in TEXT
    zero = t70.sparsity("group")
    assert f"{100 * zero.mean:.1f} % of the backbone's groups zero" in TEXT
    assert all(abs(run.sparsity.group - 0.7) < 0.01 for run in t70.runs.values())
    for run in t70.runs.values():
        left = {stage: 1 - zero_fraction(run, stage) for stage in ("stem", "layer1", "layer4")}
        assert left["stem"] == 1 and left["layer1"] > 0.97 and round(100 * left["layer4"]) in (6, 7, 8)


def test_the_text_on_groups_weighted_alike():
    (alike,) = read("pilot/none").rows
    (run,) = alike.runs.values()
    left = {stage: 1 - zero_fraction(run, stage) for stage in ("layer1", "layer4")}
    assert f"{100 * left['layer4']:.0f} % of the last stage stay and {100 * left['layer1']:.0f} % of the first" in TEXT
    assert alike.config["sparsity"]["group_weights"] == "none"


def test_the_text_on_other_targets():
    found = read("evidence")
    half, most = (row(found, target=target, debias_at=0.0, penalty="group_lasso") for target in (0.5, 0.9))
    gains = [study.compare_gain(one, row(found, **DENSE)) for one in (half, most)]
    said = [f"{gain.mean:+.1f} % ({gain.low:+.1f} to {gain.high:+.1f}) at target" for gain in gains]
    assert f"Δm over dense is {said[0]} 0.5, and {said[1]} 0.9" in TEXT
    for task, sign in (("segmentation", 1), ("depth", -1), ("normals", 1)):
        assert sign * study.compare(most, row(found, **DENSE), task).mean < 0
    assert gains[0].low < 0 < gains[0].high and gains[1].high < 0


def said(gain):
    return f"{gain.mean:+.1f} % ({gain.low:+.1f} to {gain.high:+.1f})"


def test_the_text_on_the_debiasing_phase():
    found = read("evidence")
    gains = {t: study.compare_gain(row(found, target=t, debias_at=0.85), row(found, **DENSE)) for t in (0.5, 0.7, 0.9)}
    text = ", ".join(f"{said(gain)} at target {target}" for target, gain in gains.items())
    assert f"Δm over dense is {text}" in TEXT
    for target in (0.5, 0.7, 0.9):
        with_it, without = (row(found, target=target, debias_at=at, penalty="group_lasso") for at in (0.85, 0.0))
        change = study.compare_gain(with_it, without)
        assert change.low < 0 < change.high, target


def test_the_text_on_l1():
    found = read("evidence")
    l1, t70 = row(found, penalty="l1"), row(found, **T70)
    assert f"With {100 * l1.sparsity('parameter').mean:.0f} % of the weights zero" in TEXT
    assert abs(l1.sparsity("parameter").mean - t70.sparsity("parameter").mean) < 0.01, "as many as there"
    assert all(run.sparsity.group == 0 for run in l1.runs.values()), "not one group"
    assert f"its Δm over dense is {said(study.compare_gain(l1, row(found, **DENSE)))}" in TEXT


def test_the_text_on_lambda_as_published():
    found = read("evidence")
    for lambda_ in (1e-6, 1e-5):
        published_form = row(found, lambda_=lambda_, bias_correction=False)
        zero = published_form.sparsity("group")
        gain = study.compare_gain(published_form, row(found, **DENSE))
        start = f"λ = {lambda_:.0e}" if lambda_ == 1e-6 else f"at {lambda_:.0e}"
        rest = f"{100 * zero.mean:.1f} % {'of the groups ' if lambda_ == 1e-6 else ''}are zero and Δm is {said(gain)}"
        assert f"{start}, {rest}".replace("e-0", "e-") in TEXT
    assert f"ours is {gain.mean:.1f} % ahead with {100 * zero.mean:.0f} % zero" in TEXT
    assert f"than dense (p {gain.p:.3f}, one of" in TEXT and gain.low > 0


def zero_fraction(run, stage):
    """Return the fraction of a stage's groups that are zero."""
    layers = [layer for layer in run.sparsity.layers if layer.path.startswith(f"backbone/{stage}_")]
    return sum(layer.zero_groups for layer in layers) / sum(layer.groups for layer in layers)


def test_the_text_on_the_compact_models():
    found, differences = read("evidence"), []
    for one in found.rows:
        for seed, folder in one.folders.items():
            if (folder / "compact").exists():
                compact = schema.Results.read(folder / "compact" / "results.json").test
                assert compact.keys() == one.runs[seed].test.keys()
                differences.append(max(abs(compact[name] - value) for name, value in one.runs[seed].test.items()))
    assert len(differences) == 12 and "test metrics of these twelve models differ by at most 8.5e-06" in TEXT
    assert 8.4e-6 < max(differences) < 8.5e-6
    cells = {batch: speedup for _, changes, batch, _, speedup, *_ in study_tables.speed(found)[1:] if "0.7" in changes}
    one, eight = (f"{float(cells[batch].split()[0]):.1f}" for batch in "18")
    assert f"its backbone is {one} times as fast at batch 1, {eight} times at batch 8" in TEXT


def test_the_text_on_both_dense_models_and_of_the_paper():
    found = read("evidence")
    (paper,) = [row for row in found.rows if row.config["optimizer"]["l2"] and len(row.tasks) == 3]
    for base, ours in ((row(found, **DENSE), paper), (paper, row(found, **T70))):
        gain = study.compare_gain(ours, base)
        assert f"{gain.mean:+.1f} % ({gain.low:+.1f} to {gain.high:+.1f})" in TEXT
    normals = study.compare(paper, row(found, **DENSE), "normals")
    assert f"are normals (CS {normals.mean:+.4f}, {normals.low:+.4f} to {normals.high:+.4f})" in TEXT
    for task in row(found, **DENSE).tasks:
        assert study.compare(paper, row(found, **DENSE), task).p >= normals.p > 0.05
    tasks = ("segmentation", "depth", "normals")
    rows = [published.TABLES["nyud_mt", frozenset(tasks), "group_lasso", lambda_] for lambda_ in (0.0, 1e-6, 1e-5)]
    for lambda_, one in zip(("0", "1e-6", "1e-5"), rows, strict=True):
        signs = {"segmentation": 1, "depth": -1, "normals": 1}
        better = [signs[task] * (one.tasks[task][0] / rows[0].tasks[task][0] - 1) for task in tasks]
        cells = [f"{one.tasks[task][0]:.4f}" for task in tasks]
        cells += [f"{100 * one.group:.2f}", f"{100 * sum(better) / 3:+.1f}" if any(better) else ""]
        assert f"| paper, λ = {lambda_} | {' | '.join(cells)} |".replace("|  |", "| |") in TEXT


def test_the_text_on_when_the_penalty_starts():
    late, soon = row(read("evidence"), **T70), row(early(), **T70)
    gain = study.compare_gain(late, soon)
    assert f"{gain.mean:+.1f} % ({gain.low:+.1f} to {gain.high:+.1f})" in TEXT
    config = soon.config
    schedule = control.Target(0.7, 20 * (715 // config["train"]["batch_size"]), config["sparsity"]["target_ramp"])
    asked = 100 * float(schedule.scheduled(schedule.total_steps * 4 / 20))
    assert config["train"]["epochs"] == 20 and f"asks for {asked:.0f} % zero groups after four of twenty epochs" in TEXT
    fresh = set(late.runs) - set(soon.runs)
    unseen = study.compare_gain(of_seeds(late, fresh), of_seeds(row(read("evidence"), **DENSE), fresh))
    interval = f" ({unseen.low:+.1f} to {unseen.high:+.1f})"
    assert f"On the {NUMBERS[unseen.n]} seeds that took no part in the choice" in TEXT
    assert f"the Δm over dense is {unseen.mean:+.1f} %{interval}" in TEXT
    behind = study.compare_gain(soon, row(read("evidence"), **DENSE))
    assert f"{behind.mean:+.1f} % ({behind.low:+.1f} to {behind.high:+.1f})" in TEXT
    for seed, theirs in soon.runs.items():
        ours = late.runs[seed]
        assert ours.config["sparsity"].items() - theirs.config["sparsity"].items() == {
            ("start_step", 534),
            ("target_ramp", 0.45),
        }


def test_the_text_on_single_tasks():
    found = read("evidence")
    dense, t70 = (found.gain(row(found, **settings)).mean for settings in (DENSE, T70))
    assert f"{dense:.1f}" == f"{t70:.1f}" and f"is {dense:.1f} % both for the dense model and at target 0.7" in TEXT
    alone = {one.tasks[0]: one for one in found.rows if len(one.tasks) == 1}
    for task, sign in (("depth", -1), ("normals", 1)):
        assert sign * row(found, **DENSE).figure(task).mean > sign * alone[task].figure(task).mean
    level = study.compare(row(found, **DENSE), alone["segmentation"], "segmentation")
    assert level.low < 0 < level.high


def test_the_text_on_fixed_norms():
    found = read("evidence")
    gain = study.compare_gain(row(found, lambda_=sweeps.NORMS_HELD), row(found, **DENSE))
    assert f"{gain.mean:+.1f} % ({gain.low:+.1f} to {gain.high:+.1f}) over dense, {NUMBERS[gain.n]} seeds." in TEXT
    gain = study.compare_gain(row(found, **T70), row(found, lambda_=sweeps.NORMS_HELD))
    said = f"{gain.mean:+.1f} % ({gain.low:+.1f} to {gain.high:+.1f}) over that row, {NUMBERS[gain.n]} seeds"
    assert TEXT.count(said) == 1


def test_the_table_of_fixed_and_free_norms():
    page = (DOCS / "fixed_norm.md").read_text()
    found = {}
    for fixed, name in ((True, "initial norm (default)"), (False, "no fixed norm")):
        runs = [
            schema.Results.read(DOCS / f"results/norms/fixed_norm={fixed}__seed={seed}/results.json") for seed in (0, 1)
        ]
        assert [(run.config["sparsity"]["fixed_norm"], run.seed) for run in runs] == [(fixed, 0), (fixed, 1)]
        metrics = ("segmentation/miou", "depth/mae_normalized", "normals/cosine")
        cells = [", ".join(f"{run.test[metric]:.4f}" for run in runs) for metric in metrics]
        left = ", ".join(f"{100 * run.size.compact.macs / run.size.trained.macs:.1f} %" for run in runs)
        assert f"| {name} | {' | '.join(cells)} | {left} |" in page
        found[fixed] = [[run.test[metric] for run in runs] for metric in metrics]
    (miou, mae, cosine), (free_miou, free_mae, free_cosine) = found[True], found[False]
    assert min(miou) > max(free_miou) and max(mae) < min(free_mae)
    assert all(fixed > free for fixed, free in zip(cosine, free_cosine, strict=True))
