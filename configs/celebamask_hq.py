"""CelebAMask-HQ, segmentation with attribute classification, after "Less is More" (Upadhyay et al., CPAL 2024).

    python launch.py --config=configs/celebamask_hq.py --config.data.folder=/data/CelebAMask-HQ
    python launch.py --config=configs/celebamask_hq.py:seg+male --config.data.folder=/data/CelebAMask-HQ

The name after the colon is one of the task sets of the paper's Table 2. What stands here differs from configs/nyu.py.
"""

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
# The paper names its three classes and not their parts: here skin is the face with all that is on it, ears included.
CLASSES = (
    ("background", ()),  # and every part that no class names: neck, cloth, hat, jewellery
    ("skin", tuple("skin nose eye_g l_eye r_eye l_brow r_brow l_ear r_ear mouth u_lip l_lip".split())),
    ("hair", ("hair",)),
)


def get_config(tasks: str = "seg+male+smile"):
    if tasks not in TABLE2:
        raise UserError(f"unknown task set {tasks!r}; those of Table 2 are {', '.join(TABLE2)}")
    config = nyu.get_config()
    config.tasks = TABLE2[tasks]
    config.data.update(name="celebamask_hq", num_classes=len(CLASSES), classes=CLASSES, split="")
    config.train.update(batch_size=32, eval_batch_size=32, early_stop_epochs=10)
    return config
