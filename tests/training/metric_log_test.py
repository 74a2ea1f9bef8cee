"""The event files of a run are TensorBoard's, with TensorFlow and without."""

import contextlib
import importlib.util
import time
from unittest import mock

import pytest
from tensorboard.backend.event_processing import event_file_loader
from tensorboard.util import tensor_util

from mtl_sparse.runtime.errors import Stopped
from mtl_sparse.training import metric_log

needs_tensorflow = pytest.mark.skipif(importlib.util.find_spec("tensorflow") is None, reason="extra 'tensorflow'")


def read(folder):
    """Return {(step, tag): value} of all event files in the folder, as TensorBoard reads them."""
    found = {}
    for path in folder.glob("events.out.tfevents.*"):
        events = list(event_file_loader.EventFileLoader(str(path)).Load())
        if not events:  # the writer has just created it
            continue
        assert events[0].file_version == "brain.Event:2"
        for event in events[1:]:
            assert abs(event.wall_time - path.stat().st_mtime) < 60
            for value in event.summary.value:
                assert value.metadata.plugin_data.plugin_name == "scalars"
                found[event.step, value.tag] = tensor_util.make_ndarray(value.tensor).item()
    return found


@pytest.mark.parametrize("tensorflow", [False, pytest.param(True, marks=needs_tensorflow)])
def test_scalars_are_read_back_from_event_files(tmp_path, monkeypatch, tensorflow):
    monkeypatch.setattr(metric_log, "tensorflow_available", lambda: tensorflow)
    log = metric_log.MetricLog(tmp_path, start_step=0)
    log.write(1, "train", {"loss": 2.5, "depth/loss": 0.5})
    log.write(2, "train", {"loss": float("inf")})
    for _ in range(0 if tensorflow else 100):
        if len(read(tmp_path)) == 3:
            break
        time.sleep(0.05)
    else:
        assert tensorflow, "TensorBoard sees each line of a running run"
    log.close()
    again = metric_log.MetricLog(tmp_path, start_step=2)
    again.write(2**40, "validation", {"score": -1})
    again.close()
    expected = {(1, "train/loss"): 2.5, (1, "train/depth/loss"): 0.5, (2, "train/loss"): float("inf")}
    assert read(tmp_path) == {**expected, (2**40, "validation/score"): -1}


def test_an_error_of_the_event_file_is_raised(tmp_path, monkeypatch):
    def full(folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(metric_log, "_event_writer", full)
    log = metric_log.MetricLog(tmp_path, start_step=0)
    with pytest.raises(OSError, match="No space left"):
        log.write(1, "train", {"loss": 2.5})
        log.close()
    assert '"loss": 2.5' in (tmp_path / "metrics.jsonl").read_text()


def test_the_error_of_a_run_is_not_hidden_by_one_of_its_event_file(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(metric_log, "_event_writer", mock.Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(Stopped, match="at step 1"), metric_log.MetricLog(tmp_path, start_step=0) as log:
        with contextlib.suppress(OSError):
            log.write(1, "train", {"loss": 2.5})
        raise Stopped("at step 1")
    assert "No space left" in caplog.text
    with pytest.raises(OSError, match="No space left"), metric_log.MetricLog(tmp_path, start_step=1) as log:
        log.write(2, "train", {"loss": 2.5})


def test_a_log_without_lines_makes_no_event_file(tmp_path, monkeypatch):
    monkeypatch.setattr(metric_log, "_event_writer", mock.Mock(side_effect=AssertionError))
    metric_log.MetricLog(tmp_path, start_step=0).close()
