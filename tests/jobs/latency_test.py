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


def rows_of(line, left):
    times = [1.0, *(line(x) for x in left)]
    return [
        schema.PatternTiming(latency.EVEN if x < 1 else latency.DENSE, 4, x, 10 * time, time)
        for x, time in zip([1.0, *left], times, strict=True)
    ]


def test_the_line_goes_through_times_that_lie_on_one():
    rows = rows_of(lambda macs: 0.2 + 0.8 * macs, (0.75, 0.5, 0.25))
    rows.append(schema.PatternTiming(latency.UNEVEN, 4, 0.5, 5.0, 0.5))
    found = latency.fit(rows)
    assert (found.batch, found.constant, found.per_macs) == (4, pytest.approx(0.2), pytest.approx(0.8))
    assert found.errors == (pytest.approx(0.6 / 0.5 - 1),)
    assert found.macs_left(found.time_left(0.3)) == pytest.approx(0.3)


def test_neither_part_of_the_line_is_negative():
    found = latency.fit(rows_of(lambda macs: -0.2 + 1.2 * macs, (0.75, 0.5, 0.25)))
    assert found.constant == 0 and 0 < found.per_macs <= 1
    constant = latency.fit(rows_of(lambda macs: 1.5 - 0.5 * macs, (0.75, 0.5, 0.25)))
    assert constant.per_macs == 0 and constant.constant > 0


def test_a_target_is_given_only_where_models_were_timed():
    rows = rows_of(lambda macs: 0.2 + 0.8 * macs, (0.75, 0.5, 0.25))
    found = schema.Latency("cpu", (32, 48), 2, "input", tuple(rows), (latency.fit(rows),))
    text = latency.text(found)
    assert "| 50 %                    | 0.38" in text and "| 33 %                    | below 0.25" in text
    flat = schema.Latency("cpu", (32, 48), 2, "input", tuple(rows), (schema.LatencyLine(4, 1.0, 0.0, ()),))
    assert latency.text(flat).count("below 0.25") == 4


@pytest.mark.parametrize(("kind", "pattern"), [("input", latency.EVEN), ("coupled", latency.UNEVEN)])
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
    assert spread < 0.07 if pattern == latency.EVEN else spread > 0.2


def test_the_job_writes_a_record_and_a_plot(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(latency, "_MACS", {latency.EVEN: (0.5, 0.25), latency.UNEVEN: (0.4,)})
    config.sparsity.update(groups="coupled", target=0.0, target_params=0.3)  # the target is not used
    config.benchmark.batch_sizes = (2,)
    found = latency.run_job(config, tmp_path / "run")
    assert found == schema.Latency.read(tmp_path / "run" / "latency.json")
    assert (tmp_path / "run" / "plots" / "latency_by_macs.png").stat().st_size > 1000
    assert "| sparsity.target_macs, batch 2 |" in capsys.readouterr().out
    assert [(row.pattern, row.batch) for row in found.rows] == [
        (pattern, 2) for pattern in (latency.DENSE, latency.EVEN, latency.EVEN, latency.UNEVEN)
    ]
    assert found.rows[0].macs_left == found.rows[0].time_left == 1
    np.testing.assert_allclose([row.macs_left for row in found.rows], [1, 0.5, 0.25, 0.4], atol=0.03)
    assert [(line.batch, len(line.errors)) for line in found.lines] == [(2, 1)]


def test_a_network_of_which_little_can_go_is_named(config, tmp_path, monkeypatch):
    monkeypatch.setattr(latency, "_MACS", {latency.EVEN: (0.5, 0.25)})
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
    for line in found.lines:
        predicted, measured = line.time_left(0.3), 1 / models[line.batch, "compact"].speedup
        assert (
            f"{100 * measured:.0f} %" in text and f"at batch {line.batch} ({100 * predicted:.0f} % predicted)" in text
        )
        assert f"{100 * max(map(abs, line.errors)):.0f} % at batch {line.batch}" in text
