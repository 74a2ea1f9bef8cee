"""Pixel-level and image-level tasks together, in minutes on two cores: embedded faces, a small ResNet-18."""

from configs import celebamask_hq


def get_config(tasks: str = "seg+male+smile"):
    config = celebamask_hq.get_config(tasks)
    config.data.embedded.update(frames=1000, height=64, width=64)
    config.data.size = (64, 64)
    config.model.update(depth=18, width=32, head_features=64, bn_momentum=0.97)
    config.optimizer.update(learning_rate=2e-3, schedule="cosine", weight_decay=0.0)
    config.sparsity.target = 0.7
    config.train.update(batch_size=16, epochs=25, early_stop_epochs=0)
    config.run.update(num_workers=0, log_every_steps=10, progress_every_secs=10.0)
    return config
