"""configs/nyuv2_13.py and configs/cityscapes.py from the command line on small drawn folders, up to the report."""

import json
import pathlib
import subprocess
import sys

import pytest

from configs import nyuv2_13
from input_pipeline.synthetic import mtan_rooms
from mtl_sparse.report import page, protocols
from mtl_sparse.tasks import resolve
from mtl_sparse.training import setup as setup_lib

ROOT = pathlib.Path(__file__).parents[1]
SMALL = (
    f"--register={ROOT}/tests/register_backbones.py --config.model.backbone=own "
    "--config.model.head_features=4 --config.train.epochs=1 "
    "--config.train.batch_size=8 --config.train.eval_batch_size=8 --config.run.num_workers=0 "
    "--config.run.summary_rounds=0 --config.run.sample_frames=2 --config.sparsity.warmup_steps=0"
).split()
CASES = {
    "nyuv2_13": ("nyuv2_13", mtan_rooms.draw_nyuv2, (24, 32)),
    "cityscapes_7": ("cityscapes", mtan_rooms.draw_cityscapes, (16, 32)),
}


def launch(*arguments):
    command = [sys.executable, str(ROOT / "launch.py"), *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("name", CASES)
@pytest.mark.slow
def test_a_run_ends_with_all_metrics_of_the_protocol(name, tmp_path):
    config, draw, size = CASES[name]
    folder = draw(18, *size, seed=0, folder=str(tmp_path))
    base = [f"--config=configs/{config}.py", f"--config.data.folder={folder}", f"--config.data.size={size}", *SMALL]
    shown = launch(
        *base, "--config.data.flip=True", "--config.data.scales=1.0,1.2,1.5", f"--workdir={tmp_path / 'run'}"
    )
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    wanted = {f"{task}/{metric.key}" for task, metrics in protocols.METRICS[name].items() for metric in metrics}
    assert wanted <= results["test"].keys() and all(0 <= results["test"][key] < 180 for key in wanted)
    assert all(key.partition("/")[2] in shown for key in wanted)
    assert results["frames"] == {"train": 13, "validation": 2, "test": 3}
    assert tuple(results["config"]["data"]["scales"]) == (1.0, 1.2, 1.5)
    splits = json.loads((tmp_path / "run" / "splits.json").read_text())
    assert splits["test"] == ["val/0", "val/1", "val/2"]
    text = page.write([tmp_path / "run"], tmp_path / "compared").read_text()
    assert all(f" {metric.name.replace('<', '&lt;')} " in text
               for metrics in protocols.METRICS[name].values() for metric in metrics)  # fmt: skip
    assert ("published, B" in text) == (name == "nyuv2_13")


def test_augmentation_is_of_training_only():
    config = nyuv2_13.get_config()
    config.data.update(flip=True, scales=(1.0, 1.2, 1.5))
    batches = setup_lib.Batches(None, resolve(config), config)
    train, other = batches.transform(train=True), batches.transform()
    assert (train.flip, train.scales) == (True, (1.0, 1.2, 1.5)) and (other.flip, other.scales) == (False, ())
