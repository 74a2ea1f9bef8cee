"""NYU-v2, segmentation + depth + normals, after "Less is More" (Upadhyay et al., CPAL 2024).

    python launch.py --config=configs/nyu.py --config.data.folder=/data/NYUD_MT

Every option that affects a result is here; the other configs change some of them. The defaults are the paper's values,
except for fixed_norm, anneal_revival, warmup_steps and bias_correction (docs/method.md), and except that early
stopping ends the whole run; train.early_stop="tasks" stops single tasks, as in the paper.
"""

import ml_collections
from ml_collections.config_dict import create


def get_config() -> ml_collections.ConfigDict:
    """Return the config, locked against unknown options."""
    config = create(
        seed=0,  # of initial weights, order of the data, augmentations and dropout
        # "segmentation", "depth", "normals", "edge", and, for data with attributes, "attribute:NAME".
        tasks=("segmentation", "depth", "normals"),
        data=create(
            # Or "celebamask_hq", "nyuv2_13", "cityscapes_7", or a registered one (docs/extending.md).
            name="nyud_mt",
            folder="",  # the published folder, here NYUD_MT
            prepared="",  # folder of the prepared array_record files; "" is <folder>.tfds
            size=(256, 256),  # (height, width) of the images after resizing, multiples of 8
            num_classes=40,  # of the segmentation, without void; 1 to 255
            classes=(),  # for celebamask_hq: pairs (class, its parts)
            # Without gt_sets/test.txt, "scenes" holds out whole scenes for validation, and "" single images; for "all"
            # see docs/protocols.md. Any other value is the path of a JSON file with the lists "train", "validation" and
            # "test" of sample names.
            split="scenes",
            # "normalized" is the paper's; "metres" trains L1 in meters, "disparity" L1 on inverse depth.
            depth_target="normalized",
            unit_range=False,  # True: images in [0, 1], as in the reference implementation, not ImageNet-normalized
            flip=False,  # True mirrors training images with probability 1/2
            max_scale=1.0,  # random zoom between 1 and this factor, at most 10; 1.5 is common
            scales=(),  # or random zoom by one of these factors; MTAN's are (1.0, 1.2, 1.5)
            # frames > 0 draws that many embedded images (input_pipeline/synthetic/) instead of reading data.folder.
            embedded=create(frames=0, height=0, width=0, seed=0, folder="runs/data"),
        ),
        model=create(
            backbone="resnet",  # or "efficientnet_lite0", or a registered one (docs/backbones.md)
            depth=50,  # of the ResNet: 10, 18, 50 or 101
            width=64,  # channels of the ResNet's first stage
            stem="deep",  # of the ResNet; or "7x7", as in torchvision, or "resnet_d", as in timm's resnet50d
            # Initial weights: a run's folder (its best checkpoint), or a file of ImageNet weights for the backbone from
            # torchvision's or timm's ResNet, or of EfficientNet-Lite0 (.npz, or .pth and .safetensors with the extra
            # "torch"). "": random.
            init_from="",
            head_features=256,  # channels of a pixel-level head
            # For each task, the layer whose output its head takes, such as "layer3_3/conv1", or "layer3_3/conv1:raw",
            # the convolution's output before BatchNorm and ReLU, as published; () is the last layer.
            attach=(),
            widths="",  # widths of all layers, written by --job=compact; "": dense, from depth, width, head_features
            dropout=0.3,  # dropout rate of the pixel-level heads
            classifier_features=(64, 32),  # widths of an attribute head's convolution and first dense layer
            classifier_dropout=(0.6, 0.4),  # dropout rates before its two dense layers
            bn_momentum=0.9,  # fraction of the running statistics that a step keeps
            dtype="float32",  # of the computation; with "bfloat16", parameters and BatchNorm statistics stay float32
        ),
        loss=create(
            # How the tasks are combined (docs/weighting.md): by their losses, "uncertainty", "equal", "fixed", "si",
            # "uw_so", "dwa", "rlw", "gls", "stch", "imtl_l", "famo"; or by the gradients of the backbone, "gradnorm",
            # "pcgrad", "mgda", "cagrad", "imtl_g", "nash", "aligned", "fairgrad", "upgrad".
            weighting="uncertainty",
            weights=(1.0, 1.0, 1.0),  # task weights for "fixed", in the order of tasks
            # Gradients that the methods by gradients compare: in the backbone's "params", or, in less time, in the
            # "features" that the heads read.
            gradients_of="params",
            # Options of single methods. The defaults are published values; papers tune uw_so_temperature and stch_mu.
            options=create(
                uw_so_temperature=1.0,
                dwa_temperature=2.0,
                stch_mu=1.0,
                stch_warmup_epochs=4,  # epochs before the one that measures the losses to compare with
                famo_learning_rate=0.025,
                famo_weight_decay=1e-3,
                gradnorm_alpha=1.5,
                gradnorm_learning_rate=0.025,
                cagrad_c=0.4,
                fairgrad_alpha=2.0,
            ),
            label_smoothing=0.1,  # of the segmentation
            pos_weight=1.0,  # loss weight of images that have an attribute, relative to those that do not
            threshold=0.5,  # probability from which an image is predicted to have an attribute
        ),
        optimizer=create(
            learning_rate=1e-4,  # at the start of the schedule
            # Of Adam: decay rates of its two moments, and the term that keeps its denominator from zero.
            b1=0.9,
            b2=0.999,
            eps=1e-8,
            weight_decay=0.1,  # decoupled, on kernels
            # L2 penalty in the gradient, on all parameters of the model; 0.01 (with weight_decay=0) is the paper's
            # dense baseline.
            l2=0.0,
            restart_each_epoch=False,  # True resets Adam's moments and step count, as in the reference implementation
            schedule="plateau",  # or "constant", "cosine", "step"
            plateau_epochs=5,  # epochs without improvement before the learning rate decreases
            plateau_factor=0.1,  # factor of the decrease
            step_epochs=100,  # of "step": epochs between decreases of the learning rate
            step_factor=0.5,  # of "step": factor of a decrease
            min_learning_rate=1e-7,  # lower bound of "plateau" and "step", and final value of "cosine"
        ),
        sparsity=create(
            lambda_=1e-5,  # weight of the sparsity penalty; 0 trains a dense model
            # Target fraction of zero groups (with l1: of zero weights). lambda then starts at lambda_ and is adjusted
            # to reach the target. 0: lambda is fixed.
            target=0.0,
            # In place of target: the fraction of the model's multiply-accumulates (MACs) or of its parameters that
            # compaction is to leave. 0: no such target.
            target_macs=0.0,
            target_params=0.0,
            # Target fraction of zero groups inside the heads, which then have their own lambda. 0: not penalized.
            head_target=0.0,
            # Both are fractions of the run from the start of the penalty. The scheduled sparsity rises to the target
            # during target_ramp. From target_freeze on lambda is constant; the best checkpoint is chosen after it.
            target_ramp=0.4,
            target_freeze=0.75,
            # Fraction of the run at which debiasing starts: zero groups stay zero, and the other weights train without
            # the penalty. The best checkpoint is chosen from this phase. 0: no debiasing.
            debias_at=0.0,
            # A baseline without a penalty: train dense, and after the fraction prune_at of the epochs zero the groups
            # of the least importance, "norm" or "taylor", until the target is reached; then train the rest. Or the
            # folder of a pruned run: what is zero there is zero from the first step on, and the target must be 0.
            prune="",
            prune_at=0.5,
            # "group_lasso"; "group_mcp"; "group_l0", the sum of the weights of the groups that are not zero; or "l1"
            penalty="group_lasso",
            gamma=1000.0,  # of group_mcp: groups of root mean square above gamma * lambda are not shrunk
            # Groups of weights: "input", the input channels of each kernel, as in the paper; or "coupled": for each
            # channel, its input slices in all kernels that read it, in the heads too, so that a zero group removes it.
            groups="input",
            # Weight of a group in the penalty: "sqrt_size", the square root of its size; "none", 1; or "macs",
            # sqrt_size times the MACs that each of its weights costs, relative to the mean, to the power macs_exponent.
            group_weights="sqrt_size",
            macs_exponent=0.5,
            # Limits: at least so many groups of each kernel stay, at most this fraction of them is removed, and layers
            # whose names match one of the regular expressions in `exclude`, such as "backbone/stem_.*", stay whole.
            at_least=1,
            max_removed=1.0,
            exclude=(),
            # Start of the penalty: a fraction of the run (start_at) or a step (start_step). Set at most one of them.
            start_at=0.0,
            start_step=0,
            # Linear warm-up of lambda from 0: a fraction of the run (warmup) or a number of steps (warmup_steps). Set
            # at most one of them. In Adam's first steps, the second moment v, which defines the metric, averages few
            # batches; without a warm-up, weights with small gradients in these batches would be shrunk too much. The
            # published method has 0. In short runs, the warm-up is shortened to end before target_freeze, debias_at or
            # the end of the run.
            warmup=0.0,
            warmup_steps=100,
            # Metric of the proximal operator: "adaptive", Adam's; "group", the mean of Adam's over each group; "plain",
            # the Euclidean one; or, for group_l0, "fisher", the square of Adam's.
            metric="adaptive",
            bias_correction=True,  # of v in that metric; the published method has False
            # Keep the norm of kernels; the published method has False. For group_l0, False is better (docs/method.md).
            fixed_norm=True,
            # Norm of a fixed-norm kernel: "initial", its norm at init; "rms", the root mean square that its nonzero
            # weights have at init, so that the norm falls with the groups that are left; "unpenalized", the norm that
            # each step gives it without the penalty, so that weight decay acts as in dense training.
            norm="initial",
            # With a target, keep at least one group in each layer that all paths from the images to a head cross.
            keep_connected=True,
            anneal_revival=True,  # regrowth becomes harder as the learning rate falls; the published method has False
            penalty_in_gradient=False,  # True also adds the penalty's gradient, as in the reference implementation
            scope="backbone",  # or "all", which includes the kernels of the heads
        ),
        train=create(
            batch_size=16,  # of all devices together
            eval_batch_size=16,  # of the evaluation, also of all devices together
            epochs=1000,  # at most; early stopping may end the run before
            # Epochs without improvement before an early stop; 0: never. "run": the score of all tasks has not improved,
            # and the run stops. "tasks", as in the paper: the loss of one task has not improved; the task leaves the
            # objective, its head is frozen, and the run ends when all tasks have stopped.
            early_stop_epochs=25,
            early_stop="run",
            # Number of training images, in one batch, whose BatchNorm statistics replace the running statistics for
            # validation and in the best checkpoint; small batches bias the latter
            # (docs/engineering_notes.md). 0: running ones.
            bn_frames=0,
        ),
        # --job=compact, and the compact models of --job=benchmark and --job=export.
        compact=create(
            # Tasks whose heads stay, such as "depth" or "depth,normals"; everything that only the other heads read is
            # removed with them. "": all. The report at the end of a training run is of all tasks.
            tasks="",
            multiple=4,  # widths are padded to a multiple of it; on a CPU, 4 was faster than 1, the smallest model
            drop_taps=True,  # also remove kernel taps of atrous convolutions that only meet padding at data.size
        ),
        # --job=lomt: a layer is active in a run if more than the fraction `active` of its groups is non-zero; a task
        # keeps the layers that are active in at least the fraction `vote` of its runs. raw=True attaches heads before
        # the BatchNorm of the deepest layer kept ("layer3_3/conv1:raw"), as the reference implementation.
        lomt=create(active=0.01, vote=1.0, raw=False),
        benchmark=create(batch_sizes=(1, 16), rounds=20),  # of --job=benchmark: batch sizes, timings of each
        export=create(
            format="stablehlo",  # or "onnx"
            compact=True,  # True exports the compact model, False the model as trained
        ),
        # Execution of a run; these options do not change its results.
        run=create(
            num_workers=4,  # processes that load data; 0 loads in threads
            log_every_steps=50,  # steps between two lines of metrics.jsonl
            checkpoint_every_steps=500,  # in addition to the end of every epoch
            progress_every_secs=30.0,  # seconds between two lines on the progress, where no terminal shows it
            # Steps whose loss or gradient is not finite are skipped and counted, up to this many in a row; one more
            # ends the run with an error. 0: the first such step ends it.
            skip_not_finite=0,
            sample_frames=6,  # test images on the sample grid
            summary_rounds=10,  # timings of the dense and the compact model after training; 0: none
        ),
    )
    return config.lock()  # an unknown option raises
