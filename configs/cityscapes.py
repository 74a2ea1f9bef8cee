"""Cityscapes with 7 classes and disparity at 128x256, MTAN's data, after LibMTL's protocol (docs/protocols.md).

    python launch.py --config=configs/cityscapes.py --config.data.folder=/data/cityscapes2 \
        --config.model.init_from=resnet50.pth

All else is as in configs/nyuv2_13.py.
"""

import ml_collections

from configs import nyuv2_13


def get_config() -> ml_collections.ConfigDict:
    """Return the config."""
    config = nyuv2_13.get_config()
    config.tasks = ("segmentation", "depth")
    config.data.update(name="cityscapes_7", size=(128, 256), num_classes=7, depth_target="disparity")
    config.train.update(batch_size=64, eval_batch_size=64)
    return config
