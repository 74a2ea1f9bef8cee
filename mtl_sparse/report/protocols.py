"""Protocols of MTAN's data sets: their metrics, and published figures to print beside ours (docs/protocols.md).

Three protocols on NYU-v2 are not comparable with one another: **A**, MTAN's data and split with SegNet, batch 2, no
pretraining; **B**, LibMTL's, the same data with a dilated ResNet-50 from ImageNet and DeepLab heads; **C**, NYUD-MT
with 40 classes, as in "Less is More" (`published`). Signs here are those of gains: higher is better. Papers under A
print the opposite sign.
"""

from typing import NamedTuple


class Metric(NamedTuple):
    """A metric of a protocol.

    Attributes:
      key: its name in results.json, without the task.
      name: its name in tables.
      higher_is_better: whether a larger value is better.
    """

    key: str
    name: str
    higher_is_better: bool


_SEGMENTATION = (Metric("miou", "mIoU", True), Metric("pixel_accuracy", "Pix Acc", True))
_DEPTH = (Metric("mae", "Abs Err", False), Metric("abs_rel", "Rel Err", False))
_NORMALS = (
    Metric("mean_angle", "Mean", False),
    Metric("median_angle", "Median", False),
    Metric("within_11.25", "<11.25", True),
    Metric("within_22.5", "<22.5", True),
    Metric("within_30", "<30", True),
)
# Data set -> task -> metrics, at the resolution of the labels.
METRICS: dict[str, dict[str, tuple[Metric, ...]]] = {
    "nyuv2_13": {"segmentation": _SEGMENTATION, "depth": _DEPTH, "normals": _NORMALS},
    "cityscapes_7": {"segmentation": _SEGMENTATION, "depth": _DEPTH},
}


class Published(NamedTuple):
    """A published result.

    Attributes:
      protocol: "A" or "B".
      method: the weighting, or "single tasks".
      source: where the figures are from.
      values: values of the metrics in the order of `METRICS`, in their units here; () if only a gain was recorded.
      gain: percent over single tasks, each metric with the same weight; None if there is none.
      over_equal: percent over equal weights, the mean over tasks of the mean over their metrics; None if there is none.
    """

    protocol: str
    method: str
    source: str
    values: tuple[float, ...] = ()
    gain: float | None = None
    over_equal: float | None = None


_NASH = "Navon et al. 2022 (2202.01017)"
_SEGNET, _RESNET = "LibMTL, SegNet, rerun", "LibMTL, ResNet-50, one run"
PUBLISHED: dict[str, tuple[Published, ...]] = {
    "nyuv2_13": (
        Published("A", "single tasks", _NASH, (0.3830, 0.6376, 0.6754, 0.2780, 25.01, 19.21, 0.3014, 0.5720, 0.6915)),
        Published(
            "A", "equal weights", _NASH, (0.3929, 0.6533, 0.5493, 0.2263, 28.15, 23.96, 0.2209, 0.4750, 0.6108), -5.59
        ),
        Published("A", "UW", _NASH, (0.3687, 0.6317, 0.5446, 0.2260, 27.04, 22.61, 0.2354, 0.4905, 0.6365), -4.06),
        Published("A", "PCGrad", _NASH, (0.3806, 0.6464, 0.5550, 0.2325, 27.41, 22.80, 0.2386, 0.4983, 0.6314), -3.97),
        Published("A", "CAGrad", _NASH, (0.3979, 0.6549, 0.5486, 0.2250, 26.31, 21.58, 0.2561, 0.5236, 0.6558), -0.20),
        Published("A", "Nash-MTL", _NASH, (0.4013, 0.6593, 0.5261, 0.2171, 25.26, 20.08, 0.2840, 0.5547, 0.6815), 4.04),
        Published("A", "equal weights", _SEGNET, gain=-2.35),
        Published("A", "UW", _SEGNET, gain=0.09),
        Published("A", "GradNorm", _SEGNET, gain=4.03),
        Published("A", "CAGrad", _SEGNET, gain=3.64),
        Published("A", "Nash-MTL", _SEGNET, gain=4.37),
        Published("B", "GLS", _RESNET, over_equal=1.82),
        Published("B", "CAGrad", _RESNET, over_equal=1.60),
        Published("B", "Nash-MTL", _RESNET, over_equal=1.52),
        Published("B", "IMTL", _RESNET, over_equal=0.66),
        Published("B", "UW", _RESNET, over_equal=0.30),
    ),
}
