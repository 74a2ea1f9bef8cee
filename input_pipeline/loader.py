"""Grain pipelines over a random-access source: endless training batches, and one pass of evaluation batches."""

import collections
import itertools
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import grain
import jax
import numpy as np
from absl import flags, logging

from mtl_sparse.runtime.errors import UserError

Batch = dict[str, np.ndarray]
_Tree = TypeVar("_Tree")
_EPOCHS = 2**32  # in effect endless; Grain's infinite repetition overflows with batches of one


def train_batches(
    source: Sequence,
    transform: Callable[[Any, np.random.Generator], Any],
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    num_workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Yield endless shuffled batches, of which each process gets its part.

    The data depend only on (seed, step): every epoch has its own order, a run that resumes at a step gets the batches
    of an uninterrupted run, and a global batch has the same samples in the same order on any number of processes.

    Args:
      source: stored samples with random access.
      transform: (sample, NumPy generator) -> example.
      batch_size: size of the global batch, which is divided equally among the processes.
      seed: seed of the order and of the augmentations.
      start_step: step of the first batch.
      num_workers: number of worker processes; 0 reads in threads of this process.
      process_index: index of this process.
      process_count: number of processes.

    Yields:
      Batches, each array [batch_size / process_count, ...].

    Raises:
      UserError: worker processes were killed twice at the same step.
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
                    "DATA_WORKER_KILLED",
                    f"a data worker was killed twice before step {step + 1}, perhaps because memory ran out; decrease "
                    "run.num_workers",
                ) from error
            last_loss = step
            logging.warning("A data worker was killed before step %d; new workers continue from there", step + 1)


def eval_batches(
    source: Sequence,
    transform: Callable[[Any], Any],
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Return batches with every sample once, in order; the last batch is padded with examples whose `mask` is 0.

    Args:
      source: stored samples with random access.
      transform: sample -> example.
      batch_size: size of the global batch, which is divided equally among the processes.
      process_index: index of this process.
      process_count: number of processes.

    Returns:
      This process's part of the batches, each array [batch_size / process_count, ...].
    """
    total = -(-len(source) // batch_size) * batch_size
    dataset = grain.MapDataset.range(total).map(_PaddedExample(source, transform))
    dataset = dataset.batch(batch_size // process_count)[process_index::process_count]
    return iter(_prefetched(dataset, num_workers=0))  # starting processes takes longer than reading a split


class _PaddedExample:
    """Map an index to its example. An index past the end gives the last example with mask 0."""

    def __init__(self, source: Sequence, transform: Callable[[Any], Any]) -> None:
        self._source, self._transform = source, transform

    def __call__(self, index: int) -> dict:
        example = self._transform(self._source[min(index, len(self._source) - 1)])
        return example if index < len(self._source) else {**example, "mask": np.float32(0)}


def _prefetched(dataset: grain.MapDataset, num_workers: int) -> grain.IterDataset:
    """Return the data set as an iterable one that reads ahead."""
    if num_workers == 0:
        return dataset.to_iter_dataset(grain.ReadOptions(num_threads=4, prefetch_buffer_size=8))
    if not flags.FLAGS.is_parsed():  # Grain's workers read absl flags, which a notebook never parses
        flags.FLAGS.mark_as_parsed()
    iterable = dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))
    options = grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=2)
    return iterable.mp_prefetch(options, worker_init_fn=_ignore_ctrl_c)


def _ignore_ctrl_c(worker: int, count: int) -> None:
    """Ignore Ctrl-C, which a terminal also sends to the workers; the run needs them until it has stopped."""
    del worker, count
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def shard(batch: Batch) -> Batch:
    """Reshape each array [B, ...] to [local devices, B / local devices, ...], as pmap takes it."""
    count = jax.local_device_count()
    return {key: value.reshape(count, -1, *value.shape[1:]) for key, value in batch.items()}


def replicate(tree: _Tree) -> _Tree:
    """Put a tree on every local device, as pmap takes and returns unmapped trees (`in_axes` and `out_axes` None)."""
    return jax.device_put(tree, _sharding())


def _sharding(*axes: str) -> jax.NamedSharding:
    mesh = jax.sharding.Mesh(np.array(jax.local_devices()), ("devices",))
    return jax.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))


def prefetch_to_device(batches: Iterator[Batch], size: int = 2) -> Iterator[dict[str, jax.Array]]:
    """Yield sharded batches, and keep the next `size` of them on the devices."""
    queue: collections.deque[dict[str, jax.Array]] = collections.deque()
    sharding = _sharding("devices")

    def fill(count: int) -> None:
        for batch in itertools.islice(batches, count):
            queue.append(jax.device_put(shard(batch), sharding))

    fill(size)
    while queue:
        yield queue.popleft()
        fill(1)
