"""Named sweeps: the base config of each, and its trials as a list of options.

    python launch.py --config=configs/sweeps.py:table1 --job=sweep --config.data.folder=/data/NYUD_MT
    python launch.py --config=configs/sweeps.py:table1:demo --job=sweep

`NAME:demo` is the same list at a size for two cores: embedded data, small models, two or three seeds, and penalties
that act in short runs. `evidence:cpu`, `groups:cpu` and `baselines:cpu` are on NYU-v2 at a size for two cores
(configs/nyu_cpu.py), and so is `pretrained` (configs/nyu_lite.py).
"""

import functools
import itertools
import operator
from collections.abc import Callable
from typing import Any

import ml_collections

from configs import celebamask_hq, demo, demo_faces, nyu, nyu_cpu, nyu_lite
from mtl_sparse.runtime.errors import UserError
from mtl_sparse.tasks.weighting import NAMES as WEIGHTINGS

Options = dict[str, Any]  # dotted path -> value

SEEDS, DEMO_SEEDS = range(5), range(2)
LAMBDAS, DEMO_LAMBDAS = (0.0, 1e-6, 1e-5), (0.0, 1e-3, 3e-3)
# In the order of the paper's tables.
TABLE1 = (
    ("segmentation",),
    ("depth",),
    ("normals",),
    ("segmentation", "depth"),
    ("segmentation", "normals"),
    ("normals", "depth"),
    ("segmentation", "normals", "depth"),
)
ALL = TABLE1[-1]
# Options of the paper's dense rows, and of the published optimizer of its sparse rows.
ADAM_L2: Options = {"optimizer.weight_decay": 0.0, "optimizer.l2": 0.01}
PUBLISHED: tuple[Options, ...] = (
    {"sparsity.bias_correction": False},
    {"sparsity.warmup": 0.0, "sparsity.warmup_steps": 0},
    {"sparsity.fixed_norm": False},
    {"sparsity.anneal_revival": False},
)
# Fraction of weights in zero groups when 70% of the groups are zero: 90% (docs/results.md).
MATCHED_L1 = 0.9
# Too small to zero a group: only the fixed norm of the kernels remains of the sparse optimizer.
NORMS_HELD = 1e-12


def _product(**choices) -> list[Options]:
    """Return every combination of options; "__" in a name stands for ".", and the first name varies slowest."""
    names = [name.replace("__", ".") for name in choices]
    return [dict(zip(names, values, strict=True)) for values in itertools.product(*choices.values())]


def table1(small: bool) -> list[Options]:
    """Return Table 1: NYU-v2, seven task sets, three values of lambda."""
    return _product(tasks=TABLE1, sparsity__lambda_=DEMO_LAMBDAS if small else LAMBDAS, seed=_seeds(small))


def table2(small: bool) -> list[Options]:
    """Return Table 2: CelebAMask-HQ, six task sets, dense and sparse."""
    lambdas = (DEMO_LAMBDAS if small else LAMBDAS)[::2]
    return _product(tasks=tuple(celebamask_hq.TABLE2.values()), sparsity__lambda_=lambdas, seed=_seeds(small))


def table3(small: bool) -> list[Options]:
    """Return Table 3: unstructured l1 on single weights."""
    tasks = (("segmentation", "normals"), ("normals", "depth"), ALL)
    lambda_ = (1e-3 if small else 1e-5,)
    return _product(tasks=tasks, sparsity__penalty=("l1",), sparsity__lambda_=lambda_, seed=_seeds(small))


def lambda_path(small: bool) -> list[Options]:
    """Return dense and six values of lambda from 1e-7, a factor of 10 apart (demo: from 1e-4, a factor of about 3)."""
    lambdas = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2) if small else (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
    return _product(sparsity__lambda_=(0.0, *lambdas), seed=_seeds(small))


def lomt(small: bool) -> list[Options]:
    """Return the options of each single-task and multi-task model of --job=lomt."""
    return _product(seed=range(3) if small else SEEDS)


def target_path(small: bool) -> list[Options]:
    """Return dense and five target sparsities."""
    return [
        {"sparsity.target": target, "sparsity.lambda_": (1e-4 if small else 1e-5) if target else 0.0, "seed": seed}
        for target in (0.0, 0.3, 0.5, 0.7, 0.8, 0.9)
        for seed in _seeds(small)
    ]


def fair_baseline(small: bool) -> list[Options]:
    """Return Table 1's task sets without a penalty, with the optimizer of the sparse runs."""
    return _product(tasks=TABLE1, sparsity__lambda_=(0.0,), seed=_seeds(small))


def paper_baseline(small: bool) -> list[Options]:
    """Return Table 1's task sets with the optimizer of the paper's dense rows: Adam with L2 0.01 in the gradient."""
    return [options | ADAM_L2 for options in fair_baseline(small)]


def evidence(small: bool) -> list[Options]:
    """Return a fair comparison of sparse and dense training (docs/results.md) against the dense first row.

    The first row and target 0.7 without debiasing, on which the claim rests, have six seeds, the others three.
    """
    dense: Options = {"sparsity.lambda_": 0.0}
    targets = _product(sparsity__target=(0.7, 0.5, 0.9), sparsity__debias_at=(0.0, 0.85))
    published = functools.reduce(operator.or_, PUBLISHED) | {"sparsity.start_at": 0.0}
    rows: list[Options] = [
        dense,
        *targets[:2],
        {"sparsity.lambda_": NORMS_HELD},
        *[dense | {"tasks": tasks} for tasks in TABLE1[:3]],
        dense | ADAM_L2,
        *targets[2:],
        {"sparsity.penalty": "l1", "sparsity.target": MATCHED_L1},
        *[{"sparsity.lambda_": lambda_} | published for lambda_ in (DEMO_LAMBDAS if small else LAMBDAS)[1:]],
    ]
    seeds = [DEMO_SEEDS if small else range(6 if row in rows[:2] else 3) for row in rows]
    return [row | {"seed": seed} for row, its in zip(rows, seeds, strict=True) for seed in its]


def fidelity(small: bool) -> list[Options]:
    """Return the differences to the reference implementation, one by one and together, and dense rows of both.

    See docs/fidelity.md.
    """
    restart = {"optimizer.restart_each_epoch": True}
    unlearned = {"loss.weighting": "fixed", "loss.weights": (0.3679,) * len(ALL)}  # exp(-s), s fixed at 1
    differences: list[Options] = [*PUBLISHED, {"sparsity.penalty_in_gradient": True}, restart, unlearned]
    paper = functools.reduce(operator.or_, PUBLISHED)
    reference = functools.reduce(operator.or_, differences)
    dense: Options = {"sparsity.lambda_": 0.0}
    rows = [{}, *differences, paper, reference, dense, dense | ADAM_L2, dense | ADAM_L2 | restart | unlearned, ADAM_L2]
    ours = {"sparsity.lambda_": DEMO_LAMBDAS[-1] if small else LAMBDAS[-1], "optimizer.weight_decay": 0.1}
    return [{**ours, **row, "seed": seed} for row in rows for seed in (range(3) if small else SEEDS)]


def groups(small: bool, macs: float = 0.25) -> list[Options]:
    """Return forms of groups and of their weights at `macs` of the MACs, and the dense row (docs/groups.md).

    Three seeds, which vary slowest, so that each part of the sweep compares all rows.
    """
    del small
    forms = _product(sparsity__groups=("input", "coupled"), sparsity__group_weights=("sqrt_size", "macs"))
    rows: list[Options] = [{"sparsity.lambda_": 0.0}, *({"sparsity.target_macs": macs} | form for form in forms)]
    return [{"sparsity.target": 0.0} | row | {"seed": seed} for seed in range(3) for row in rows]


def weighting(small: bool) -> list[Options]:
    """Return every weighting, dense and at target 0.7, and dense single-task runs, which the gains refer to.

    Three seeds (demo: two), which vary slowest, so that each part of the sweep compares all methods. "fixed" is left
    out, because its weights would have to be chosen.
    """
    dense: Options = {"sparsity.target": 0.0, "sparsity.lambda_": 0.0}
    sparse: Options = {"sparsity.target": 0.7, "sparsity.lambda_": 1e-4 if small else 1e-5}
    names = ["equal", *(name for name in WEIGHTINGS if name not in ("equal", "fixed"))]
    rows = [form | {"loss.weighting": name} for form in (dense, sparse) for name in names]
    single = [dense | {"loss.weighting": "equal", "tasks": tasks} for tasks in TABLE1[:3]]
    return [row | {"seed": seed} for seed in range(2 if small else 3) for row in rows[:1] + single + rows[1:]]


def baselines(small: bool, macs: float = 0.25) -> list[Options]:
    """Return ways to leave `macs` of the multiply-accumulates, the dense model, and dense single-task runs.

    Group lasso while training, pruning at once after half of the epochs by norm and by Taylor importance, each with
    input and with coupled groups, and a dense model whose backbone has half the width. Three seeds, which vary slowest.
    """
    base: Options = {"sparsity.target": 0.0}
    dense = base | {"sparsity.lambda_": 0.0}
    ways: list[Options] = [{"sparsity.group_weights": "macs"}, {"sparsity.prune": "norm"}, {"sparsity.prune": "taylor"}]
    rows: list[Options] = [
        dense,
        *(
            base | {"sparsity.target_macs": macs, "sparsity.groups": kind} | way
            for kind in ("input", "coupled")
            for way in ways
        ),
        dense | {"model.width": 16 if small else 32},
        *[dense | {"tasks": tasks} for tasks in TABLE1[:3]],
    ]
    return [row | {"seed": seed} for seed in range(3) for row in rows]


def pretrained(small: bool) -> list[Options]:
    """Return ways to leave a quarter of the multiply-accumulates of a backbone that starts from ImageNet weights.

    First the dense model, group lasso weighted by MACs and pruning at once by norm, both with coupled and with input
    groups, and coupled groups pruned at once by Taylor importance. Then, with coupled groups that have the same
    weight and with a debiasing phase: group l0 by Fisher information, with fixed kernel norms and without, and group
    lasso without them. Then group lasso weighted by size, input groups pruned at once by Taylor importance, fixed norms
    with nothing pruned, half and a tenth of the MACs, and dense single-task runs. Three seeds, which vary slowest in
    each part; last, two more of the dense model, of Taylor importance and of group l0 without fixed norms, all with
    coupled groups.
    """
    del small
    base: Options = {"sparsity.target": 0.0}
    dense = base | {"sparsity.lambda_": 0.0}
    by_macs: Options = {"sparsity.group_weights": "macs"}
    norm, taylor = ({"sparsity.prune": name} for name in ("norm", "taylor"))

    def quarter(groups: str, way: Options) -> Options:
        return base | {"sparsity.target_macs": 0.25, "sparsity.groups": groups} | way

    first = [dense, *[quarter(kind, way) for way in (by_macs, norm) for kind in ("coupled", "input")]]
    first.append(quarter("coupled", taylor))

    def debiased(penalty: Options, norms: Options) -> Options:
        early: Options = {"sparsity.target_ramp": 0.3, "sparsity.target_freeze": 0.4, "sparsity.debias_at": 0.5}
        return quarter("coupled", penalty | {"sparsity.group_weights": "none"} | norms | early)

    fisher: Options = {"sparsity.penalty": "group_l0", "sparsity.metric": "fisher"}
    free: Options = {"sparsity.fixed_norm": False}
    second = [debiased(fisher, {}), debiased(fisher, free), debiased({}, free)]
    more: list[Options] = [
        quarter("input", {}),
        quarter("coupled", {}),
        quarter("input", taylor),
        base | {"sparsity.lambda_": NORMS_HELD},
        *[base | {"sparsity.target_macs": macs, "sparsity.groups": "coupled"} | by_macs for macs in (0.5, 0.1)],
        *[dense | {"tasks": tasks} for tasks in TABLE1[:3]],
    ]
    parts = [(rows, range(3)) for rows in (first, second, more)] + [([dense, first[-1], second[1]], range(3, 5))]
    return [row | {"seed": seed} for rows, seeds in parts for seed in seeds for row in rows]


def targets(small: bool) -> list[Options]:
    """Return each kind of target on three backbones, with input and with coupled groups: is it reached?

    ResNet-18 and 50, and EfficientNet-Lite0, which has depthwise convolutions. One seed. The targets are above what one
    input group in each kernel of the backbone leaves (docs/groups.md).
    """
    networks: list[tuple[Options, float, float]] = [  # with the fractions of MACs and of parameters to leave
        ({"model.depth": 18}, *((0.25, 0.15) if small else (0.5, 0.6))),
        ({"model.depth": 50} | ({"model.width": 16} if small else {}), *((0.4, 0.25) if small else (0.5, 0.6))),
        ({"model.backbone": "efficientnet_lite0"}, *((0.25, 0.15) if small else (0.7, 0.7))),
    ]
    forms = _product(sparsity__groups=("input", "coupled"))
    return [
        {"sparsity.target": 0.0} | network | kind | form
        for network, macs, parameters in networks
        for kind in ({"sparsity.target": 0.7}, {"sparsity.target_macs": macs}, {"sparsity.target_params": parameters})
        for form in forms
    ]


def _shrink(config: ml_collections.ConfigDict, frames: int, size: tuple[int, int]) -> ml_collections.ConfigDict:
    """Return a demo's config at the size of a run of a sweep, with a fixed lambda, which the sweep sets."""
    config.sparsity.update(target=0.0, start_at=0.0, warmup=0.0, warmup_steps=20)
    config.loss.weighting = "uncertainty"
    config.data.embedded.update(frames=frames, height=size[0], width=size[1])
    config.data.size = size
    config.model.update(width=16, head_features=32)
    config.train.epochs = 20
    config.run.update(summary_rounds=0, checkpoint_every_steps=10**6)
    return config


def small_rooms() -> ml_collections.ConfigDict:
    """Return the base config of demo sweeps on embedded rooms."""
    return _shrink(demo.get_config(), 192, (32, 48))


def small_faces() -> ml_collections.ConfigDict:
    """Return the base config of demo sweeps on embedded faces."""
    config = _shrink(demo_faces.get_config(), 480, (48, 48))
    config.optimizer.learning_rate = 1e-3  # it scales the penalty, which must act in few steps
    return config


def short_demo() -> ml_collections.ConfigDict:
    """Return the base config of the demos of `groups`, `baselines` and `targets`: the demo in half the epochs."""
    config = demo.get_config()
    config.train.epochs = 12
    config.run.summary_rounds = 0
    config.benchmark.batch_sizes = (1, 8)
    return config


def lite() -> ml_collections.ConfigDict:
    """Return the base config of `pretrained`: NYU-v2 at 96x128 in six epochs, from weights that the user has to name.

    It prunes as early as configs/nyu_lite.py, by group lasso, with input groups weighted by size, with fixed norms and
    without debiasing.
    """
    config = nyu_lite.get_config()
    config.model.init_from = "LITE0"  # no such file, so that the sweep asks for the user's
    config.sparsity.update(penalty="group_lasso", metric="adaptive", fixed_norm=True)
    config.sparsity.update(target_macs=0.0, groups="input", group_weights="sqrt_size")
    config.sparsity.update(target_ramp=0.4, target_freeze=0.75, debias_at=0.0, prune_at=0.3)
    config.benchmark.batch_sizes = (1, 8)
    return config


def small_lite() -> ml_collections.ConfigDict:
    """Return the base config of the demo of `pretrained`, which starts from random weights."""
    config = short_demo()
    config.model.backbone = "efficientnet_lite0"
    return config


def four_tasks() -> ml_collections.ConfigDict:
    """Return the base config of `lomt`, with edges as the fourth task."""
    config = nyu.get_config()
    config.tasks = (*ALL, "edge")
    return config


def small_four_tasks() -> ml_collections.ConfigDict:
    """Return the base config of the demo of `lomt`."""
    config = small_rooms()
    config.tasks = (*ALL, "edge")
    config.sparsity.lambda_ = 1e-2
    config.lomt.active = 0.1  # layers have so few channels that one is more than 1%
    return config


NYU = {"": nyu.get_config, ":demo": small_rooms}
SWEEPS = {
    # name: (trials, base config of each size)
    "table1": (table1, NYU),
    "table2": (table2, {"": celebamask_hq.get_config, ":demo": small_faces}),
    "table3": (table3, NYU),
    "lambda_path": (lambda_path, NYU),
    "lomt": (lomt, {"": four_tasks, ":demo": small_four_tasks}),
    "target_path": (target_path, NYU),
    "fair_baseline": (fair_baseline, NYU),
    "fidelity": (fidelity, NYU),
    "paper_baseline": (paper_baseline, NYU),
    "groups": (groups, {"": nyu.get_config, ":demo": short_demo, ":cpu": nyu_cpu.get_config}),
    "weighting": (weighting, NYU),
    "baselines": (baselines, {"": nyu.get_config, ":demo": short_demo, ":cpu": nyu_cpu.get_config}),
    "pretrained": (pretrained, {"": lite, ":demo": small_lite}),
    "targets": (targets, {"": nyu.get_config, ":demo": short_demo}),
    "evidence": (evidence, NYU | {":cpu": nyu_cpu.get_config}),
}


# At full size, one input group in each kernel leaves 40 % of a ResNet-50's MACs (docs/groups.md).
FULL_SIZE = {"groups": functools.partial(groups, macs=0.5), "baselines": functools.partial(baselines, macs=0.5)}


def _seeds(small: bool) -> tuple[int, ...]:
    return tuple(DEMO_SEEDS if small else SEEDS)


def _lookup(name: str) -> tuple[Callable[[bool], list[Options]], Callable[[], ml_collections.ConfigDict], bool]:
    """Return (trials by size, base config, whether it is the demo) of a sweep."""
    sweep, colon, size = name.partition(":")
    if colon + size not in SWEEPS.get(sweep, (None, {}))[1]:
        names = ", ".join(SWEEPS)
        raise UserError(
            "SWEEP_UNKNOWN",
            f"unknown sweep {name!r}; the sweeps are {names}, each also as NAME:demo; "
            "evidence, groups and baselines also as NAME:cpu",
        )
    trials_of, bases = SWEEPS[sweep]
    return FULL_SIZE.get(name, trials_of), bases[colon + size], size == "demo"


def trials(name: str) -> list[dict]:
    """Return the options of each trial of a sweep. The seed varies fastest, or slowest if the sweep's function says so.

    Args:
      name: a sweep as after --config=configs/sweeps.py:, such as "table1" or "table1:demo".

    Raises:
      UserError: an unknown sweep.
    """
    trials_of, _, small = _lookup(name)
    return trials_of(small)


def get_config(name: str = "") -> ml_collections.ConfigDict:
    """Return the base config of a sweep; for `name`, see `trials`."""
    return _lookup(name)[1]()
