"""Grain pipelines over a random-access source: training batches by step, evaluation batches to the last frame."""

import collections
import itertools
import signal
from collections.abc import Iterator, Sequence

import grain
import jax
import numpy as np
from absl import flags, logging

from mtl_sparse.runtime.errors import UserError

Batch = dict[str, np.ndarray]
_EPOCHS = 2**32  # without end: Grain's own repetition overflows with batches of one


def train_batches(
    source: Sequence,
    transform,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    num_workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Endless shuffled batches, this process's part of each, beginning with the one of step `start_step`.

    The data are a function of (seed, step) alone: every epoch has its own order, a run that resumes at a step
    sees what an uninterrupted one sees there, and a global batch holds the same frames in the same places on any
    number of processes.

    Args:
      source: stored frames, random access.
      transform: callable (frame, numpy Generator) -> example.
      batch_size: global; each process gets its equal share.
      seed: of the order and of the augmentations.
      num_workers: worker processes; 0 reads in threads of this process.

    Raises:
      UserError: worker processes were killed, and new ones, too.
    """
    dataset = grain.MapDataset.source(source).seed(seed).shuffle().repeat(_EPOCHS).random_map(transform)
    dataset = dataset.batch(batch_size // process_count)[process_index::process_count]
    step, last_loss = start_step, -1
    while True:
        try:
            for batch in _prefetched(dataset[step:], num_workers):
                yield batch
                step += 1
        except RuntimeError as error:
            if "was terminated unexpectedly" not in str(error):
                raise
            if step == last_loss:
                raise UserError(
                    "a data worker was killed twice at the same step, perhaps for its memory; try fewer run.num_workers"
                ) from error
            last_loss = step
            logging.warning("A data worker was killed before step %d; new ones go on from there", step + 1)


def eval_batches(
    source: Sequence,
    transform,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Every frame of this process's share once, in order; the last batch is padded with `mask` 0 examples."""
    total = -(-len(source) // batch_size) * batch_size
    dataset = grain.MapDataset.range(total).map(_PaddedExample(source, transform))
    dataset = dataset.batch(batch_size // process_count)[process_index::process_count]
    return iter(_prefetched(dataset, num_workers=0))  # starting processes would take longer than a split


class _PaddedExample:
    """Index -> example; past the end, the last example again with its mask at 0."""

    def __init__(self, source, transform):
        self._source, self._transform = source, transform

    def __call__(self, index):
        example = self._transform(self._source[min(index, len(self._source) - 1)])
        return example if index < len(self._source) else {**example, "mask": np.float32(0)}


def _prefetched(dataset, num_workers):
    if num_workers == 0:
        return dataset.to_iter_dataset(grain.ReadOptions(num_threads=4, prefetch_buffer_size=8))
    if not flags.FLAGS.is_parsed():  # Grain's workers read absl flags, which a notebook never parses
        flags.FLAGS.mark_as_parsed()
    dataset = dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))
    options = grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=2)
    return dataset.mp_prefetch(options, worker_init_fn=_ignore_ctrl_c)


def _ignore_ctrl_c(worker, count):
    """A terminal sends Ctrl-C to the workers, too, but the run still needs them to end well."""
    del worker, count
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def shard(batch: Batch) -> Batch:
    """[B, ...] -> [local devices, B / local devices, ...], the form that pmap takes."""
    count = jax.local_device_count()
    return {key: value.reshape(count, -1, *value.shape[1:]) for key, value in batch.items()}


def replicate(tree):
    """The tree on every local device, as pmap takes and returns what is not mapped (`in_axes` and `out_axes` None)."""
    return jax.device_put(tree, _sharding())


def _sharding(*axes) -> jax.NamedSharding:
    mesh = jax.sharding.Mesh(np.array(jax.local_devices()), ("devices",))
    return jax.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))


def prefetch_to_device(batches: Iterator[Batch], size: int = 2) -> Iterator[dict[str, jax.Array]]:
    """Keeps `size` sharded batches on the devices ahead of the one in use."""
    queue, sharding = collections.deque(), _sharding("devices")

    def fill(count):
        for batch in itertools.islice(batches, count):
            queue.append(jax.device_put(shard(batch), sharding))

    fill(size)
    while queue:
        yield queue.popleft()
        fill(1)
