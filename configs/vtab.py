"""RLRR on VTAB-1k: `--config configs/vtab.py:cifar`, `vtab.py:all`, `vtab.py:task=kitti,method=full`.

A field that is None is filled in at start: from the task's recipe (the authors' for RLRR), else from
the method's own defaults. What a run used is saved with it, in `config.json`.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from rlrr_jax.config import loss_options


def get_config(arg=None):
    """The configuration; `arg` is a task, or `task=...,method=...` and options of the method."""
    config = ConfigDict()
    items = [item.partition("=") for item in (arg or "").split(",") if item]
    # Several: "kitti+dtd"; "natural", "specialized", "structured", "all"; None: the bundled ones.
    config.task = placeholder(str)
    config.method = placeholder(str)  # several: "linear+rlrr"; None: rlrr
    config.method_kwargs = ConfigDict()  # options of the method, such as init=damped
    # Runs that differ: other values of any key below or of the method's options, such as
    # ({"lr": 1e-3}, {"method": "lora", "rank": 4}); several values in a tuple are a grid:
    # ({"lr": (1e-3, 3e-3), "drop_path": (0.0, 0.1)},). What differs in lr, weight_decay, drop_path or
    # seed alone is trained together.
    config.runs = placeholder(tuple)
    config.seeds = placeholder(tuple)  # one run each; None: 0, and (0, 1, 2) for several VTAB tasks

    # "official": train on 1000 images, test after each epoch (default for one task);
    # "fast": the same, tested once (default for several tasks);
    # "vtab": choose from the grid on 800/200, then train on 1000, tested once;
    # "tune": train on 800, evaluate on 200, never test.
    config.protocol = placeholder(str)
    config.eval_every = 1  # epochs between the tests of "official" and "tune"; the last is always one
    # lr, weight_decay and drop_path of "vtab"; one that is set below is fixed instead, and () is the
    # method's own value. With times_own_lr, those of lr are multiples of the method's own; with extend,
    # a search whose best is at an end goes on beyond; folds=5 chooses on all images, in five parts. And
    # values of options of the loss. loss_kwargs: such options; None: the default of the loss.
    config.loss_kwargs, config.grid = loss_options({key: value for key, _, value in items}.get("loss"))
    config.epochs = placeholder(int)
    config.batch_size = 32
    config.accumulate = 1  # parts, one after another, of a device's images: less memory, equal numbers
    # For large backbones: frozen weights of blocks in bfloat16, and a share of them on each device.
    config.frozen_dtype = placeholder(str)
    config.shard_weights = False
    config.total_steps = placeholder(int)  # instead of epochs
    config.optimizer = "adamw"  # or "momentum"
    config.momentum_dtype = "bfloat16"  # as big_vision keeps it; or "float32"
    config.grad_clip = placeholder(float)  # largest norm of the gradient
    # What is done to gradients first: a name, or a path to a function `key -> optax transformation`.
    config.gradients = placeholder(str)
    # A name, or a path to your own, whose options are known if it is named here: vtab.py:loss=my:loss.
    config.loss = placeholder(str)  # None is the method's own, of most "cross_entropy"
    # Parameters of mixup and CutMix (0 is off), and the share of a label that all classes get.
    config.mixup = config.cutmix = config.label_smoothing = 0.0
    # How much images of a class count: "balanced", each class alike; or a .csv of class,weight.
    config.class_weights = placeholder(str)
    # "best": the epoch with the best score on images set aside, which are not trained on then; and
    # after how many epochs without a better one a run ends.
    config.keep = placeholder(str)
    config.patience = placeholder(int)
    config.temperature = placeholder(str)  # "fit": logits are calibrated on images set aside
    # Decay of a running average of the trained tree, which is then evaluated and saved.
    config.average = placeholder(float)
    config.schedule = placeholder(str)  # "official", "cosine", "bigvision" or "restarts", see optim.py
    config.warmup_epochs = placeholder(int)  # of "official", and as many at its end; None: epochs / 11
    config.restarts = placeholder(tuple)  # of "restarts": epochs of the first, and times each next one
    config.warmup_steps = placeholder(int)  # of "bigvision"
    config.lr = placeholder(float)
    config.weight_decay = placeholder(float)
    config.drop_path = placeholder(float)
    config.drop_path_mode = placeholder(str)  # "element" (None, of ViTs) or "sample" (of others)
    config.flip = placeholder(bool)  # left to right, at random; None: as the task's recipe
    # Random crops: "resmall" (the shorter side to crop_from pixels, then a square) or "inception" (5 to
    # 100 % of the area). Evaluated is the middle square. "square": the whole image as a square of
    # crop_from pixels, and a square of that, cut on the device. None: the whole image as a square.
    config.crop = placeholder(str)
    config.crop_from = placeholder(int)

    config.image_size = placeholder(int)  # pixels, a multiple of the patch size
    config.image_width = placeholder(int)  # where images are no squares; image_size is their height
    config.model = ConfigDict()
    config.model.variant = placeholder(str)  # "B/16", "swin_b"; "bundled" is the tiny ViT
    # "tanh", "exact" (the authors' PyTorch code) or "quick" (CLIP); None: as the weights were trained.
    config.model.gelu = placeholder(str)
    # What shapes do not show; None: what the weights say, else the variant's, and 1e-6.
    config.model.num_heads = placeholder(int)
    config.model.norm_eps = placeholder(float)  # of every LayerNorm
    # Of ViTs, None: what the weights have. pool: "token", "avg", "map" or "both", see models/vit.py.
    config.model.pool = placeholder(str)
    config.model.registers = placeholder(int)
    for key in ("class_token", "dist_token", "pre_norm", "fc_norm", "qk_norm"):
        config.model[key] = placeholder(bool)
    config.model.projection = placeholder(int)  # width of CLIP's, which is left out otherwise
    config.model.depth = placeholder(int)  # of a ViT, its first so many blocks; None: all
    config.model.block = placeholder(str)  # of a ViT, another class of blocks; None: the method's own
    # Of DINOv3's positions in training: largest shift, factor of each axis and of both, as (0,1,2).
    config.model.position_noise = placeholder(tuple)
    config.model.attention = placeholder(str)  # "xla"; None: "cudnn" on GPUs with bfloat16, if it works
    # Blocks in each step of the scan over depth; None: all of them on CPUs, else one.
    config.model.unroll = placeholder(int)
    config.model.remat = placeholder(bool)  # compute twice to save memory; None: if it does not fit
    config.pretrained = ConfigDict()
    config.pretrained.name = placeholder(str)  # a name, file or address; None goes by the variant
    config.pretrained.grid = placeholder(tuple)  # of a position embedding that is not square
    # Whether the JSON files beside weights, and their name, are passed over; else they must fit.
    config.pretrained.ignore_json = False
    # Of red, green and blue in [0, 1], for .safetensors that do not say it; 0.5 each is [-1, 1].
    config.pretrained.mean = placeholder(tuple)
    config.pretrained.std = placeholder(tuple)
    # How a position embedding is brought to another grid: "linear" (JAX code), "bilinear"
    # (FlexiViT's), "bicubic" (timm) or "bicubic_plain" (transformers); None: as where they come from.
    config.pretrained.resize = placeholder(str)
    # Whether a patch embedding is brought to the variant's patch size, as FlexiViT's is.
    config.pretrained.resize_patch = False
    config.pretrained.cache_dir = placeholder(str)  # of downloads; None is ~/.cache/rlrr_jax
    config.data = ConfigDict()
    config.data.dir = placeholder(str)  # of tfds datasets or vtab-1k/; None is ~/tensorflow_datasets
    config.data.source = placeholder(str)  # "tfds" or "folder"; None: what is there
    # Of a device's memory for training images, in GB; more are streamed. None: a third of it.
    config.data.device_gb = placeholder(float)
    config.data.variant = placeholder(str)  # "original", or "jpeg75" as in published tables
    config.data.upright = False  # turns images as their EXIF says; VTAB's numbers are without
    config.data.cache_dir = placeholder(str)  # of decoded images; None is ~/.cache/rlrr_jax

    # Your own images instead of a task, see own.py: a folder, a list of files, or tfds:NAME. Where they
    # have no split of their own, fractions of each class are tested and chosen on.
    config.own = ConfigDict(
        {"path": placeholder(str), "test": 0.2, "val": 0.1, "shots": placeholder(int), "seed": 0}
    )

    config.dtype = placeholder(str)  # of activations: None is float32 on CPUs, else bfloat16
    config.precision = placeholder(str)  # of matmuls; None is "highest" with float32
    config.eval_batch_size = 256
    config.log = placeholder(str)  # curves for "tensorboard" or "wandb", too, see results/logs.py
    config.num_devices = placeholder(int)  # None: all
    config.checkpoint_seconds = 10.0  # between checkpoints; 0 is after every dispatch

    for key, equals, value in items:
        if not equals:
            config.task = f"{config.task}+{key}" if config.task else key
        elif key in ("task", "method", "loss"):
            config[key] = value
        else:
            config.method_kwargs[key] = value
    return config
