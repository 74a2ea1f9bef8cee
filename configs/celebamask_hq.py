"""CelebAMask-HQ, segmentation with attribute classification, after "Less is More" (Upadhyay et al., CPAL 2024).

    python launch.py --config=configs/celebamask_hq.py --config.data.folder=/data/CelebAMask-HQ
    python launch.py --config=configs/celebamask_hq.py:seg+male --config.data.folder=/data/CelebAMask-HQ

The name after the colon is a task set of the paper's Table 2. Options that are not set here are those of
configs/nyu.py.
"""

import ml_collections

from configs import nyu
from mtl_sparse.runtime.errors import UserError

TABLE2 = {
    "seg": ("segmentation",),
    "male": ("attribute:Male",),
    "smile": ("attribute:Smiling",),
    "seg+male": ("segmentation", "attribute:Male"),
    "male+smile": ("attribute:Male", "attribute:Smiling"),
    "seg+male+smile": ("segmentation", "attribute:Male", "attribute:Smiling"),
}
# The paper names three classes, but not their parts. Here, skin is the face with everything on it and the ears.
CLASSES = (
    ("background", ()),  # also every part of no class: neck, cloth, hat, jewelry
    ("skin", tuple("skin nose eye_g l_eye r_eye l_brow r_brow l_ear r_ear mouth u_lip l_lip".split())),
    ("hair", ("hair",)),
)


def get_config(tasks: str = "seg+male+smile") -> ml_collections.ConfigDict:
    """Return the config of a task set.

    Args:
      tasks: a key of `TABLE2`.

    Raises:
      UserError: an unknown task set.
    """
    if tasks not in TABLE2:
        raise UserError("OPTION_UNKNOWN_VALUE", f"unknown task set {tasks!r}; those of Table 2 are {', '.join(TABLE2)}")
    config = nyu.get_config()
    config.tasks = TABLE2[tasks]
    config.data.update(name="celebamask_hq", num_classes=len(CLASSES), classes=CLASSES, split="")
    config.train.update(batch_size=32, eval_batch_size=32, early_stop_epochs=10)
    return config
