"""CelebAMask-HQ demo on embedded faces, with pixel-level and image-level tasks, in minutes on two cores."""

import ml_collections

from configs import celebamask_hq


def get_config(tasks: str = "seg+male+smile") -> ml_collections.ConfigDict:
    """Return the config of a task set of configs/celebamask_hq.py."""
    config = celebamask_hq.get_config(tasks)
    config.data.embedded.update(frames=2400, height=80, width=80)
    config.data.update(size=(80, 80), flip=True)
    config.model.update(depth=18, width=32, head_features=64, bn_momentum=0.97, classifier_dropout=(0.2, 0.2))
    # A smile covers few pixels. With equal weights, it is learned long after the other tasks.
    weights = {"segmentation": 1.0, "attribute:Male": 1.0, "attribute:Smiling": 2.0}
    config.loss.update(weighting="fixed", weights=tuple(weights[task] for task in config.tasks))
    config.optimizer.update(learning_rate=5e-4, schedule="cosine", weight_decay=0.0)
    config.sparsity.update(target=0.6, start_at=0.231, warmup=0.0855, warmup_steps=0)
    config.train.update(batch_size=16, epochs=13, early_stop_epochs=0)
    config.run.update(num_workers=0, log_every_steps=10, progress_every_secs=10.0)
    return config
