"""What to type in dlopt for the keys, choices and flags of other tools (Lightning, timm, Ultralytics, Hydra, ...)."""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import NamedTuple


class Synonym(NamedTuple):
    """The overrides that replace a word (`{}`: the value that was typed), and what else to know."""

    use: str
    note: str = ""


def _each(words: str, use: str, note: str = "") -> dict[str, Synonym]:
    return dict.fromkeys(words.split(), Synonym(use, note))


# Words with a similar name in dlopt (weight_decay, dropout, warmup_steps) need no row: the similar name is suggested.
KEYS: Mapping[str, Synonym] = {
    # devices
    **_each(
        "gpus devices num_gpus n_gpus ngpus num_processes nproc_per_node world_size",
        "parallel=ddp parallel.processes={}",
        "one process per GPU; for a single GPU: device=cuda",
    ),
    **_each("num_nodes nnodes", "parallel=ddp", "start its processes with srun or torchrun"),
    **_each("gpu cuda use_cuda", "device=cuda"),
    **_each("accelerator", "device=auto", "or cpu, cuda, mps"),
    **_each("strategy ddp distributed", "parallel=ddp", "`dlopt options parallel` lists all"),
    **_each("fsdp zero deepspeed", "parallel=fsdp"),
    **_each("sync_bn sync_batchnorm", "parallel=ddp parallel.sync_batchnorm=true"),
    # precision and speed
    **_each("amp use_amp autocast mixed_precision", "precision=auto", "mixed precision with bf16 where it is fast"),
    **_each("fp16 half", "precision=fp16"),
    **_each("bf16", "precision=bf16"),
    **_each("tf32", "precision=tf32"),
    **_each("torch_compile use_compile", "compile=auto"),
    **_each("profiler", "profile=true"),
    # length
    **_each("max_epochs num_epochs n_epochs nepochs num_train_epochs train_epochs", "epochs={}"),
    **_each("max_steps num_steps max_iters num_iters iterations total_steps", "steps={}"),
    **_each("fast_dev_run", "steps=1"),
    **_each("early_stopping", "stopping=early"),
    **_each("patience", "stopping=early stopping.patience={}"),
    # data
    **_each(
        "batch_size batchsize bs batch train_batch_size per_device_train_batch_size",
        "data.batch_size={}",
        "summed over all processes",
    ),
    **_each("num_workers n_workers workers data.num_workers", "data.workers={}"),
    **_each("dataset dataset_name", "data={}", "`dlopt options data` lists all"),
    **_each("data_dir data_path dataset_path", "data.root={}", "for your own images, also data=image_folder"),
    **_each("img_size imgsz input_size resolution", "data.image_size={}"),
    **_each("augment aug transforms", "augmentation=crop_flip", "`dlopt options augmentation` lists all"),
    **_each("mixup", "augmentation=mixup"),
    **_each("cutmix", "augmentation=cutmix"),
    # model and loss
    **_each(
        "pretrained",
        "model=timm model.name=NAME model.pretrained=true",
        "also model=torchvision; for the weights of a file: init_from=FILE",
    ),
    **_each("weights", "init_from={}"),
    **_each("arch architecture backbone net network model_name", "model={}", "`dlopt options model` lists all"),
    **_each("criterion loss_fn", "loss={}", "`dlopt options loss` lists all"),
    # update
    **_each("lr learning_rate base_lr init_lr optimizer.learning_rate", "optimizer.lr={}"),
    **_each("wd optimizer.wd", "optimizer.weight_decay={}"),
    **_each("opt optim optimizer_name", "optimizer={}", "`dlopt options optimizer` lists all"),
    **_each("scheduler lr_scheduler lr_schedule", "schedule={}", "`dlopt options schedule` lists all"),
    **_each("warmup_ratio", "schedule.warmup_fraction={}"),
    **_each(
        "clip_grad clip_grad_norm grad_clip gradient_clip gradient_clip_val max_grad_norm clip_norm",
        "clip=norm clip.max_norm={}",
    ),
    **_each(
        "accumulate_grad_batches accumulation_steps grad_accum gradient_accumulation_steps",
        "accumulate={}",
        "micro-batches per batch; data.batch_size is their sum",
    ),
    **_each("ema_decay", "ema={}"),
    **_each("model_ema use_ema", "ema=0.999"),
    **_each("random_seed manual_seed seed_everything", "seed={}"),
    # output
    **_each("logger report_to", "tracking=[{}]", "tensorboard, mlflow, wandb"),
    **_each("wandb use_wandb", "tracking=[wandb]"),
    **_each("tensorboard", "tracking=[tensorboard]", "the default"),
    **_each("mlflow", "tracking=[mlflow]"),
    **_each("run_name exp_name experiment_name project project_name", "name={}"),
    **_each("output_dir out_dir outdir save_dir log_dir default_root_dir", "hydra.run.dir={}"),
    **_each("log_interval log_every_n_steps logging_steps", "log_every_steps={}"),
    **_each("save_top_k save_total_limit", "checkpoint.keep={}"),
    **_each("check_val_every_n_epoch eval_interval val_interval", "evaluate.every_epochs={}"),
    **_each(
        "ckpt_path checkpoint_path load_checkpoint resume_from resume_from_checkpoint",
        "resume={}",
        "only its weights: init_from=FILE; to test it: dlopt eval checkpoint=FILE",
    ),
}

_TIMM = """
    beit coat convmixer convnext cspresnet darknet deit densenet dla dm_nfnet dpn edgenext efficientformer efficientnet
    efficientvit eva fastvit ghostnet hrnet inception levit maxvit mixer mnasnet mobilenet mobilevit nasnet nfnet
    poolformer regnet repvgg res2net resmlp resnest resnetv2 resnext seresnet shufflenet squeezenet swin tf_efficientnet
    tresnet vgg13 vgg16 vgg19 vit_ volo wide_resnet xception
"""

# group=choice patterns
CHOICES: Mapping[str, Synonym] = {
    **_each("schedule=none schedule=null schedule=off schedule=fixed", "schedule=constant"),
    **_each("schedule=reduce* schedule=ReduceLROnPlateau", "schedule=plateau"),
    **_each("schedule=cosine_annealing schedule=CosineAnnealingLR schedule=cos", "schedule=cosine"),
    **_each("optimizer=psgd* optimizer=*_kron", "optimizer=kron"),
    **_each("optimizer=cadamw optimizer=c_adamw optimizer=cautious*", "optimizer=adamw optimizer.cautious=true"),
    **_each("optimizer=clion optimizer=c_lion", "optimizer=lion optimizer.cautious=true"),
    **_each("optimizer=d-muon optimizer=d_muon optimizer=moonlight*", "optimizer=dmuon"),
    **_each("optimizer=signsgd optimizer=sign_sgd", "optimizer=signum optimizer.momentum=0"),
    **_each("optimizer=sophiah optimizer=sophia_h", "optimizer=sophia"),
    **_each("optimizer=sophiag optimizer=sophia_g", "optimizer=sophia optimizer.hessian=gnb optimizer.gamma=0.05"),
    **_each("optimizer=dadapt* optimizer=d_adapt*", "optimizer=prodigy", "its successor"),
    **_each("optimizer=adamwschedulefree optimizer=schedulefree*", "optimizer=schedule_free_adamw"),
    **_each("model=resnet", "model=resnet20", "for small images; resnet18 to resnet101 for large ones"),
    **_each("model=huggingface model=hub", "model=timm model.name=NAME", "the models of timm"),
    **_each(" ".join(f"model={family}*" for family in _TIMM.split()), "model=timm model.name={}"),
    **_each("model=wideresnet* model=wrn", "model=wrn_28_10"),
    **_each("init=he init=he_*", "init=kaiming_normal"),
    **_each("init=glorot init=glorot_*", "init=xavier_uniform"),
    **_each("loss=ce loss=nll", "loss=cross_entropy"),
    **_each("loss=l2", "loss=mse"),
    **_each("stopping=early_stopping stopping=patience", "stopping=early"),
    **_each("parallel=none", "parallel=single"),
    **_each("parallel=dp parallel=dataparallel", "parallel=ddp"),
    **_each("parallel=zero* parallel=deepspeed", "parallel=fsdp"),
    **_each("hydra/launcher=submitit_slurm", "hydra/launcher=slurm"),
    **_each("hydra/launcher=submitit_local hydra/launcher=ray* hydra/launcher=rq", "hydra/launcher=joblib"),
    **_each("hydra/sweeper=optuna hydra/sweeper=ax hydra/sweeper=nevergrad", "hydra/sweeper=dlopt_optuna"),
}


def for_key(key: str, value: str) -> str:
    """Returns what to type instead of an unknown key; '' if there is no row for it."""
    row = KEYS.get(key.lower())
    group, _, placeholder = ("", "", "") if row is None else row.use.partition("=")
    # scheduler=none: schedule=none would be refused in turn.
    advice = for_choice(group, value) if placeholder == "{}" and value else ""
    return advice or _format(row, value)


def for_choice(group: str, choice: str) -> str:
    """Returns what to type instead of an unknown choice; '' if there is no row for it."""
    rows = (row for pattern, row in CHOICES.items() if fnmatchcase(f"{group}={choice}", pattern))
    return _format(next(rows, None), choice)


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


def _format(row: Synonym | None, value: str) -> str:
    if row is None:
        return ""
    return f"use {row.use.replace('{}', value)}{f' ({row.note})' if row.note else ''}"
