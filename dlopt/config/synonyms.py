"""What to type in dlopt for the keys, choices and flags of other tools (Lightning, timm, Ultralytics, Hydra, ...)."""

from collections.abc import Iterable
from fnmatch import fnmatchcase

# Per row: words of other tools, and the overrides that replace them (`{}`: the value that was typed), with a note.
# Words with a similar name in dlopt (weight_decay, dropout, warmup_steps) need no row: the similar name is suggested.
_KEYS = {
    # devices
    "gpus devices num_gpus n_gpus ngpus num_processes nproc_per_node world_size": (
        "parallel=ddp parallel.processes={} (one process per GPU; for a single GPU: device=cuda)"
    ),
    "num_nodes nnodes": "parallel=ddp (start its processes with srun or torchrun)",
    "gpu cuda use_cuda": "device=cuda",
    "accelerator": "device=auto (or cpu, cuda, mps)",
    "strategy ddp distributed": "parallel=ddp (`dlopt options parallel` lists all)",
    "fsdp zero deepspeed": "parallel=fsdp",
    "sync_bn sync_batchnorm": "parallel=ddp parallel.sync_batchnorm=true",
    # precision and speed
    "amp use_amp autocast mixed_precision": "precision=auto (mixed precision with bf16 where it is fast)",
    "fp16 half": "precision=fp16",
    "bf16": "precision=bf16",
    "tf32": "precision=tf32",
    "torch_compile use_compile": "compile=auto",
    "profiler": "profile=true",
    # length
    "max_epochs num_epochs n_epochs nepochs num_train_epochs train_epochs": "epochs={}",
    "max_steps num_steps max_iters num_iters iterations total_steps": "steps={}",
    "fast_dev_run": "steps=1",
    "early_stopping": "stopping=early",
    "patience": "stopping=early stopping.patience={}",
    # data
    "batch_size batchsize bs batch train_batch_size per_device_train_batch_size": (
        "data.batch_size={} (summed over all processes)"
    ),
    "num_workers n_workers workers data.num_workers": "data.workers={}",
    "dataset dataset_name": "data={} (`dlopt options data` lists all)",
    "data_dir data_path dataset_path": "data.root={} (for your own images, also data=image_folder)",
    "img_size imgsz input_size resolution": "data.image_size={}",
    "augment aug transforms": "augmentation=crop_flip (`dlopt options augmentation` lists all)",
    "mixup": "augmentation=mixup",
    "cutmix": "augmentation=cutmix",
    # model and loss
    "pretrained": (
        "model=timm model.name=NAME model.pretrained=true "
        "(also model=torchvision; for the weights of a file: init_from=FILE)"
    ),
    "weights": "init_from={}",
    "arch architecture backbone net network model_name": "model={} (`dlopt options model` lists all)",
    "criterion loss_fn": "loss={} (`dlopt options loss` lists all)",
    # update
    "lr learning_rate base_lr init_lr optimizer.learning_rate": "optimizer.lr={}",
    "wd optimizer.wd": "optimizer.weight_decay={}",
    "opt optim optimizer_name": "optimizer={} (`dlopt options optimizer` lists all)",
    "scheduler lr_scheduler lr_schedule": "schedule={} (`dlopt options schedule` lists all)",
    "warmup_ratio": "schedule.warmup_fraction={}",
    "clip_grad clip_grad_norm grad_clip gradient_clip gradient_clip_val max_grad_norm clip_norm": (
        "clip=norm clip.max_norm={}"
    ),
    "accumulate_grad_batches accumulation_steps grad_accum gradient_accumulation_steps": (
        "accumulate={} (micro-batches per batch; data.batch_size is their sum)"
    ),
    "ema_decay": "ema={}",
    "model_ema use_ema": "ema=0.999",
    "random_seed manual_seed seed_everything": "seed={}",
    # config files
    "config config_file cfg_file": (
        "experiment={} (a recipe: experiment/NAME.yaml in the folder of --config-dir; also --config-name NAME, "
        "--cfg job to print the config, from=RUN for that of a run)"
    ),
    # output
    "logger report_to": "tracking=[{}] (tensorboard, mlflow, wandb)",
    "wandb use_wandb": "tracking=[wandb]",
    "tensorboard": "tracking=[tensorboard] (the default)",
    "mlflow": "tracking=[mlflow]",
    "run_name exp_name experiment_name project project_name": "name={}",
    "output_dir out_dir outdir save_dir log_dir default_root_dir": "hydra.run.dir={}",
    "log_interval log_every_n_steps logging_steps": "log_every_steps={}",
    "save_top_k save_total_limit": "checkpoint.keep={}",
    "check_val_every_n_epoch eval_interval val_interval": "evaluate.every_epochs={}",
    "ckpt_path checkpoint_path load_checkpoint resume_from resume_from_checkpoint": (
        "resume={} (only its weights: init_from=FILE; to test it: dlopt eval checkpoint=FILE)"
    ),
}

_TIMM = """
    beit coat convmixer convnext cspresnet darknet deit densenet dla dm_nfnet dpn edgenext efficientformer efficientnet
    efficientvit eva fastvit ghostnet hrnet inception levit maxvit mixer mnasnet mobilenet mobilevit nasnet nfnet
    poolformer regnet repvgg res2net resmlp resnest resnetv2 resnext seresnet shufflenet squeezenet swin tf_efficientnet
    tresnet vgg13 vgg16 vgg19 vit_ volo wide_resnet xception
"""

# group=choice patterns
_CHOICES = {
    "schedule=none schedule=null schedule=off schedule=fixed": "schedule=constant",
    "schedule=reduce* schedule=ReduceLROnPlateau": "schedule=plateau",
    "schedule=cosine_annealing schedule=CosineAnnealingLR schedule=cos": "schedule=cosine",
    "optimizer=psgd* optimizer=*_kron": "optimizer=kron",
    "optimizer=cadamw optimizer=c_adamw optimizer=cautious*": "optimizer=adamw optimizer.cautious=true",
    "optimizer=clion optimizer=c_lion": "optimizer=lion optimizer.cautious=true",
    "optimizer=d-muon optimizer=d_muon optimizer=moonlight*": "optimizer=dmuon",
    "optimizer=signsgd optimizer=sign_sgd": "optimizer=signum optimizer.momentum=0",
    "optimizer=sophiah optimizer=sophia_h": "optimizer=sophia",
    "optimizer=sophiag optimizer=sophia_g": "optimizer=sophia optimizer.hessian=gnb optimizer.gamma=0.05",
    "optimizer=dadapt* optimizer=d_adapt*": "optimizer=prodigy (its successor)",
    "optimizer=adamwschedulefree optimizer=schedulefree*": "optimizer=schedule_free_adamw",
    "model=resnet": "model=resnet20 (for small images; resnet18 to resnet101 for large ones)",
    "model=huggingface model=hub": "model=timm model.name=NAME (the models of timm)",
    " ".join(f"model={family}*" for family in _TIMM.split()): "model=timm model.name={}",
    "model=wideresnet* model=wrn": "model=wrn_28_10",
    "init=he init=he_*": "init=kaiming_normal",
    "init=glorot init=glorot_*": "init=xavier_uniform",
    "loss=ce loss=nll": "loss=cross_entropy",
    "loss=l2": "loss=mse",
    "stopping=early_stopping stopping=patience": "stopping=early",
    "parallel=none": "parallel=single",
    "parallel=dp parallel=dataparallel": "parallel=ddp",
    "parallel=zero* parallel=deepspeed": "parallel=fsdp",
    "hydra/launcher=submitit_slurm": "hydra/launcher=slurm",
    "hydra/launcher=submitit_local hydra/launcher=ray* hydra/launcher=rq": "hydra/launcher=joblib",
    "hydra/sweeper=optuna hydra/sweeper=ax hydra/sweeper=nevergrad": "hydra/sweeper=dlopt_optuna",
}

KEYS, CHOICES = (
    {word: advice for words, advice in rows.items() for word in words.split()} for rows in (_KEYS, _CHOICES)
)


def for_key(key: str, value: str) -> str:
    """Returns what to type instead of an unknown key; '' if there is no row for it."""
    row = KEYS.get(key.lower(), "")
    group, _, placeholder = row.partition(" (")[0].partition("=")
    # scheduler=none: schedule=none would be refused in turn.
    advice = for_choice(group, value) if placeholder == "{}" and value else ""
    return advice or _format(row, value)


def for_choice(group: str, choice: str) -> str:
    """Returns what to type instead of an unknown choice; '' if there is no row for it."""
    rows = (row for pattern, row in CHOICES.items() if fnmatchcase(f"{group}={choice}", pattern))
    return _format(next(rows, ""), choice)


def for_flag(arguments: Iterable[str], flags: Iterable[str]) -> str:
    """Explains the first argument with two dashes (`--epochs 5`) that is none of the `flags`; '' if there is none."""
    arguments, flags = list(arguments), set(flags)
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):
        flag, equals, value = argument.partition("=")
        if not flag.startswith("--") or flag in flags or flag == "--":
            continue
        key = flag.removeprefix("--").replace("-", "_")
        if not equals and following and not following.startswith("-") and "=" not in following:
            argument, value = f"{argument} {following}", following
        advice = for_key(key, value or "VALUE") or f"use {key}={value or 'VALUE'}"
        return f"{argument}: an override is key=value, without dashes; {advice}"
    return ""


def _format(row: str, value: str) -> str:
    return row and f"use {row.replace('{}', value)}"
