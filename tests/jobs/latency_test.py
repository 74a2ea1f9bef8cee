"""`--job=latency`: random zeros that leave the MACs that were asked for, and a line that predicts times."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import demo
from mtl_sparse import tasks
from mtl_sparse.compaction import rewritten
from mtl_sparse.jobs import latency
from mtl_sparse.models import costs
from mtl_sparse.report import schema
from mtl_sparse.training import groups, setup
from tests.conftest import raises


@pytest.fixture
def config():
    found = demo.get_config()
    found.data.size = (32, 48)
    found.data.embedded.update(frames=24, height=32, width=48)
    found.model.update(width=8, head_features=4)
    found.benchmark.update(batch_sizes=(1, 2), rounds=2)
    return found


def timed(times, batch=4):
    """Return a record of models that take these parts of the dense model's time, by (pattern, MACs left)."""
    rows = [schema.PatternTiming(pattern, batch, left, 10 * time, time) for (pattern, left), time in times.items()]
    return schema.Latency("cpu", (32, 48), 2, "input", tuple(rows))


TIMES = {("dense", 1.0): 1.0, ("even", 0.75): 0.9, ("uneven", 0.5): 0.8, ("even", 0.5): 0.6, ("even", 0.25): 0.5}


def test_times_are_interpolated_between_the_dense_and_the_even_models():
    found = timed(TIMES)
    assert [found.time_left(4, left) for left in (1.0, 0.75, 0.625, 0.25)] == pytest.approx([1.0, 0.9, 0.75, 0.5])
    assert [found.macs_left(4, time) for time in (1.0, 0.75, 0.55, 0.5)] == pytest.approx([1.0, 0.625, 0.375, 0.25])
    assert np.isnan(found.macs_left(4, 0.49)), "no model was so fast"
    assert found.errors(4) == pytest.approx([0.6 / 0.8 - 1])


def test_a_smaller_model_is_never_predicted_to_be_slower():
    found = timed({**TIMES, ("even", 0.25): 0.7})
    assert found.time_left(4, 0.25) == pytest.approx(0.6)
    assert all(found.macs_left(4, found.time_left(4, left)) >= left - 1e-9 for left in (0.3, 0.5, 0.6, 0.9))


def test_a_target_is_given_only_where_models_were_timed():
    text = latency.text(timed(TIMES))
    assert "| 75 %                    | 0.62" in text and "| 50 %                    | 0.25" in text
    assert "| 33 %                    | below 0.25" in text and "off by at most 25 % at batch 4" in text
    assert "no uneven model" in latency.text(timed({key: TIMES[key] for key in TIMES if key[0] != "uneven"}))


@pytest.mark.parametrize(("kind", "pattern"), [("input", schema.UNEVEN), ("coupled", schema.EVEN)])
@pytest.mark.slow
def test_the_zeros_leave_what_was_asked_for(config, kind, pattern):
    config.sparsity.groups = kind
    model = rewritten.build(config.model, tasks.resolve(config))
    variables = model.init(jax.random.key(0), jnp.zeros((1, 32, 48, 3)))
    params, left = latency._zeroed(config, variables["params"], 0.5, pattern, 3)
    assert left == pytest.approx(0.5, abs=0.03)
    zeros = {**variables, "params": params}
    config.compact.multiple = 1
    compact = setup.compact(config, model, zeros)
    macs = [costs.total(*one, (32, 48))["macs"] for one in (compact, (model, zeros))]
    assert macs[0] / macs[1] == pytest.approx(left, abs=0.02)
    counted = groups.count(config, params)
    sets = counted.coupled if kind == "coupled" else [one for one in counted.layers if one.groups >= 16]
    fractions = [
        one.zero_groups / one.groups for one in sets if one.groups >= 16 and "head_" not in getattr(one, "path", "")
    ]
    spread = max(fractions) - min(fractions)
    assert spread < 0.07 if pattern == schema.EVEN else spread > 0.2


@pytest.mark.slow
def test_the_job_writes_a_record_and_a_plot(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(latency, "_MACS", {schema.EVEN: (0.5, 0.25), schema.UNEVEN: (0.4,)})
    config.sparsity.update(groups="coupled")
    config.compact.tasks = "depth"  # which --job=compact would leave; the targets are for all tasks
    config.benchmark.batch_sizes = (2,)
    heads = set()

    def compare(models, *args, compare=latency.speed.compare, **options):
        heads.update(tuple(task for task, *_ in model.heads) for model, _ in models.values())
        return compare(models, *args, **options)

    monkeypatch.setattr(latency.speed, "compare", compare)
    found = latency.run_job(config, tmp_path / "run")
    assert found == schema.Latency.read(tmp_path / "run" / "latency.json")
    assert (tmp_path / "run" / "plots" / "latency_by_macs.png").stat().st_size > 1000
    assert "| sparsity.target_macs, batch 2 |" in capsys.readouterr().out
    assert [(row.pattern, row.batch) for row in found.rows] == [
        (pattern, 2) for pattern in (schema.DENSE, schema.EVEN, schema.EVEN, schema.UNEVEN)
    ]
    assert heads == {tuple(config.tasks)}
    assert found.rows[0].macs_left == found.rows[0].time_left == 1
    np.testing.assert_allclose([row.macs_left for row in found.rows], [1, 0.5, 0.25, 0.4], atol=0.03)
    assert found.batches == (2,) and len(found.errors(2)) == 1


def test_a_network_of_which_little_can_go_is_named(config, tmp_path, monkeypatch):
    monkeypatch.setattr(latency, "_MACS", {schema.EVEN: (0.5, 0.25)})
    config.sparsity.max_removed = 0.05
    config.sparsity.target = 0.02
    with raises("OPTION_CONFLICT", naming="max_removed=0.05"):
        latency.run_job(config, tmp_path)


def test_rounds_are_checked_first(config, tmp_path):
    config.benchmark.rounds = 0
    with raises("OPTION_OUT_OF_RANGE", naming="benchmark.rounds=0"):
        latency.run_job(config, tmp_path)


def test_the_tables_of_the_docs_are_those_of_the_records():
    docs = pathlib.Path(__file__).parents[2] / "docs"
    found = schema.Latency.read(docs / "benchmarks" / "latency_target" / "latency.json")
    page = (docs / "groups.md").read_text()
    _, times, targets, _ = latency.text(found).split("\n\n")
    assert times in page and targets in page
    rows = schema.Timing.read(docs / "benchmarks" / "latency_target" / "benchmark.json").rows
    models = {(row.batch, row.model): row for row in rows if row.part == "model"}
    left = models[1, "compact"].macs / models[1, "dense"].macs
    text = " ".join(page.split())
    assert f"has {100 * left:.1f} % of the MACs left" in text
    measured = {batch: 1 / models[batch, "compact"].speedup for batch in (1, 8)}
    predicted = {batch: found.time_left(batch, 0.3) for batch in (1, 8)}
    assert (
        f"predicts {100 * predicted[1]:.0f} % of the dense model's latency at batch 1 "
        f"and {100 * predicted[8]:.0f} % at batch 8"
    ) in text
    assert f"takes {100 * measured[1]:.0f} % at batch 1 and {100 * measured[8]:.0f} % at batch 8" in text
    worst = [100 * max(map(abs, found.errors(batch))) for batch in (1, 8)]
    assert f"by at most {worst[0]:.0f} % at batch 1 and {worst[1]:.0f} % at batch 8" in text
