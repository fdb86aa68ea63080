"""The methods that dlopt knows: the updates of their papers, the hyperparameters there, and the authors' defaults."""

from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from dlopt.lab.verify import references as r
from dlopt.lab.verify.references import DECAY, LR, Array, Formula, Gradients

Decay = Literal["l2", "decoupled"]


@dataclass(frozen=True)
class Method:
    """A published method.

    Attributes:
        formula: its updates, at `lr` 0.1 and `keys`; None if only its defaults are known.
        keys: the hyperparameters of `formula`; other names are found by `SYNONYMS`.
        decay: how weight decay acts; None if the paper has none, or in its own way.
        authors: the defaults of the paper or of the authors' code.
        second: those of a second group.
        options: arguments of some implementations that the formula takes, too.
        own_decay: `formula` has an argument `wd`, because the decay is not that of `decay`.
        decays_last: the authors' code applies decoupled decay after the step; either order is right.
        counts_groups: updates are counted by group, also of parameters without a gradient.
        couples: the steps of a parameter depend on all others.
        matrices: the formula is for matrices only.
        no_schedule: why the learning rate does not scale the steps.
        variant: arguments that switch off what some implementations add to the method, where they are arguments.
        tolerance: of the weights, relative to the distance that the paper's updates move them.
    """

    source: str
    formula: Formula | None = None
    keys: Mapping[str, Any] = field(default_factory=dict)
    decay: Decay | None = None
    authors: Mapping[str, Any] = field(default_factory=dict)
    second: Mapping[str, Any] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    own_decay: bool = False
    decays_last: bool = False
    counts_groups: bool = False
    couples: bool = False
    matrices: bool = False
    no_schedule: str = ""
    variant: Mapping[str, Any] = field(default_factory=dict)
    tolerance: float = 1e-6


def _plain(formula: Callable[..., Any]) -> Formula:
    return partial(formula, wd=0.0)


def _prodigy(w: Array, gs: Gradients, lr: float, wd: float) -> Iterator[Array]:
    return (weights for weights, _ in r.prodigy(w, gs, wd=wd, rates=[lr] * len(gs)))


_RPROP = "the rate is the first step size only"
_SEARCH = "a line search or inner iterations set the length of the step"
ADAM: dict[str, Any] = {"betas": [0.9, 0.999], "eps": 1e-8}
_ADAM2: dict[str, Any] = {"betas": (0.8, 0.99), "eps": 1e-3}
_MOMENTUM2 = {"momentum": 0.6}
METHODS: dict[str, Method] = {
    "sgd": Method("torch.optim.SGD", _plain(r.sgd), {"momentum": 0.9}, "l2", second=_MOMENTUM2, options=("nesterov",)),
    "sgdw": Method(
        "Loshchilov & Hutter 2019, algorithm 1", _plain(r.sgd), {"momentum": 0.9}, "decoupled",
        second=_MOMENTUM2,
    ),
    "averagingsgdw": Method(
        "SGDW with an averaging momentum", _plain(r.averaging), {"momentum": 0.9}, "decoupled",
        second=_MOMENTUM2,
    ),
    "rprop": Method(
        "Igel & Huesken 2003, Rprop-", r.rprop, {"step_sizes": (0.04, 0.13), "etas": (0.5, 1.2)}, no_schedule=_RPROP
    ),
    "irprop": Method(
        "Igel & Huesken 2003, iRprop-", partial(r.rprop, skip=True), {"step_sizes": (0.04, 0.13)}, no_schedule=_RPROP
    ),
    "adagrad": Method("Duchi et al. 2011", r.adagrad, {"eps": 1e-10, "lr_decay": 0.0}, "l2", second={"eps": 1e-3}),
    "adadelta": Method(
        "Zeiler 2012", r.adadelta, {"lr": 1.0, "rho": 0.9, "eps": 1e-6}, "l2",
        second={"rho": 0.8, "eps": 1e-3},
    ),
    "rmsprop": Method(
        "Tieleman & Hinton 2012", r.rmsprop, {"alpha": 0.9, "eps": 1e-8}, "l2",
        second={"alpha": 0.8, "eps": 1e-3},
    ),
    "adam": Method(
        "Kingma & Ba 2015, algorithm 1", _plain(r.adam), ADAM, "l2",
        {"lr": 1e-3, **ADAM}, _ADAM2, ("amsgrad",),
    ),
    "adamw": Method(
        "Loshchilov & Hutter 2019, algorithm 2", _plain(r.adam), ADAM, "decoupled",
        {"lr": 1e-3, **ADAM}, _ADAM2, ("amsgrad",),
    ),
    "cautiousadamw": Method("Liang et al. 2024, C-AdamW", _plain(r.c_adamw), ADAM, "decoupled", second=_ADAM2),
    "cautiouslion": Method(
        "Liang et al. 2024, C-Lion", _plain(r.c_lion), {"betas": (0.9, 0.99)}, "decoupled",
        second={"betas": (0.8, 0.95)},
    ),
    "nadam": Method(
        "Dozat 2016", r.nadam, {**ADAM, "momentum_decay": 0.004},
        second={**_ADAM2, "momentum_decay": 0.01}, tolerance=1e-5,
    ),
    "radam": Method(
        "Liu et al. 2020", r.radam, ADAM, second=_ADAM2,
        authors={"lr": 1e-3, **ADAM}, variant={"degenerated_to_sgd": True}
    ),
    "lion": Method(
        "Chen et al. 2023", _plain(r.lion), {"betas": (0.9, 0.99)}, "decoupled",
        {"lr": 1e-4, "betas": [0.9, 0.99], "weight_decay": 0}, {"betas": (0.8, 0.95)},
    ),
    "lamb": Method(
        "You et al. 2020", r.lamb, {"betas": (0.9, 0.999), "eps": 1e-6}, second=_ADAM2, own_decay=True,
        variant={"always_adapt": True, "max_grad_norm": None, "pre_norm": False, "weight_decouple": False},
    ),
    "lars": Method(
        "You et al. 2017", r.lars, {"momentum": 0.9, "trust_coefficient": 0.02}, own_decay=True,
        second={"momentum": 0.6, "trust_coefficient": 0.05}, variant={"always_adapt": True}
    ),
    "signum": Method(
        "Bernstein et al. 2018, algorithm 2", _plain(r.signum), {"momentum": 0.9}, "decoupled",
        second=_MOMENTUM2,
    ),
    "adopt": Method(
        "Taniguchi et al. 2024", _plain(r.adopt), {"betas": (0.9, 0.9999), "eps": 1e-6}, "decoupled",
        {"lr": 1e-3, "betas": [0.9, 0.9999], "eps": 1e-6, "weight_decay": 0}, {"betas": (0.8, 0.99), "eps": 1e-2},
    ),
    "ademamix": Method(
        "Pagliardini et al. 2024", _plain(r.ademamix),
        {"betas": (0.9, 0.999, 0.9999), "alpha": 5.0, "warmup": 7, "eps": 1e-8}, "decoupled",
        {"lr": 1e-3, "betas": [0.9, 0.999, 0.9999], "alpha": 2, "eps": 1e-8, "weight_decay": 0},
    ),
    "adan": Method(
        "Xie et al. 2022", r.adan, {"betas": (0.98, 0.92, 0.99), "eps": 1e-8}, "decoupled",
        {"lr": 1e-3, "betas": [0.98, 0.92, 0.99], "eps": 1e-8, "weight_decay": 0},
        {"betas": (0.9, 0.8, 0.95), "eps": 1e-3}, own_decay=True, counts_groups=True,
    ),
    "adabelief": Method(
        "Zhuang et al. 2020", _plain(r.adabelief), {"betas": (0.9, 0.999), "eps": 1e-16}, "decoupled",
        {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-16, "weight_decay": 0},
        {"betas": (0.8, 0.99), "eps": 1e-4}, variant={"rectify": False},
    ),
    "mars": Method(
        "Yuan et al. 2024", _plain(r.mars), {"betas": (0.95, 0.99), "gamma": 0.025, "eps": 1e-8}, "decoupled",
        {"lr": 3e-3, "betas": [0.95, 0.99], "gamma": 0.025, "eps": 1e-8, "weight_decay": 0},
        {"betas": (0.9, 0.95), "gamma": 0.05, "eps": 1e-3},
        variant={"optimize_1d": True},
    ),
    "adafactor": Method("Shazeer & Stern 2018", r.adafactor, own_decay=True),
    "shampoo": Method("Gupta et al. 2018", _plain(r.shampoo), {"update_every": 3, "momentum": 0.9}),
    "distributedshampoo": Method(
        "Shi et al. 2023", _plain(r.distributed_shampoo),
        {"update_every": 3, "betas": (0.9, 0.99), "eps": 1e-4, "graft_eps": 1e-8}, "decoupled",
        {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-12, "graft_eps": 1e-8, "weight_decay": 0.01},
    ),
    "soap": Method(
        "Vyas et al. 2024", _plain(r.soap), {"betas": (0.95, 0.95), "eps": 1e-8, "update_every": 3}, "decoupled",
        {"lr": 3e-3, "betas": [0.95, 0.95], "eps": 1e-8, "weight_decay": 0.01, "update_every": 10},
        decays_last=True,
    ),
    "prodigy": Method(
        "Mishchenko & Defazio 2023", _prodigy, {"lr": 1.0, "d0": 0.01, "d_coef": 1.0, **ADAM}, "decoupled",
        own_decay=True, couples=True,
        authors={"lr": 1, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0, "d0": 1e-6, "d_coef": 1},
    ),
    "muon": Method(
        "Jordan et al. 2024", _plain(r.muon), {"momentum": 0.95, "nesterov": True, "ns_steps": 5}, "decoupled",
        {"lr": 0.02, "momentum": 0.95, "nesterov": True, "weight_decay": 0, "eps": 1e-7, "ns_steps": 5}
        | {"rest_lr": 3e-4, "rest_betas": [0.9, 0.95], "rest_eps": 1e-10},
        {"momentum": 0.8, "nesterov": False, "ns_steps": 4},
        matrices=True,
        variant={
            "adjust_lr_fn": "original", "use_adjusted_lr": False, "ns_coefficients": (3.4445, -4.775, 2.0315),
        }, tolerance=0.1,
    ),
    "schedulefreesgd": Method(
        "Defazio et al. 2024", r.schedule_free_sgd, {"momentum": 0.9}, second=_MOMENTUM2,
        own_decay=True, counts_groups=True,
    ),
    "schedulefreeadamw": Method(
        "Defazio et al. 2024", r.schedule_free_adamw, ADAM, second=_ADAM2,
        own_decay=True, counts_groups=True,
    ),
    "lbfgs": Method("Liu & Nocedal 1989", no_schedule=_SEARCH),
    "bfgs": Method("Broyden 1970, Fletcher 1970, Goldfarb 1970, Shanno 1970", no_schedule=_SEARCH),
    "newton": Method("Levenberg 1944", no_schedule=_SEARCH),
    "newtoncg": Method("Nash 1984", no_schedule=_SEARCH),
    "kron": Method(
        "Li 2024, PSGD", authors={"lr": 3e-4, "momentum": 0.9, "weight_decay": 0, "precond_lr": 0.1, "max_size": 8192}
    ),
    "sophia": Method(
        "Liu et al. 2024", authors={"lr": 1e-4, "betas": [0.965, 0.99], "gamma": 0.04, "weight_decay": 0.1}
    ),
}  # fmt: skip
"""By the name of the class, in small letters."""

ALIASES = {
    "sgdschedulefree": "schedulefreesgd", "adamwschedulefree": "schedulefreeadamw", "singledevicemuon": "muon",
    "torch.optim.rprop.rprop": "irprop", "dlopt.optim.sgd.sgdw": "averagingsgdw",
}  # fmt: skip
SYNONYMS: dict[str, tuple[str, ...]] = {
    "update_every": ("precondition_frequency", "preconditioning_compute_steps", "precond_freq"),
    "warmup": ("t_alpha_beta3", "T_alpha_beta3"),
    "alpha": ("rho", "decay"),
    "max_size": ("max_preconditioner_dim", "max_size_triangular"),
    "d0": ("d",),
    "d_coef": ("growth_rate_coefficient",),
    "step_sizes": ("step_size_range",),
}
"""Names of a hyperparameter in other packages."""
DECOUPLED = ("decoupled_weight_decay", "weight_decouple", "decoupled_decay", "decouple", "decoupled")
"""Names of the argument that makes weight decay decoupled."""


def known(target: Callable[..., Any], keys: Mapping[str, Any]) -> Method | None:
    """Returns the method that a class with these arguments implements by its name, if dlopt knows it."""
    name = target.__name__.lower().replace("_", "")
    alias = ALIASES.get(f"{target.__module__}.{name}") or ALIASES.get(name) or name
    return METHODS.get(f"cautious{alias}" if keys.get("cautious") else alias)


def name_in(names: Container[str], key: str) -> str | None:
    """Returns the name of a hyperparameter in a class; None if the class does not have it."""
    return next((name for name in (key, *SYNONYMS.get(key, ())) if name in names), None)


_OPTIONAL = ("nesterov", "ns_steps", "etas", "lr_decay", "graft_eps", "momentum_decay", "weight_decay")


def arguments_of(method: Method, takes: Callable[[str], bool]) -> tuple[dict[str, Any], list[str]]:
    """Returns the arguments that give a class the formula's hyperparameters, and the hyperparameters that it lacks."""
    found, absent = {}, []
    for key, value in {"lr": LR, **method.keys, "weight_decay": DECAY}.items():
        name = next((each for each in (key, *SYNONYMS.get(key, ())) if takes(each)), None)
        if name is not None:
            found[name] = value
        elif key not in _OPTIONAL:
            absent.append(key)
    return found | {key: value for key, value in method.variant.items() if takes(key)}, absent
