"""Benchmarks at the smallest size: that they measure what they report, not how fast it is."""

import functools
import json
import math
import os
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from benchmarks import compact, compile, fixed_norm, gpu, gpu_table, groups, loader, ours, peers, prox, targets
from benchmarks import options as options_benchmark
from benchmarks import weighting as weighting_benchmark
from benchmarks.zoo import precision
from benchmarks.zoo import table as zoo_table
from mtl_sparse.runtime.timing import timed
from mtl_sparse.sparsity.groups import CoupledGroups


def test_every_operator_prunes_about_half(capsys):
    functions = prox.operators([(1, 1, 64, 8), (3, 3, 32, 4)])
    channels = np.arange(64, dtype=np.int32).reshape(1, 1, 64, 1)
    spanning = CoupledGroups("a", ("a", "b"), (channels, channels), 64, np.full(64, 44.0))
    functions |= prox.coupled_operators([spanning], {"a": (1, 1, 64, 8), "b": (3, 3, 64, 4)})
    for name, function in functions.items():
        if name.startswith(("copy", "pass")):
            continue
        zero = np.concatenate([np.ravel(x == 0) for x in function()])
        assert 0.3 < zero.mean() < 0.7, name
        assert all(jnp.isfinite(x).all() for x in function()), name
    seconds = timed(functions, rounds=2)
    assert all(values.shape == (2,) and (values > 0).all() for values in seconds.values())
    prox.report(seconds, "copy of the three arrays")
    assert capsys.readouterr().out.splitlines()[1].split()[-4:] == ["1.00", "1.00", "..", "1.00"]


@pytest.mark.slow
def test_fixed_norm_probe_and_figure(config):
    config.sparsity.update(lambda_=1.0, warmup_steps=0)
    found = {}
    for variant in ("default", "free_norm_and_regrowth"):
        config.sparsity.update(fixed_norm.VARIANTS[variant][0])
        found["rooms", 1.0, variant] = fixed_norm.measure(config)
    (fixed,), (free,) = (values["rows"] for values in found.values())
    assert fixed["step"] == free["step"] == 4
    np.testing.assert_allclose(fixed["norm"][1:], [1, 1], rtol=1e-4)
    assert free["norm"][1] < 0.99
    assert 0 < fixed["zero"] < 1
    found["rooms", 1.0, "revival_free"] = found["rooms", 1.0, "default"]
    figure = fixed_norm.draw(found)
    assert [len(axis.lines) for axis in figure.axes] == [3, 3, 3, 4]


@pytest.mark.slow
def test_compaction_is_timed_for_each_fraction():
    lines = compact.patterns(32, 1, rounds=2, fractions=(0.6,), depth=18, width=8).splitlines()
    assert [line.split("|")[2].strip() for line in lines[2:]] == ["dense", "compact", "multiple of 4", "4, no gather"]
    ratios = [float(line.split("|")[5].strip()[:-1]) for line in lines[2:]]
    assert ratios[0] == 1 < ratios[3] < ratios[1]
    assert compact.costs(2).mac > 0


SMALL = {"size": 32, "batch": 2, "width": 4, "head_features": 4}
SHALLOW = {**SMALL, "depth": 10, "names": ("depth",)}


@pytest.mark.slow
def test_a_second_start_uses_the_programs_of_the_first(monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")  # the benchmark sets it
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    lines = [line.split("|")[1:-1] for line in compile.table(**SHALLOW).splitlines()[2:]]
    first, second = ([float(seconds) for seconds in line[1:]] for line in lines)
    assert all(start[-1] == pytest.approx(start[1] - start[2], abs=0.11) for start in (first, second))
    assert second[-1] < 0.8 * first[-1]


@pytest.mark.slow
def test_our_step_takes_a_step_and_inference_predicts():
    batch = peers.random_batch(16, 2)
    assert {name: value.shape[:3] for name, value in batch.items()} == dict.fromkeys(batch, (2, 16, 16))
    step = ours.training_step(**SHALLOW)
    before = step.__closure__
    step()
    states = [cell.cell_contents for cell in before if hasattr(cell.cell_contents, "step")]
    assert [int(state.step) for state in states] == [1]
    outputs = ours.inference(**SHALLOW)()
    assert {name: raw.shape for name, raw in outputs.items()} == {"depth": (2, 4, 4, 1)}
    assert ours.macs(32, depth=18) < ours.macs(32) < ours.macs(64) / 3.9


def failing(**settings):
    raise ValueError(f"no such {settings['thing']}")


@pytest.mark.slow
def test_peers_are_timed_in_alternation_in_separate_processes():
    pair = {"ours": ("tests.benchmarks_test", "sleeper", {"seconds": 0.02}),
            "theirs": ("tests.benchmarks_test", "sleeper", {"seconds": 0.1})}  # fmt: skip
    seconds = peers.alternate(pair, 3)
    assert seconds["ours"].shape == (3,) and (seconds["ours"] < seconds["theirs"]).all()
    with pytest.raises(RuntimeError, match="theirs: ValueError: no such thing"):
        peers.alternate({"theirs": ("tests.benchmarks_test", "failing", {"thing": "thing"})}, 1)


@pytest.mark.slow
def test_a_process_can_have_environment_variables_of_its_own(monkeypatch):
    """The function sleeps for as long as the variable says."""
    monkeypatch.setenv("GLIBC_TUNABLES", "")
    monkeypatch.setenv("SECONDS_TO_SLEEP", "0.02")
    pair = {name: ("tests.benchmarks_test", "sleeper_by_variable", {}) for name in ("short", "long")}
    seconds = peers.alternate(pair, 3, variables={"long": {"SECONDS_TO_SLEEP": "0.1"}})
    assert (seconds["short"] < 0.1).all() and (seconds["long"] >= 0.1).all()
    assert os.environ["SECONDS_TO_SLEEP"] == "0.02"


def test_options_are_compared_with_the_chosen_ones(monkeypatch):
    asked = {}

    def alternate(pairs, rounds, *, variables):
        asked.update(pairs=pairs, variables=variables)
        return {name: np.full(rounds, 0.1 if name == options_benchmark.CHOSEN else 0.2) for name in pairs}

    monkeypatch.setattr(peers, "alternate", alternate)
    record = options_benchmark.measure(3, size=32, batch=2)
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in options_benchmark.table(record).splitlines()[2:]
    ]
    assert lines[0] == [options_benchmark.CHOSEN, "100", "1.00", "1.00 .. 1.00"]
    assert (
        all(line[1:] == ["200", "2.00", "2.00 .. 2.00"] for line in lines[1:])
        and len(lines) == len(options_benchmark.ROWS) + 1
    )
    assert asked["variables"][options_benchmark.CHOSEN] == {} and asked["pairs"][options_benchmark.CHOSEN][2] == {
        "size": 32,
        "batch": 2,
    }
    plain = "XLA's convolutions, no taps and no products"
    assert asked["pairs"][plain][2] == {"size": 32, "batch": 2, "plain": True}


@pytest.mark.parametrize("name", ["options", "options_lite"])
def test_the_tables_of_the_options_are_those_of_their_records(name):
    docs = pathlib.Path(__file__).parents[1] / "docs"
    record = json.loads((docs / "benchmarks" / f"{name}.json").read_text())
    assert options_benchmark.table(record).strip() in (docs / "benchmarks.md").read_text()


def test_the_first_call_of_a_turn_is_not_timed():
    (seconds,) = peers.alternate({"ours": ("tests.benchmarks_test", "slow_at_first", {})}, 3).values()
    assert (seconds < 0.3).all()


def slow_at_first():
    """Return a function that is slow in its second, fourth and sixth call, the first ones of three turns."""
    pauses = iter([0, 0.4, 0, 0.4, 0, 0.4, 0])
    return lambda: time.sleep(next(pauses))


def sleeper_by_variable():
    return functools.partial(time.sleep, float(os.environ["SECONDS_TO_SLEEP"]))


def sleeper(*, seconds):
    return functools.partial(time.sleep, seconds)


def test_the_loader_is_timed_on_stored_images(tmp_path):
    rates = loader.images_per_second(32, 12, 2, tmp_path, stored=(48, 64))
    assert rates.shape == (2,) and (rates > 0).all()
    assert list(tmp_path.glob("**/*.array_record*")), "stored, not rendered while they are read"


def test_pytorchs_step_is_the_same_step():
    """Its variants have equal losses on equal weights, and its proximal step equals ours."""
    torch = pytest.importorskip("torch", reason="extra torch")
    from benchmarks import torch_peer
    from mtl_sparse.sparsity import prox as prox_lib

    assert torch_peer.inference(variant="PyTorch, shared", **SMALL)() is None
    losses = [torch_peer.training_step(variant=name, penalty=True, **SMALL)() for name in list(torch_peer.VARIANTS)[:3]]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[2] == pytest.approx(losses[1], rel=2e-2), "dropout draws other pixels there"
    rng = np.random.default_rng(0)
    z = np.linspace(0.02, 0.2, 6)[:, None] * rng.normal(size=(3, 3, 6, 5))
    v = np.exp(rng.normal(-46, 2, (3, 3, 6, 5)))
    kernel = torch.nn.Parameter(torch.from_numpy(z.transpose(3, 2, 0, 1).copy()))
    optimizer = torch.optim.Adam([kernel])
    optimizer.state[kernel] = {
        "exp_avg_sq": torch.from_numpy(v.transpose(3, 2, 0, 1).copy()),
        "step": torch.tensor(1.0, dtype=torch.float64),
    }
    torch_peer.proximal_step([kernel], optimizer)
    with jax.enable_x64(True):
        metric = jnp.sqrt(v / (1 - 0.999)) + torch_peer.EPSILON
        expected = prox_lib.group_lasso(jnp.asarray(z), torch_peer.LEARNING_RATE * torch_peer.LAMBDA * 45**0.5, metric)
    zero = (np.asarray(expected) == 0).all((0, 1, 3))
    assert 0 < zero.sum() < 6
    np.testing.assert_allclose(kernel.detach().numpy().transpose(2, 3, 1, 0), expected, rtol=1e-6, atol=1e-12)


@pytest.mark.slow
def test_a_gpu_part_keeps_a_record_and_is_not_run_again(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_table, "PAGE", tmp_path / "gpu.md")
    gpu.run(["proximal", "step"], gpu.SMALL, tmp_path, seconds=100)  # a step does not fit
    assert [path.name for path in tmp_path.iterdir()] == ["proximal.json"]
    record = json.loads((tmp_path / "proximal.json").read_text())
    assert all(len(seconds) == gpu.SMALL.rounds for seconds in record["seconds"].values())
    assert record["model"] == dict(gpu.SMALL.model) and record["device"] == jax.devices()[0].device_kind
    gpu.run(["proximal"], gpu.SMALL, tmp_path, seconds=100)
    assert json.loads((tmp_path / "proximal.json").read_text()) == record
    gpu_table.write(tmp_path, list(gpu.PARTS))
    page = (tmp_path / "gpu.md").read_text()
    assert gpu_table._ratio([2, 2], of=[1, 1]) == "0.50 (0.50 .. 0.50)"
    assert "| group_lasso, adaptive" in page and "No record yet: parity, equality, demo, step" in page


@pytest.mark.slow
def test_gpu_checks_compare_what_they_name():
    rows = {row["run"]: row for row in gpu.parity(gpu.SMALL)["rows"]}
    assert max(rows["GPU, float32"]["loss_difference"]) < 1e-5 and len(rows["CPU, float32"]["losses"]) == 3
    losses = rows["CPU, float32"]["losses"]
    assert losses[0] != losses[-1], "the steps train"
    assert all(row["difference"] < 1e-5 for row in gpu.equality(gpu.SMALL)["rows"])
    assert gpu._largest({"depth": np.array([1.0, 2.0])}, {"depth": np.array([1.0, 4.0])}) == 0.5
    shares = {row["rate"]: row["share"] for row in gpu.convolutions(gpu.SMALL)["rows"]}
    assert shares == {4: pytest.approx(4 / 9), 7: pytest.approx((1 + 2 * 1 / 8) ** 2 / 9)}


@pytest.mark.slow
def test_peers_that_start_together_leave_a_failed_one_out():
    pair = {"ours": ("tests.benchmarks_test", "sleeper", {"seconds": 0.02}),
            "theirs": ("tests.benchmarks_test", "failing", {"thing": "thing"})}  # fmt: skip
    seconds = peers.alternate(pair, 2, together=True)
    assert list(seconds) == ["ours"] and seconds["ours"].shape == (2,)
    with pytest.raises(RuntimeError, match="all functions failed"):
        peers.alternate({"theirs": pair["theirs"]}, 1, together=True)


def finished_run(folder, seed, miou, mae, macs, **sparsity):
    """Write the results of a run as the sweep of groups leaves them."""
    results = {
        "test": {"segmentation/miou": miou, "depth/mae": mae},
        "constant": {},
        "headlines": {
            "segmentation": {"metric": "segmentation/miou", "higher_is_better": True},
            "depth": {"metric": "depth/mae", "higher_is_better": False},
        },
        "sparsity": {
            "group": 0.5, "parameter": 0.6, "weight": 0.7, "lambda": 1e-4, "target": 0.0, "penalty": "group_lasso",
            "dead_layers": [], "dead_blocks": [], "layers": [],
        },
        "size": {"trained": {"parameters": 100, "macs": 1000}, "compact": {"parameters": 20, "macs": macs}},
        "step": 1, "seed": seed, "frames": {}, "versions": {}, "device": "cpu",
        "config": {
            "model": {"backbone": "resnet", "depth": 18, "width": 32},
            "sparsity": {
                "lambda_": 1e-4, "groups": "input", "group_weights": "sqrt_size", "target_macs": 0.25, **sparsity
            },
        },
    }  # fmt: skip
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps({"version": 1, **results}))


def test_forms_of_groups_are_compared_with_the_dense_run_of_their_seed(tmp_path):
    for seed in (0, 1):
        finished_run(tmp_path / f"dense{seed}", seed, 0.5, 0.1 * (1 + seed), 1000, lambda_=0.0)
        finished_run(tmp_path / f"input{seed}", seed, 0.4, 0.1 * (1 + seed), 250)
    finished_run(tmp_path / "more", 2, 0.1, 0.1, 1000, lambda_=0.0)  # of a seed that no other row has finished
    finished_run(tmp_path / "coupled", 0, 0.5, 0.05, 200, groups="coupled", group_weights="macs")
    folders = groups.finished(tmp_path)
    assert {name: list(its) for name, its in folders.items()} == {
        "dense": [0, 1, 2], "input groups, by size": [0, 1], "coupled groups, by MACs": [0]
    }  # fmt: skip
    rows = {row["form"]: row for row in groups.summary(groups.finished(tmp_path))}
    np.testing.assert_allclose(rows["input groups, by size"]["delta_m"], [-10, -10])
    times = {name: {"batch 1": {"speedup": 3.0 if name != "dense" else 1.0, "median_ms": 1.0}} for name in rows}
    assert groups.timed_seed(groups.finished(tmp_path)) == 0
    first, second, third = groups.table(list(rows.values()), times).splitlines()[2:]
    assert "| dense" in first and "| 3.00 (0.75)" in third and "25.0 ± 0.0 %" in third
    assert "| -10.0 " in third and "| 2 " in third and "| 1 " in second and "| +25.0 " in second
    finished_run(tmp_path / "alone", 7, 0.4, 0.1, 250, groups="coupled")
    with pytest.raises(SystemExit, match="missing for coupled groups, by size;"):
        groups.finished(tmp_path)


@pytest.mark.parametrize(
    ("name", "page", "forms", "best"),
    [
        ("pretrained", "baselines", 3, "ℓ0, weighted alike"),
        ("pretrained_1e-3", "baselines", 9, "weighted alike, no fixed"),
        ("groups_cpu", "groups", 5, "coupled groups, by size"),
    ],
)
def test_the_tables_of_ways_to_prune_are_those_of_their_records(name, page, forms, best):
    docs = pathlib.Path(__file__).parents[1] / "docs"
    folders = groups.finished(docs / "results" / name)
    rows, text = groups.summary(folders), (docs / f"{page}.md").read_text()
    assert sorted(row["seeds"] for row in rows) == ([[0]] if name == "pretrained" else []) + [[0, 1, 2]] * forms
    record = docs / "benchmarks" / f"{name}.json"
    times = json.loads(record.read_text())["times"] if record.exists() else {form: {} for form in folders}
    assert groups.table(rows, times) in text
    assert groups.behind_best(rows) in text
    first = groups.behind_best(rows).splitlines()[0]
    assert best in first


def test_a_row_is_compared_with_the_best_one_seed_by_seed():
    rows = [
        {"form": "dense", "seeds": [0, 1], "delta_m": [0.0, 0.0]},
        {"form": "a", "seeds": [0, 1], "delta_m": [-5.0, -7.0]},
        {"form": "b", "seeds": [0, 1, 2], "delta_m": [-1.0, -2.0, -3.0]},
        {"form": "c", "seeds": [2], "delta_m": [4.0]},
        {"form": "d", "seeds": [0, 1, 2], "delta_m": [9.0, 9.0, math.nan]},
    ]
    head, _, *lines = groups.behind_best(rows).splitlines()
    assert "behind: b " in head
    assert [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines] == [
        ["c", "1", "-7.0"],
        ["a", "2", "+4.5 (-1.9 to +10.9)"],
    ]


def test_a_record_is_drawn_against_macs_and_milliseconds(tmp_path, monkeypatch):
    rows = [
        {"form": "ours", "seeds": [0, 1], "delta_m": [-1.0, -3.0], "macs_left": [0.2, 0.3]},
        {"form": "dense", "seeds": [0], "delta_m": [0.0], "macs_left": [1.0]},
    ]
    times = {"dense": {"batch 8": {"median_ms": 90.0}}, "ours": {"batch 8": {"median_ms": 30.0}}}
    (tmp_path / "record.json").write_text(json.dumps({"rows": rows, "times": times}))
    drawn = []
    monkeypatch.setattr(groups.plots, "save", lambda figure, path: drawn.append(figure) or path)
    assert groups.draw(tmp_path / "record.json") == tmp_path / "record.png"
    points = [
        [tuple(map(float, line.get_xydata()[0])) for line in axis.lines if line.get_marker() == "o"]
        for axis in drawn[0].axes
    ]
    assert points == [[(100.0, 0.0), (25.0, -2.0)], [(90.0, 0.0), (30.0, -2.0)]]
    assert [[bars.has_yerr for bars in axis.containers] for axis in drawn[0].axes] == [[False, True]] * 2
    assert [axis.get_xlabel() for axis in drawn[0].axes] == ["% of the dense model's MACs left", "ms per batch of 8"]


def test_the_tables_of_the_pilot_runs_are_those_of_their_record():
    docs = pathlib.Path(__file__).parents[1] / "docs"
    rows = json.loads((docs / "benchmarks" / "pretrained_pilot.json").read_text())["rows"]
    notes = (docs / "engineering_notes.md").read_text()
    signs = {"segmentation/miou": 1, "depth/mae_normalized": -1, "normals/cosine": 1}
    base = next(row for row in rows if row["name"] == "dense, learning rate 2e-3")
    for row in rows:
        line = f"| {row['name']} | {' | '.join(f'{row[name][-1]:.4f}' for name in signs)} "
        line += f"| {100 * row['macs_left'][-1]:.1f} % |"
        assert line in notes
        if "score" in row:
            gains = [sign * (row[name][-1] / base[name][-1] - 1) for name, sign in signs.items()]
            gain = f"{100 * np.mean(gains):+.1f}" if row is not base else ""
            assert f"{line} {gain} | {min(row['score']):.4f} |" in notes
    by_name = {row["name"]: row["groups_left"] for row in rows}
    for stream in ("block4_1/expand", "block5_1/expand", "block6_1/expand"):
        for name in ("one-shot pruning by Taylor importance", "group lasso"):
            assert by_name[name][stream][0] == by_name[name][stream][1]


def test_the_interval_of_delta_m_is_students():
    values = [-3.0, -1.0, 1.0]
    low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert groups.with_interval(values) == f"-1.0 ({low:+.1f} to {high:+.1f})"


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"lambda_": 0.0, "prune": "taylor", "groups": "coupled"}, "coupled groups, pruned at once by taylor"),
        ({"prune": "runs/demo", "target_macs": 0.0}, "input groups, zeros of a pruned run from the start"),
        ({"lambda_": 1e-12, "target_macs": 0.0}, "lambda 1e-12"),
        ({"target_macs": 0.1, "group_weights": "macs"}, "input groups, by MACs, 10 % of the MACs"),
        ({"group_weights": "none", "debias_at": 0.5}, "input groups, weighted alike, debiased"),
        ({"metric": "group"}, "input groups, by size, group metric"),
        ({"penalty": "group_l0", "metric": "fisher"}, "input groups, ℓ0, by size, fisher metric"),
        ({"fixed_norm": False, "debias_at": 0.5}, "input groups, by size, no fixed norm, debiased"),
        ({"norm": "rms", "debias_at": 0.5}, "input groups, by size, rms norm, debiased"),
    ],
)
def test_other_ways_to_prune_are_named(tmp_path, options, name):
    finished_run(tmp_path / "dense", 0, 0.5, 0.1, 1000, lambda_=0.0)
    finished_run(tmp_path / "other", 0, 0.4, 0.1, 250, **options)
    assert list(groups.finished(tmp_path)) == ["dense", name]


def test_a_narrower_dense_model_is_another_row_and_single_tasks_are_none(tmp_path):
    for name, width, tasks in (("dense", 32, 2), ("narrow", 16, 2), ("single", 32, 1)):
        finished_run(tmp_path / name, 0, 0.5, 0.1, 1000, lambda_=0.0)
        results = json.loads((tmp_path / name / "results.json").read_text())
        results["config"]["model"]["width"] = width
        results["headlines"] = dict(list(results["headlines"].items())[:tasks])
        (tmp_path / name / "results.json").write_text(json.dumps(results))
    assert list(groups.finished(tmp_path)) == ["dense", "dense, width 16"]


def test_a_target_is_compared_with_what_was_reached(tmp_path, capsys):
    finished_run(tmp_path / "groups", 0, 0.4, 0.1, 250, target=0.7, target_macs=0.0)
    finished_run(tmp_path / "macs", 0, 0.4, 0.1, 260, groups="coupled", target=0.0, target_macs=0.25)
    finished_run(tmp_path / "params", 0, 0.4, 0.1, 250, target=0.0, target_macs=0.0, target_params=0.15)
    targets.main(str(tmp_path), str(tmp_path / "record.json"))
    assert [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[2:]] == [
        ["ResNet-18", "coupled", "MACs left", "25 %", "26.0 %", "+1.0"],
        ["ResNet-18", "input", "parameters left", "15 %", "20.0 %", "+5.0"],
        ["ResNet-18", "input", "zero groups", "70 %", "50.0 %", "-20.0"],
    ]
    assert [row["reached"] for row in json.loads((tmp_path / "record.json").read_text())["rows"]] == [0.26, 0.2, 0.5]


def test_runs_without_a_compact_model_are_named_and_left_out(tmp_path, capsys):
    finished_run(tmp_path / "dense", 0, 0.5, 0.1, 1000, lambda_=0.0)
    finished_run(tmp_path / "macs", 0, 0.4, 0.1, 250)
    finished_run(tmp_path / "dead", 0, 0.4, 0.1, 100, groups="coupled")
    results = json.loads((tmp_path / "dead" / "results.json").read_text())
    del results["size"]
    (tmp_path / "dead" / "results.json").write_text(json.dumps(results))
    assert len(groups.finished(tmp_path)) == 2
    assert str(tmp_path / "dead") in capsys.readouterr().out
    targets.main(str(tmp_path), "")
    out = capsys.readouterr().out
    assert str(tmp_path / "dead") in out and "coupled" not in out


def test_the_least_of_a_target_is_of_each_network_and_kind_of_groups(monkeypatch):
    monkeypatch.setattr(targets.groups, "least", lambda config: {"macs": config.model.depth / 100, "parameters": 0.5})
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in targets.least().splitlines()[2:]]
    assert lines[:3] == [
        ["ResNet-18", "input", "18.0 %", "50.0 %"],
        ["ResNet-18", "coupled", "18.0 %", "50.0 %"],
        ["ResNet-50", "input", "50.0 %", "50.0 %"],
    ]
    assert [line[1] for line in lines if line[0] == "efficientnet_lite0"] == ["input", "coupled"]


@pytest.mark.parametrize(
    ("difference", "rounding", "equal"),
    [(1e-11, 0.0, True), (1e-9, 1e-12, False), (1e-9, 1e-9, True), (1e-3, 1.0, False), (math.inf, math.inf, False)],
)
def test_the_zoo_compares_with_the_models_own_rounding(difference, rounding, equal):
    """Without a limit, a model without a signal, or one that is chaos, would be equal to anything."""
    part = {"against signal": difference, "own rounding": rounding, "output": "float64"}
    assert (zoo_table.problem({"patterns": {"70 %": {"float64": part}}}, "70 %") == "") == equal


@pytest.mark.parametrize(
    ("moved", "computed", "equal"), [(0.0, 0.0, False), (1e-3, 0.0, True), (0.0, 1e-3, True), (1e-4, 1e-4, False)]
)
def test_in_float32_either_measure_of_the_models_own_rounding_counts(moved, computed, equal):
    part = {"against signal": 3e-3, "own rounding": moved, "output": "float32"}
    double = {"against signal": 0.0, "rounding": computed, "output": "float64"}
    found = zoo_table.problem({"patterns": {"50 %": {"float32": part, "float64": double}}}, "50 %")
    assert found == (
        "" if equal else "float32: differs by 0.003" + (moved > 0) * " (the full model's own rounding: 0.0001)"
    )


@pytest.mark.parametrize(
    ("padding", "stride", "dilation", "parts", "inputs", "outputs", "layout"),
    [
        ("SAME", 1, 1, 1, 3, 5, ("NHWC", "HWIO", "NHWC")),
        ("SAME", 2, 1, 2, 4, 6, ("NCHW", "OIHW", "NHWC")),
        ("VALID", 1, 2, 4, 4, 8, ("NHWC", "HWIO", "NCHW")),
        ("VALID", 3, 2, 6, 6, 6, ("NHWC", "HWIO", "NHWC")),
        ([(0, 2), (-1, 3)], 2, 1, 6, 6, 6, ("NCHW", "OIHW", "NCHW")),
        ([(0, 2), (-1, 3)], 1, 2, 1, 3, 5, ("NCHW", "OIHW", "NCHW")),
    ],
)
def test_the_zoos_convolutions_in_float64_are_xlas(padding, stride, dilation, parts, inputs, outputs, layout):
    rng = np.random.default_rng(0)
    sizes = {"N": 2, "C": inputs, "H": 9, "W": 8}, {"I": inputs // parts, "O": outputs, "H": 3, "W": 2}
    x, w = (rng.normal(size=[size[axis] for axis in axes]) for size, axes in zip(sizes, layout, strict=False))

    def convolve(kernel, images):
        return jax.lax.conv_general_dilated(
            images, kernel, (stride, stride), padding, rhs_dilation=(dilation, dilation), dimension_numbers=layout,
            feature_group_count=parts,
        )  # fmt: skip

    with jax.enable_x64(True):
        found, want = precision.fast(convolve)(w, x), convolve(w, x)
        assert "conv_general_dilated" not in str(jax.make_jaxpr(precision.fast(convolve))(w, x))
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, want, rtol=1e-12, atol=1e-12)


def test_the_zoos_convolutions_keep_casts_and_constants_in_float32():
    """A compact function that loses precision must not gain it in the comparison."""
    third = np.array([1 / 3], np.float32)
    with jax.enable_x64(True):
        x = jnp.asarray([1 / 3])
        cast = precision.fast(lambda _, x: jax.jit(lambda y: y.astype(jnp.float32))(x).astype(jnp.float64))({}, x)
        assert cast == np.float64(third) != x
        constant = jnp.asarray(third)
        product = precision.fast(lambda _, x: x + jnp.multiply(constant, constant).astype(jnp.float64))({}, 0 * x)
        assert product == np.float64(third * third) != np.float64(third) ** 2


def test_two_runs_that_would_be_the_same_row_are_refused(tmp_path):
    for name, target in (("half", 0.5), ("most", 0.7)):
        finished_run(tmp_path / name, 0, 0.4, 0.1, 250, target=target, target_macs=0.0)
    with pytest.raises(SystemExit, match=f"seed 0, got {tmp_path / 'half'} and {tmp_path / 'most'}"):
        groups.finished(tmp_path)


def test_a_sweep_without_a_dense_run_is_refused(tmp_path):
    finished_run(tmp_path / "input", 0, 0.4, 0.1, 250)
    with pytest.raises(SystemExit, match="with a dense one"):
        groups.finished(tmp_path)


def test_weightings_are_timed_against_equal_weights(monkeypatch):
    """Steps that only sleep: the second variant takes three times as long as the first."""
    made = []

    def training_step(*, loss, size):
        made.append((loss, size))
        return functools.partial(time.sleep, 0.05 if loss["weighting"] == "equal" else 0.15)

    monkeypatch.setattr(ours, "training_step", training_step)
    rows = weighting_benchmark.measure([("equal", "-"), ("mgda", "features")], 3, size=32)
    assert made == [({"weighting": "equal"}, 32), ({"weighting": "mgda", "gradients_of": "features"}, 32)]
    assert rows[0]["ratio"] == 1 and rows[1]["ratio"] == pytest.approx(3, rel=0.2)
    assert rows[1]["median_ms"] == pytest.approx(150, rel=0.2)
    assert "| mgda      | features     |" in weighting_benchmark.table(rows)
    names = weighting_benchmark.variants()
    assert names[0] == ("equal", "-") and len(names) == 11 + 2 * 9
