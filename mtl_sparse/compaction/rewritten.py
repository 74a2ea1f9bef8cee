"""Compact multi-task models with any backbone: the dense module, rewritten by the plan of `compaction.function`."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

from mtl_sparse.compaction import function, plans
from mtl_sparse.compaction.plans import Plan
from mtl_sparse.models import backbones, costs, deeplab, multitask, resnet
from mtl_sparse.runtime.errors import UserError

Model = Any  # a `multitask.MultiTaskModel` or a `Rewritten`: both have what a run needs of a model
Variables = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Rewritten:
    """A compact model that stands for a `multitask.MultiTaskModel`, for images of the size that its plan was made for.

    It takes variables without the parameters of which nothing remains.

    Attributes:
      dense: the model before compaction, with the heads that remain.
      widths: the plan, as JSON; what config.model.widths holds.
    """

    dense: multitask.MultiTaskModel
    widths: str

    @property
    def heads(self) -> tuple[tuple[str, str, int], ...]:
        """(task name, head kind, outputs) of each task."""
        return self.dense.heads

    @property
    def attach(self) -> tuple[str, ...]:
        """Attachment point of each head; () is the end of the backbone."""
        return self.dense.attach

    def points(self) -> tuple[str, ...]:
        """Return the attachment point of each head."""
        return self.dense.points()

    def clone(self, **changes: Any) -> Model:
        """Return the model with other attributes; with `widths=None`, the dense one."""
        if "widths" in changes and changes["widths"] is None:
            return self.dense.clone(**changes)
        return Rewritten(self.dense.clone(**changes), self.widths)

    def init(self, key: Any, images: Any) -> dict[str, Any]:
        """Return initial variables: those of the dense model that remain."""
        return _without_empty(plans.apply_plan(_plan(self.widths), self.dense.init(key, images)))

    def apply(self, variables: Variables, images: Any, train: bool = False, **options: Any) -> dict[str, Any]:
        """Apply the model.

        Args:
          variables: {"params", "batch_stats"}.
          images: normalized images, of the size that the plan was made for.
          train: must be False.
          **options: further options of a `multitask.MultiTaskModel`, all of which are for training.

        Returns:
          {task: raw prediction}.

        Raises:
          UserError: the model was asked to train, or the images have another size.
        """
        if train or options:
            raise UserError(
                "MODEL_COMPACT",
                f"expected a dense model to train, got a compact one of model.backbone={self.dense.backbone}, which is "
                "for evaluation; train the dense model further, and compact it again",
            )
        rewritten, filled = _function(self.dense, self.widths), _with_empty(_plan(self.widths), variables)
        if isinstance(images.shape[0], int):
            return rewritten(filled, images)
        # Of jax.export: the dense model has other equations there, for which there is no plan.
        found = jax.vmap(lambda image: rewritten(filled, image[None]))(images)
        return {task: jnp.squeeze(raw, 1) for task, raw in found.items()}

    def layer_costs(self, size: tuple[int, int]) -> dict[str, costs.LayerCost]:
        """Return the cost of each convolution and dense layer that remains, see `costs.layers`."""
        found, leaves = {}, _plan(self.widths).leaves
        for layer, before in costs.layers(self.dense, size).items():
            kernel = leaves[f"params/{layer}/kernel"].small
            if 0 in kernel:
                continue
            cut = kernel[:2] != before.kernel[:2] and len(kernel) == 4  # taps that meet padding alone cost nothing
            first = 2 if cut else 0
            macs = before.macs * math.prod(kernel[first:]) // math.prod(before.kernel[first:])
            found[layer] = costs.LayerCost(kernel, macs)
        return found


def build(config: ConfigDict, tasks: Sequence[multitask.HeadSpec], axis_name: str | None = None) -> Model:
    """Build the model of a config, as `multitask.build`; compact if config.widths is set, whatever the backbone is.

    Args:
      config: config.model.
      tasks: specs of the tasks.
      axis_name: pmap axis of the training step; None outside of one.

    Raises:
      UserError: as `multitask.build`; or config.widths is not a plan of this model.
    """
    model = multitask.build(config, tasks, axis_name)
    if not config.widths or config.backbone == backbones.RESNET:
        return model
    try:
        leaves = _plan(config.widths).leaves
    except UserError as error:
        raise UserError(
            "MODEL_WIDTHS_INVALID",
            f"expected config.model.widths as --job=compact writes it, got {config.widths!r:.60}: {error}",
        ) from error
    wanted = multitask.shapes(model)
    differing = [path for path in {**wanted, **leaves} if path not in leaves or leaves[path].shape != wanted.get(path)]
    if differing:
        raise UserError(
            "OPTION_CONFLICT",
            "expected config.tasks and config.model as they were when config.model.widths was written, got a model "
            f"with another {differing[0]}; restore them",
        )
    return Rewritten(model, config.widths)


def compact(
    model: Model,
    variables: Variables,
    size: tuple[int, int],
    *,
    drop_taps: bool = True,
    multiple: int = 1,
) -> tuple[Model, dict[str, Any]]:
    """Return the smaller model with the same outputs, and its variables.

    In float32, channels that are constant are removed as well. The result is for evaluation: in training mode, the
    model has other equations, with gradients written by hand.

    Args:
      model: a dense multi-task model of any backbone; a compact one stays as it is.
      variables: {"params", "batch_stats"} of the model.
      size: (height, width) of the images.
      drop_taps: whether atrous taps that would meet only padding at this size are removed. If not, the model takes
        images of all sizes.
      multiple: widths are filled up to a multiple of it.

    Returns:
      (model, variables): NumPy arrays.

    Raises:
      UserError: as `function.plan`.
    """
    if isinstance(model, Rewritten):
        return model, dict(variables)
    images = [jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)]
    if not drop_taps:
        reach = resnet.OUTPUT_STRIDE * (max(deeplab.RATES) + 1)
        images.append(jax.ShapeDtypeStruct((1, *(max(side, reach) for side in size), 3), jnp.float32))

    def plan(dtype: Any, fold: bool) -> Plan:
        one, also = model.clone(dtype=dtype), [(larger,) for larger in images[1:]]
        return function.plan(one.apply, dict(variables), images[0], multiple=multiple, also=also, fold=fold)

    found = plan(model.dtype, fold=model.dtype == jnp.float32)
    if model.dtype != jnp.float32:  # outputs are also compared in float32, which has other equations
        found = dataclasses.replace(found, partial=found.partial | plan(jnp.float32, fold=False).partial)
    small = Rewritten(model, found.to_json())
    return small, _without_empty(jax.device_get(plans.apply_plan(found, dict(variables))))


def encoded(model: Model) -> str:
    """Return what config.model.widths holds of a compact model."""
    return model.widths if isinstance(model, Rewritten) else model.widths.to_json()


@functools.lru_cache(maxsize=16)
def _function(model: multitask.MultiTaskModel, plan: str) -> function.Function:
    return function.rewrite(model.apply, _plan(plan))


@functools.lru_cache(maxsize=16)
def _plan(text: str) -> Plan:
    return Plan.from_json(text)


def _without_empty(variables: Variables) -> dict[str, Any]:
    """Return variables without empty arrays, which checkpoints cannot hold."""
    flat = traverse_util.flatten_dict(dict(variables))
    return traverse_util.unflatten_dict({path: leaf for path, leaf in flat.items() if 0 not in np.shape(leaf)})


def _with_empty(plan: Plan, variables: Variables) -> dict[str, Any]:
    """Return variables with the empty arrays that the plan has."""
    flat = traverse_util.flatten_dict(dict(variables), sep="/")
    for path, leaf in plan.leaves.items():
        if 0 in leaf.small and path not in flat:
            flat[path] = jnp.zeros(leaf.small, leaf.dtype)
    return traverse_util.unflatten_dict(flat, sep="/")
