"""A backbone of a user's own, as docs/backbones.md shows it, and a narrow EfficientNet-Lite, for tests."""

import contextlib
import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import pytest

from mtl_sparse.models import backbones, depthwise, efficientnet

POINTS = ("stem", "separable")


class Own(nn.Module):
    """One convolution at stride 8, and a separable one."""

    points: tuple[str, ...] = POINTS[-1:]
    dtype: Any = jnp.float32
    axis_name: str | None = None
    bn_momentum: float = 0.9

    @nn.compact
    def __call__(self, x, train=False):
        options = {"momentum": self.bn_momentum, "axis_name": self.axis_name, "dtype": self.dtype}
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, **options)
        conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype)
        x = nn.relu(norm(name="stem_bn")(conv(12, (3, 3), strides=8, name="stem")(x)))
        found = {"stem": x}
        if "separable" in self.points:
            fast = {"feature_group_count": 12, "conv_general_dilated": depthwise.conv}
            x = nn.relu(norm(name="depthwise_bn")(conv(12, (3, 3), name="depthwise", **fast)(x)))
            found["separable"] = nn.relu(norm(name="pointwise_bn")(conv(8, (1, 1), name="pointwise")(x)))
        return tuple(found[point] for point in self.points)


NARROW = (
    efficientnet.Stage(1, 3, 2, 1, 8),
    efficientnet.Stage(2, 5, 2, 2, 8),
    efficientnet.Stage(2, 3, 2, 2, 12),
)
ROWS = {
    "own": backbones.Backbone(Own, POINTS),
    "narrow": backbones.Backbone(
        functools.partial(efficientnet.EfficientNetLite, stages=NARROW, stem=8), efficientnet.points(NARROW)
    ),
}


@contextlib.contextmanager
def registered():
    """Register these backbones, whose steps compile in a third of the time of a ResNet's."""
    with pytest.MonkeyPatch.context() as patched:
        for name, row in ROWS.items():
            patched.setitem(backbones.BACKBONES, name, row)
        yield
