"""NYU-v2, segmentation + depth + normals, after "Less is More" (Upadhyay et al., CPAL 2024).

    python launch.py --config=configs/nyu.py --config.data.folder=/data/NYUD_MT

Every number that affects a result stands here; the other configs change some of them. They are the paper's, but for
fixed_norm, anneal_revival, warmup_steps and bias_correction (README, "The method"), and a run stops early as a whole,
not task by task.
"""

import ml_collections
from ml_collections.config_dict import create


def get_config() -> ml_collections.ConfigDict:
    config = create(
        seed=0,
        # Any of these, "edge", and "attribute:NAME" where the data have it, see configs/celebamask_hq.py.
        tasks=("segmentation", "depth", "normals"),
        data=create(
            name="nyud_mt",  # or "celebamask_hq", or one of your own (README, "A data set of your own")
            folder="",  # the published NYUD_MT folder
            prepared="",  # where its array_record form is kept; "" is <folder>.tfds beside it
            size=(256, 256),  # height, width; plain resize
            num_classes=40,  # at most 255
            classes=(),  # of celebamask_hq: pairs (class, its parts)
            # The split: "scenes" holds out whole scenes for validation, "" single frames (where the folder has no
            # gt_sets/test.txt); a JSON file with the lists train, validation and test of frame names is your own.
            split="scenes",
            depth_target="normalized",  # the paper's; "metres" trains L1 in metres
            unit_range=False,  # images in [0, 1], as in the released code, not normalised by ImageNet's mean and spread
            flip=False,  # mirror every second training frame
            max_scale=1.0,  # random zoom up to this; 1.5 is usual
            # Embedded frames, drawn as needed, in place of a folder where frames > 0 (see input_pipeline/synthetic/).
            embedded=create(frames=0, height=0, width=0, seed=0, folder="runs/data"),
        ),
        model=create(
            depth=50,  # 10, 18, 50 or 101
            width=64,  # channels of the first stage
            stem="deep",  # "7x7" is torchvision's, "resnet_d" timm's resnet50d
            # What the training starts from: a run's folder (its best checkpoint), or a file of ImageNet weights for the
            # backbone, of torchvision's or timm's ResNet (.pth or .safetensors with the extra "torch", or .npz).
            init_from="",
            head_features=256,
            # Where each task's head reads the backbone, in the order of tasks, such as "layer3_3/conv1"; () is its end.
            attach=(),
            widths="",  # of every layer, as written by --job=compact; "" is dense, from the three above
            dropout=0.3,
            classifier_features=(64, 32),  # of an attribute's head: of its convolution and its dense layer
            classifier_dropout=(0.6, 0.4),  # before its two dense layers
            bn_momentum=0.9,  # share of the old running statistics that a step keeps
            dtype="float32",  # of the computation; "bfloat16" keeps parameters and BatchNorm statistics float32
        ),
        loss=create(
            weighting="uncertainty",  # or "equal", "fixed"
            weights=(1.0, 1.0, 1.0),  # for "fixed", in the order of tasks
            label_smoothing=0.1,  # of the segmentation
            pos_weight=1.0,  # of an attribute: counts an image that has it this many times
            threshold=0.5,  # probability from which on an image is said to have an attribute
        ),
        optimizer=create(
            learning_rate=1e-4,
            b1=0.9,
            b2=0.999,
            eps=1e-8,
            weight_decay=0.1,  # decoupled, on kernels
            l2=0.0,  # in the gradient, on all of the model, as in the paper's dense baselines (0.01, weight_decay=0)
            restart_each_epoch=False,  # Adam's moments and step count; True is what the released code does
            schedule="plateau",  # or "constant", "cosine"
            plateau_epochs=5,  # stale epochs before the learning rate is multiplied by ...
            plateau_factor=0.1,
            min_learning_rate=1e-7,  # of "plateau", and the end of "cosine"
        ),
        sparsity=create(
            lambda_=1e-5,  # strength of the penalty; 0 is dense
            # Fraction of groups (under l1: of weights) to be zero: finds lambda, starting from lambda_. 0 is none.
            target=0.0,
            target_ramp=0.4,  # fraction of the run over which the scheduled sparsity rises to the target
            target_freeze=0.75,  # fraction of the run after which lambda stays; the best checkpoint is a later one
            # Fraction of the run after which the zero pattern stays and the rest trains without the penalty; the
            # best checkpoint is a later one. 0 is none.
            debias_at=0.0,
            penalty="group_lasso",  # or "group_mcp", "l1"
            gamma=1000.0,  # of group_mcp: a group of root mean square above gamma * lambda is not shrunk
            group_weights="sqrt_size",  # or "none"
            # Where the penalty starts: after a fraction of the run (start_at) or a number of steps (start_step).
            start_at=0.0,
            start_step=0,
            # How long lambda then grows from 0: a fraction of the run (warmup) or a number of steps (warmup_steps). In
            # Adam's first steps v, which is the metric, averages a few batches: weights whose gradient happens to be
            # small there would shrink for it. 0 is published. In a short run the warm-up ends before lambda has to
            # have its full value.
            warmup=0.0,
            warmup_steps=100,
            metric="adaptive",  # prox in Adam's metric; "plain" is the closed form
            bias_correction=True,  # of v in that metric; False is published
            fixed_norm=True,  # False is the published behavior; see README, "Fixed-norm kernels"
            # A fixed-norm kernel keeps its initial norm, which voids its weight decay. True: it keeps the norm that
            # each step has without the penalty, on which weight decay acts as in a dense training.
            norm_decays=False,
            # With a target, layers that every path from the images to a head passes keep at least one group.
            keep_connected=True,
            anneal_revival=True,  # a falling rate makes it harder to come back; False is published
            penalty_in_gradient=False,  # besides the prox; True is what the released code does
            scope="backbone",  # or "all": the heads' kernels, too
        ),
        train=create(
            batch_size=16,
            eval_batch_size=16,
            epochs=1000,
            early_stop_epochs=25,  # without a better validation score; 0 is never
            # Training frames, taken as one batch, whose BatchNorm statistics a validation and the best checkpoint have
            # in place of the running ones, which batches of few frames mislead (docs/results.md). 0: the running ones.
            bn_frames=0,
        ),
        # --job=compact, and what --job=benchmark and --job=export make compact.
        compact=create(
            multiple=4,  # widths are filled up to it: on a CPU 4 was faster than 1, which is smallest
            drop_taps=True,  # atrous taps that meet only padding at data.size go, too
        ),
        # --job=lomt: a layer is active in a run if more than the fraction `active` of its groups is non-zero; a task
        # keeps the layers that are active in at least the fraction `vote` of its runs.
        lomt=create(active=0.01, vote=1.0),
        benchmark=create(batch_sizes=(1, 16), rounds=20),
        export=create(
            format="stablehlo",  # or "onnx"
            compact=True,  # the compact model; False is the run's own
        ),
        # How the run goes; none of these changes what comes out of it.
        run=create(
            num_workers=4,  # processes that load data; 0 loads in threads
            log_every_steps=50,
            checkpoint_every_steps=500,  # besides the end of every epoch
            progress_every_secs=30.0,
            # Steps in a row that may be not finite: they change nothing and are counted. 0: the first ends the run.
            skip_not_finite=0,
            sample_frames=6,  # test frames on the sheet of pictures
            summary_rounds=10,  # timings of dense and compact model at the end of a training; 0 is none
        ),
    )
    return config.lock()  # an unknown field raises
