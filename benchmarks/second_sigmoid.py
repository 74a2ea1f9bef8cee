"""Accuracy cost of the reference implementation's second sigmoid: rendered faces, single attribute tasks, dense.

    python -m benchmarks.second_sigmoid [--seeds 2] [--folder runs/second_sigmoid]

In the reference implementation the head ends with a sigmoid and the loss applies another one; an attribute is predicted
where the first sigmoid exceeds 0.4. Here the head returns a logit. All other options are those of
`configs/sweeps.py:table2:demo`. Each form is trained with the paper's dropout (0.6 and 0.4) and with the demo's (0.2).
"""

import argparse
import dataclasses
import functools
import pathlib

import jax
from absl import logging

from configs import sweeps
from mtl_sparse import tasks
from mtl_sparse.jobs import train
from mtl_sparse.report.tables import markdown
from mtl_sparse.tasks import losses, metrics

TASKS = ("attribute:Male", "attribute:Smiling")
DROPOUTS = ((0.6, 0.4), (0.2, 0.2))


def released(config, ours=tasks.TASKS["attribute:"]):
    """Return the attribute's task spec with the loss and the threshold of the reference implementation."""
    spec = ours(config)
    loss = lambda logits, label: losses.attribute_cross_entropy(jax.nn.sigmoid(logits), label)  # noqa: E731
    return dataclasses.replace(spec, loss=loss, sums=functools.partial(metrics.attribute_sums, threshold=0.4))


FORMS = {"ours": tasks.TASKS["attribute:"], "released": released}


def accuracy(form: str, task: str, dropout, seed: int, folder: pathlib.Path) -> float:
    """Train a run, or resume it, and return its test accuracy.

    Args:
      form: a key of `FORMS`.
      task: name of the attribute task.
      dropout: rates of the head's two dropout layers.
      seed: the run's seed.
      folder: the run's folder is created in it.
    """
    tasks.TASKS["attribute:"] = FORMS[form]
    config = sweeps.get_config("table2:demo")
    config.tasks, config.seed = (task,), seed
    config.loss.weights = (1.0,)
    config.sparsity.lambda_ = 0.0
    config.model.classifier_dropout = dropout
    name = f"{form}-{task.partition(':')[2]}-{dropout[0]}-{seed}"
    return train.train(config, folder / name)["test"][f"{task}/accuracy"]


def main() -> None:
    """Train all runs and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=2, help="runs of each cell")
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("runs/second_sigmoid"), help="of the runs")
    flags = parser.parse_args()
    lines = [("attribute", "dropout", "one sigmoid", "two, threshold 0.4")]
    for task in TASKS:
        for dropout in DROPOUTS:
            cells = []
            for form in FORMS:
                found = [accuracy(form, task, dropout, seed, flags.folder) for seed in range(flags.seeds)]
                cells.append(", ".join(f"{value:.4f}" for value in found))
                logging.info("%s, dropout %s, %s: %s", task, dropout, form, cells[-1])
            lines.append((task.partition(":")[2], str(dropout), *cells))
    print(markdown(lines))


if __name__ == "__main__":
    logging.set_verbosity(logging.WARNING)
    main()
