import itertools
import multiprocessing

import jax
import numpy as np
import pytest

from input_pipeline import datasets, loader
from input_pipeline.transforms import Transform
from tests.conftest import raises, tiny


class Source:
    """Ten samples that contain their own index."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return {"number": int(index)}


def transform(frame, rng=None):
    draw = rng.random() if rng is not None else 0.0
    return {"image": np.float32(frame["number"]), "draw": np.float64(draw), "mask": np.float32(1)}


def take(batches, count):
    return list(itertools.islice(batches, count))


def numbers(batches):
    return np.concatenate([batch["image"] for batch in batches]).astype(int).tolist()


def train(**settings):
    settings = {"batch_size": 4, "seed": 3, **settings}
    return loader.train_batches(Source(), transform, **settings)


def test_every_epoch_has_every_frame_once_in_its_own_order():
    seen = numbers(take(train(batch_size=5), 6))
    epochs = [seen[i : i + 10] for i in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert numbers(take(train(batch_size=5, seed=4), 2)) != epochs[0]


def test_a_start_step_sees_what_an_uninterrupted_run_sees():
    whole = take(train(), 7)
    resumed = take(train(start_step=4), 3)
    for a, b in zip(whole[4:], resumed, strict=True):
        np.testing.assert_array_equal(a["image"], b["image"])
        np.testing.assert_array_equal(a["draw"], b["draw"])
    assert len({value for batch in whole for value in batch["draw"]}) == 28, "each example has its own draw"


def test_processes_share_the_same_global_batches():
    whole = take(train(), 5)
    parts = [take(train(process_index=index, process_count=2), 5) for index in (0, 1)]
    for step in range(5):
        assert len(parts[0][step]["image"]) == 2
        assert numbers([parts[0][step], parts[1][step]]) == numbers([whole[step]]), "in the same order, too"


def test_batches_of_one():
    assert sorted(numbers(take(train(batch_size=1), 10))) == list(range(10))
    both = [numbers(take(train(batch_size=2, process_index=index, process_count=2), 5)) for index in (0, 1)]
    assert sorted(both[0] + both[1]) == list(range(10))


def kill_a_worker():
    """Kill one worker, unless the loss of an earlier one has ended the others; return how many were killed."""
    victims = [child for child in multiprocessing.active_children() if child.is_alive()][:1]
    for victim in victims:
        victim.kill()
        victim.join()
    return len(victims)


def test_a_data_worker_that_is_killed_is_replaced():
    """The batches equal those of an undisturbed run: none is missing or repeated."""
    batches, seen, killed = train(num_workers=2), [], 0
    for _ in range(3):
        seen += take(batches, 6)
        killed += kill_a_worker()
    seen += take(batches, 6)
    assert killed >= 2
    for ours, want in zip(seen, take(train(), 24), strict=True):
        np.testing.assert_array_equal(ours["image"], want["image"])
        np.testing.assert_array_equal(ours["draw"], want["draw"])


def test_data_workers_that_keep_dying_raise(monkeypatch):
    def dies(dataset, num_workers):
        yield from itertools.islice(dataset, 2)
        raise RuntimeError("Worker process was terminated unexpectedly with exit code -9.")

    prefetched = loader._prefetched
    monkeypatch.setattr(loader, "_prefetched", lambda dataset, workers: dies(prefetched(dataset, 0), workers))
    assert len(take(train(num_workers=2), 7)) == 7, "continues as long as there are new batches"
    monkeypatch.setattr(loader, "_prefetched", lambda dataset, workers: dies([], workers))
    with raises("DATA_WORKER_KILLED", naming="run.num_workers"):
        next(train(num_workers=2))


def test_worker_processes_give_the_same_batches():
    here, there = take(train(), 3), take(train(num_workers=2), 3)
    for a, b in zip(here, there, strict=True):
        np.testing.assert_array_equal(a["image"], b["image"])
        np.testing.assert_array_equal(a["draw"], b["draw"])


def test_worker_processes_read_stored_frames(rooms):
    """The source of a real run can be sent to another process, too."""
    data = datasets.load(tiny(rooms).data)
    settings = {"batch_size": 4, "seed": 0}
    real = Transform((32, 48), flip=True)
    here = take(loader.train_batches(data.train, real, **settings), 2)
    there = take(loader.train_batches(data.train, real, **settings, num_workers=2), 2)
    for a, b in zip(here, there, strict=True):
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


@pytest.mark.parametrize("batch_size", [1, 4, 7, 32])
@pytest.mark.parametrize("process_count", [1, 2])
def test_evaluation_has_every_frame_once_and_pads_the_rest(batch_size, process_count):
    batch_size *= process_count
    counted = []
    for index in range(process_count):
        batches = list(
            loader.eval_batches(
                Source(), transform, batch_size=batch_size, process_index=index, process_count=process_count
            )
        )
        assert {len(batch["image"]) for batch in batches} == {batch_size // process_count}
        for batch in batches:
            counted += batch["image"][batch["mask"] > 0].astype(int).tolist()
    assert sorted(counted) == list(range(10))


def test_prefetch_keeps_the_order_and_ends():
    size = 2 * jax.local_device_count()
    batches = [{"image": np.full((size, 3), i, np.float32)} for i in range(5)]
    got = list(loader.prefetch_to_device(iter(batches)))
    assert [int(batch["image"][0, 0, 0]) for batch in got] == list(range(5))
    assert got[0]["image"].shape == (jax.local_device_count(), 2, 3)
