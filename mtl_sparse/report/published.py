"""The paper's tables: test metrics and their standard deviation over five runs, to compare with.

Source: Upadhyay et al., "Less is More", CPAL 2024, Tables 1 to 3. Their lambdas are inferred from the configs of the
reference implementation. IoU, CS and MAE are `image_iou`, `cosine` and `mae_normalized` here: CS at the resolution of
the input, to which the reference implementation resizes the predicted normals, the others at that of the prediction.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Published:
    """A row of the paper's tables.

    Attributes:
      tasks: task -> (mean, standard deviation) of its metric.
      group: fraction of groups that are zero.
      parameter: fraction of weights in zero groups; under l1, of all weights that are zero.
    """

    tasks: dict[str, tuple[float, float]]
    group: float
    parameter: float


# Sparsity in percent; tasks in the order of the paper.
_NYU = ("segmentation", "normals", "depth")
_ROWS = (
    # tasks, penalty, lambda, segmentation, normals, depth, groups, parameters
    (("segmentation",), "group_lasso", 0.0, (0.3140, 0.0350), None, None, 0.0, 0.0),
    (("segmentation",), "group_lasso", 1e-6, (0.3203, 0.0096), None, None, 0.0, 0.0),
    (("segmentation",), "group_lasso", 1e-5, (0.3338, 0.0068), None, None, 35.77, 43.05),
    (("depth",), "group_lasso", 0.0, None, None, (0.1645, 0.0016), 0.0, 0.0),
    (("depth",), "group_lasso", 1e-6, None, None, (0.1572, 0.0017), 21.95, 31.11),
    (("depth",), "group_lasso", 1e-5, None, None, (0.1625, 0.0015), 89.90, 93.57),
    (("normals",), "group_lasso", 0.0, None, (0.7077, 0.0047), None, 0.0, 0.0),
    (("normals",), "group_lasso", 1e-6, None, (0.7903, 0.0041), None, 17.87, 20.42),
    (("normals",), "group_lasso", 1e-5, None, (0.7699, 0.0058), None, 55.62, 64.39),
    (("segmentation", "depth"), "group_lasso", 0.0, (0.2233, 0.0094), None, (0.1656, 0.0030), 0.0, 0.0),
    (("segmentation", "depth"), "group_lasso", 1e-6, (0.3308, 0.0049), None, (0.1379, 0.0034), 0.0, 0.0),
    (("segmentation", "depth"), "group_lasso", 1e-5, (0.3345, 0.0073), None, (0.1389, 0.0027), 66.06, 73.58),
    (("segmentation", "normals"), "group_lasso", 0.0, (0.2276, 0.0064), (0.7072, 0.0087), None, 0.0, 0.0),
    (("segmentation", "normals"), "group_lasso", 1e-6, (0.3353, 0.0082), (0.7797, 0.0128), None, 13.51, 15.34),
    (("segmentation", "normals"), "group_lasso", 1e-5, (0.3480, 0.0180), (0.7833, 0.0058), None, 64.05, 72.97),
    (("normals", "depth"), "group_lasso", 0.0, None, (0.6905, 0.0037), (0.1719, 0.0038), 0.0, 0.0),
    (("normals", "depth"), "group_lasso", 1e-6, None, (0.7609, 0.0279), (0.1299, 0.0030), 60.62, 69.83),
    (("normals", "depth"), "group_lasso", 1e-5, None, (0.7967, 0.0042), (0.1332, 0.0015), 88.62, 93.38),
    (_NYU, "group_lasso", 0.0, (0.2171, 0.0128), (0.6948, 0.0080), (0.1657, 0.0034), 0.0, 0.0),
    (_NYU, "group_lasso", 1e-6, (0.3418, 0.0062), (0.7814, 0.0108), (0.1301, 0.0064), 21.80, 23.85),
    (_NYU, "group_lasso", 1e-5, (0.3394, 0.0107), (0.7857, 0.0076), (0.1336, 0.0029), 69.72, 76.72),
    (("segmentation", "normals"), "l1", 1e-5, (0.2962, 0.0050), (0.7421, 0.0048), None, 0.59, 74.31),
    (("normals", "depth"), "l1", 1e-5, None, (0.7285, 0.0096), (0.1545, 0.0011), 5.46, 77.78),
    (_NYU, "l1", 1e-5, (0.2900, 0.0258), (0.7389, 0.0187), (0.1520, 0.0052), 1.68, 69.92),
)
_CELEB = ("segmentation", "attribute:Male", "attribute:Smiling")
_CELEB_ROWS = (
    # tasks, lambda, segmentation, male, smile, groups, parameters
    (_CELEB[:1], 0.0, (0.8885, 0.0048), None, None, 0.0, 0.0),
    (_CELEB[:1], 1e-5, (0.9084, 0.0033), None, None, 58.1, 71.94),
    (_CELEB[1:2], 0.0, None, (0.6296, 0.0019), None, 0.0, 0.0),
    (_CELEB[1:2], 1e-5, None, (0.6284, 0.0029), None, 87.32, 92.31),
    (_CELEB[2:], 0.0, None, None, (0.5204, 0.0026), 0.0, 0.0),
    (_CELEB[2:], 1e-5, None, None, (0.5238, 0.0004), 100.0, 100.0),
    (_CELEB[:2], 0.0, (0.8363, 0.0028), (0.9103, 0.0217), None, 0.0, 0.0),
    (_CELEB[:2], 1e-5, (0.9136, 0.0024), (0.9726, 0.0035), None, 67.66, 77.77),
    (_CELEB[1:], 0.0, None, (0.6284, 0.0108), (0.5242, 0.0006), 0.0, 0.0),
    (_CELEB[1:], 1e-5, None, (0.7275, 0.0016), (0.5308, 0.0103), 63.18, 78.1),
    (_CELEB, 0.0, (0.8123, 0.0024), (0.8641, 0.0269), (0.5238, 0.0012), 0.0, 0.0),
    (_CELEB, 1e-5, (0.9040, 0.0035), (0.8514, 0.1578), (0.5241, 0.0760), 77.1, 83.41),
)


def _entry(tasks, figures, groups, parameters) -> Published:
    found = {task: figure for task, figure in zip(tasks, figures, strict=True) if figure is not None}
    return Published(found, groups / 100, parameters / 100)


# (data set, tasks, penalty, lambda) -> row.
TABLES = {
    ("nyud_mt", frozenset(tasks), penalty, lambda_): _entry(_NYU, figures, groups, parameters)
    for tasks, penalty, lambda_, *figures, groups, parameters in _ROWS
} | {
    ("celebamask_hq", frozenset(tasks), "group_lasso", lambda_): _entry(_CELEB, figures, groups, parameters)
    for tasks, lambda_, *figures, groups, parameters in _CELEB_ROWS
}


def lookup(config: Mapping[str, Any]) -> Published | None:
    """Return the published row for a run's config.json.

    Returns:
      None unless the run has the paper's backbone, the published data in the paper's size, and one of its lambdas.
    """
    data, model, sparsity = config["data"], config["model"], config["sparsity"]
    backbone = model.get("backbone", "resnet"), model["depth"], model["width"]
    is_papers = (list(data["size"]), *backbone) == ([256, 256], "resnet", 50, 64)
    is_other = sparsity["target"] or sparsity.get("prune") or model.get("attach")
    if not is_papers or is_other or data["embedded"]["frames"]:
        return None
    return TABLES.get((data["name"], frozenset(config["tasks"]), sparsity["penalty"], sparsity["lambda_"]))
