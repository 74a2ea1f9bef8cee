"""NYU-v2 with 13 classes at 288x384, MTAN's data, after LibMTL's protocol (B in docs/protocols.md).

    python launch.py --config=configs/nyuv2_13.py --config.data.folder=/data/nyuv2 \
        --config.model.init_from=resnet50.pth

/data/nyuv2 has the folders train and val (input_pipeline/mtan.py); resnet50.pth has torchvision's ImageNet weights,
without which this is another protocol. The penalty is that of configs/nyu.py; --config.sparsity.lambda_=0 is the dense
model of the protocol. --config.data.split=all trains on all of train, as the protocol does.

LibMTL takes the loss at full resolution, and may choose the best epoch on the test images; here the loss is at an
eighth of the resolution, and the test images choose nothing. Options that are not set here are those of configs/nyu.py.
"""

import ml_collections

from configs import nyu


def get_config() -> ml_collections.ConfigDict:
    """Return the config."""
    config = nyu.get_config()
    config.data.update(
        name="nyuv2_13", size=(288, 384), num_classes=13, split="", depth_target="metres", unit_range=True
    )
    config.model.update(stem="7x7")  # as in torchvision
    config.loss.update(weighting="equal", label_smoothing=0.0)
    config.optimizer.update(learning_rate=1e-4, weight_decay=0.0, l2=1e-5, schedule="step")  # Adam with L2
    config.train.update(batch_size=8, eval_batch_size=8, epochs=200, early_stop_epochs=0)
    return config
