import json
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from mtl_sparse.compaction import speed
from mtl_sparse.jobs import benchmark
from mtl_sparse.models import costs, initializers, multitask, resnet
from mtl_sparse.models.atrous import AtrousConv
from mtl_sparse.report import run_page, schema
from tests.conftest import raises


def test_costs_by_hand():
    backbone = costs.layers(resnet.ResNet(50), (256, 256))
    assert backbone["stem_conv1"] == costs.LayerCost((3, 3, 3, 64), 128 * 128 * 27 * 64)
    assert backbone["layer2_0/conv2"].macs == 32 * 32 * 9 * 128 * 128
    assert backbone["layer2_0/downsample_conv"].macs == 32 * 32 * 256 * 512
    assert len(backbone) == 55

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = AtrousConv(4, 6, initializers.before_norm, name="atrous")(x)
            return nn.Dense(2, name="dense")(x.mean((1, 2)))

    found = costs.layers(Net(), (8, 8))
    # Rate 6 on 8x8: an outer tap meets 2 of 8 rows (or columns), so (8 + 2 + 2) ** 2 products a channel pair.
    assert found["atrous"].macs == 12 * 12 * 3 * 4
    assert found["dense"] == costs.LayerCost((4, 2), 8)


def test_the_backbone_is_timed_with_each_map_once():
    heads = (("depth", "deeplab", 1), ("edge", "deeplab", 1), ("normals", "deeplab", 3))
    model = multitask.MultiTaskModel(heads, depth=10, width=4, head_features=4)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    outputs = speed.Part.backbone(model, variables).compiled(jnp.zeros((1, 32, 32, 3)))[0]()
    assert [x.shape for x in outputs] == [(1, 4, 4, 32)]


@pytest.mark.slow
def test_a_run_is_timed_dense_sparse_and_compact(sparse_run, tmp_path, capsys):
    config, original = sparse_run
    folder = shutil.copytree(original, tmp_path / "run")
    config = config.copy_and_resolve_references()
    config.benchmark.update(batch_sizes=(1, 2), rounds=3)
    rows = benchmark.run_job(config, folder)
    assert [(row["part"], row["batch"], row["model"]) for row in rows] == [
        (part, batch, model)
        for batch in (1, 2)
        for part in ("backbone", "model")
        for model in ("dense", "sparse", "compact")
    ]
    for i in range(0, len(rows), 3):
        dense, sparse, compact = rows[i : i + 3]
        assert all(row["p90_ms"] >= row["median_ms"] > 0 for row in (dense, sparse, compact))
        assert dense["macs"] == sparse["macs"] > compact["macs"] > 0
        assert dense["parameters"] == sparse["parameters"] > compact["parameters"] > 0
        assert dense["memory_mib"] > compact["memory_mib"] > 0
    stored = json.loads((folder / "benchmark.json").read_text())
    assert stored["rows"] == rows and stored["version"] == schema.VERSION and stored["size"] == [32, 48]
    assert schema.Timing.read(folder / "benchmark.json").to_json() == stored
    assert benchmark.is_done(config, folder)
    assert (folder / "plots" / "latency.png").stat().st_size > 5_000
    assert "<h3>Latency</h3>" in run_page.path(folder).read_text()
    assert "| compact" in capsys.readouterr().out


def test_a_run_that_has_not_finished_is_timed_without_its_page(sparse_run, tmp_path, caplog):
    config, original = sparse_run
    folder = shutil.copytree(original, tmp_path / "run", ignore=shutil.ignore_patterns("results.json", "report"))
    config = config.copy_and_resolve_references()
    config.benchmark.update(batch_sizes=(1,), rounds=1)
    benchmark.run_job(config, folder)
    assert (folder / "benchmark.json").exists() and not run_page.path(folder).exists()
    assert "could not be written" not in caplog.text


def test_bad_input(sparse_run, tmp_path):
    config = sparse_run[0].copy_and_resolve_references()
    with raises("CHECKPOINT_MISSING", naming=str(tmp_path)):
        benchmark.run_job(config, tmp_path)
    config.benchmark.batch_sizes = (0,)
    with raises("OPTION_OUT_OF_RANGE", naming="benchmark.batch_sizes=(0,)"):
        benchmark.run_job(config, tmp_path)
