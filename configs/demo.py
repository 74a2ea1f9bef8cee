"""NYU-v2 demo on embedded rooms: a small ResNet-18 and small images, in minutes on two cores."""

import ml_collections

from configs import nyu


def get_config() -> ml_collections.ConfigDict:
    """Return the config."""
    config = nyu.get_config()
    config.data.embedded.update(frames=480, height=64, width=96)
    config.data.size = (64, 96)
    config.model.update(depth=18, width=32, head_features=64, bn_momentum=0.97)
    config.optimizer.update(learning_rate=2e-3, schedule="cosine", weight_decay=0.0)
    config.sparsity.update(target=0.7, warmup=0.182, warmup_steps=0)
    config.train.update(epochs=25, early_stop_epochs=0)
    config.run.update(num_workers=0, log_every_steps=10, progress_every_secs=10.0)
    return config
