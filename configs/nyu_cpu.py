"""NYU-v2 with small images and a small model, for a CPU. Data and method are those of configs/nyu.py.

    python launch.py --config=configs/nyu_cpu.py --config.data.folder=/data/NYUD_MT

Compare its results only with other results of this config.
"""

import ml_collections

from configs import nyu


def get_config() -> ml_collections.ConfigDict:
    """Return the config."""
    config = nyu.get_config()
    config.data.update(size=(48, 64))  # 4:3, as the images; predictions at 6 x 8
    config.model.update(depth=18, head_features=64, bn_momentum=0.97)
    config.optimizer.update(learning_rate=1e-3, schedule="cosine")
    config.train.update(batch_size=8, epochs=20, early_stop_epochs=0, bn_frames=128)
    # Prune in epochs 7 to 13: earlier, the model has learned too little and the wrong groups are pruned
    # (docs/results.md).
    config.sparsity.update(start_at=0.3, warmup=0.056, warmup_steps=0, target_ramp=0.45)
    config.run.update(num_workers=0, summary_rounds=0)
    return config
