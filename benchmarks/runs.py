"""The runs of study.py as data: STUDIES, at the end. The tables in results/studies came from them."""
from typing import NamedTuple


class Config(NamedTuple):
    name: str                   # in the table and of the run's folder
    flags: dict                 # of cifar/main.py
    loss: str = "AUCCLLoss"     # a name that losses.py knows
    options: dict = {}          # arguments of that loss


class Study(NamedTuple):
    configs: list[Config]
    images: int = 10_000    # training images, the same number of every class; 0: all
    epochs: int = 5


WIDE, HALF, NARROW, DEEP = "2048 1024", "512 256", "512 128", "2048 2048 2048"  # projectors

# The best trial of each method in `tuning`, by the sum of k-NN and linear accuracy: (loss, options, flags).
METHODS = {
    "AUC-CL": ("AUCCLLoss", {}, {"projector": HALF, "lr": 8e-3, "weights_lr": 1e-3}),
    "NT-Xent": ("NTXentLoss", {"temperature": 0.1}, {"projector": HALF, "lr": 8e-3}),
    "DCL": ("DCLLoss", {"temperature": 0.1}, {"projector": WIDE, "lr": 8e-3}),
    "Barlow Twins": ("BarlowTwinsLoss", {"lambda_param": 0.005}, {"projector": WIDE, "lr": 4e-3}),
    "VICReg": ("VICRegLoss", {}, {"projector": WIDE, "lr": 2e-3}),
}
AUC_CL = METHODS["AUC-CL"][2]


def held(flags: dict) -> dict:
    """AUC-CL's flags with a, b and alpha held."""
    return {name: value for name, value in flags.items() if name != "weights_lr"} | {"learn": "none"}


def at_batch_size(flags: dict, size: int) -> dict:
    """Flags tuned at batch 256 for another batch size: learning rates times sqrt(size / 256)."""
    rates = {name: value * (size / 256) ** 0.5 for name, value in flags.items() if name.endswith("lr")}
    return {"batch_size": size} | flags | rates


def tuning() -> list[Config]:
    """Trials of each method at batch 256: four learning rates at its usual setting, single changes of what
    its papers vary and of the projector, then for some their winners together."""
    t1, t2, t5 = ({"temperature": t} for t in (0.1, 0.2, 0.5))
    usual, strong = {"lambda_param": 0.005}, {"lambda_param": 0.02}
    softmax = [(t1, WIDE, 2e-3), (t5, WIDE, 2e-3), (t2, NARROW, 2e-3), (t1, WIDE, 8e-3),
               (t1, HALF, 8e-3)]
    trials = {  # loss -> usual options, further trials
        "AUCCLLoss": ({}, [({}, NARROW, 2e-3), ({}, DEEP, 2e-3), ({}, HALF, 8e-3)]),
        "NTXentLoss": (t2, softmax),
        "DCLLoss": (t2, softmax),
        "BarlowTwinsLoss": (usual, [(strong, WIDE, 2e-3), (usual, NARROW, 2e-3), (usual, DEEP, 2e-3)]),
        "VICRegLoss": ({}, [({"nu_param": 4.0}, WIDE, 2e-3), ({}, NARROW, 2e-3), ({}, DEEP, 2e-3)]),
    }
    configs = []
    for loss, (usual, further) in trials.items():
        for options, projector, lr in [(usual, WIDE, lr) for lr in (1e-3, 2e-3, 4e-3, 8e-3)] + further:
            parts = [loss, *(f"{k}{v:g}" for k, v in options.items()), projector.replace(" ", "-"),
                     f"lr{lr:g}"]
            configs.append(Config("_".join(parts), {"projector": projector, "lr": lr}, loss, options))
    return configs


def ablation() -> list[Config]:
    """AUC-CL at batch 256, one change at a time."""
    fast = {"weights_lr": 1e-2}  # at 1e-3 the weights hardly move in so short a run
    changes = {
        "base": {}, "weights_lr 1e-2": fast,
        "a held, weights_lr 1e-2": {"learn": "b alpha"} | fast,
        "b held, weights_lr 1e-2": {"learn": "a alpha"} | fast,
        "alpha held, weights_lr 1e-2": {"learn": "a b"} | fast,
        "unit score": {"score": "unit"}, "unit score, nu 64": {"score": "unit", "negative_weight": 64},
        **{f"nu {nu}, kappa 1": {"negative_weight": nu} for nu in (1, 2, 4, 8, 32, 64, "sum")},
        **{f"nu {nu}, kappa nu": {"negative_weight": nu, "margin_negative_weight": nu}
           for nu in (2, 4, 8, 16, 32, "sum")},
        **{f"projector {hidden}-{hidden // 2}": {"projector": f"{hidden} {hidden // 2}"}
           for hidden in (64, 128, 256, 512, 1024)},
    }
    base = AUC_CL | {"projector": WIDE}
    return [*(Config(name, base | change) for name, change in changes.items()),
            Config("all held", held(base)), Config("closed form", held(base), "ClosedForm")]


def batch_size() -> list[Config]:
    """Every method at seven batch sizes for equal epochs. a, b and alpha travel further in more steps, which
    changes the objective a little: so AUC-CL with all three held as well."""
    methods = METHODS | {"AUC-CL, a b alpha held": ("AUCCLLoss", {}, held(AUC_CL))}
    return [Config(f"{name} b{size} s{seed}", at_batch_size(flags, size) | {"seed": seed}, loss, options)
            for seed in (0, 1) for size in (256, 64, 512, 16, 1024, 128, 32)
            for name, (loss, options, flags) in methods.items()]


def longer() -> list[Config]:
    """Whether it is steps that large batches lack in `batch_size`: four times the epochs."""
    return [Config(f"{name} b{size}", at_batch_size(METHODS[name][2], size), *METHODS[name][:2])
            for size in (512, 64, 256, 128) for name in ("AUC-CL", "NT-Xent")]


def all_images() -> list[Config]:
    """The leading methods as tuned, and with changes that may matter once there are more images and steps."""
    wide, t2, t5 = {"projector": WIDE}, {"temperature": 0.2}, {"temperature": 0.5}
    changes = {  # run -> changed flags, changed options
        "AUC-CL": ({}, {}),
        "AUC-CL, nu 8": ({"negative_weight": 8}, {}),
        "AUC-CL, nu 32": ({"negative_weight": 32}, {}),
        "AUC-CL, 2048-1024": (wide, {}),
        "AUC-CL, 4096-2048": ({"projector": "4096 2048"}, {}),
        "AUC-CL, 2048-1024, nu 32": (wide | {"negative_weight": 32}, {}),
        "AUC-CL, 2048-1024, weights_lr 4e-3": (wide | {"weights_lr": 4e-3}, {}),
        "AUC-CL, 2048-1024, weights_lr 1e-2": (wide | {"weights_lr": 1e-2}, {}),
        "NT-Xent": ({}, {}), "NT-Xent, 2048-1024": (wide, {}),
        "NT-Xent, 2048-1024, T 0.2": (wide, t2), "NT-Xent, 2048-1024, T 0.5": (wide, t5),
        "DCL": ({}, {}), "DCL, 512-256": ({"projector": HALF}, {}), "DCL, T 0.2": ({}, t2),
    }
    configs = []
    for name, (more_flags, more_options) in changes.items():
        loss, options, flags = METHODS[name.split(",")[0]]
        configs.append(Config(name, flags | more_flags, loss, options | more_options))
    return [*configs, Config("AUC-CL, a b alpha held", held(AUC_CL)),
            Config("AUC-CL, 2048-1024, a b alpha held", held(AUC_CL | wide))]


def hard_negatives() -> list[Config]:
    """The partial AUC (preset hard, its settings chosen on training images) beside the softmax losses."""
    wide = {"projector": WIDE, "lr": 8e-3}
    methods = {"AUC-CL hard": ("AUCCLLoss", {}, wide | {"preset": "hard", "weights_lr": 1e-3}),
               "AUC-CL": ("AUCCLLoss", {}, wide | {"weights_lr": 4e-3}),
               "DCL": METHODS["DCL"], "NT-Xent": ("NTXentLoss", {"temperature": 0.1}, wide)}
    return [Config(f"{name} s{seed}", flags | {"seed": seed}, loss, options)
            for seed in (0, 1) for name, (loss, options, flags) in methods.items()]


def convergence() -> list[Config]:
    """Every method as tuned; AUC-CL also as it is best on all images; the released preset's own recipe."""
    return [*(Config(name, flags, loss, options) for name, (loss, options, flags) in METHODS.items()),
            Config("AUC-CL, 2048-1024, weights_lr 4e-3", AUC_CL | {"projector": WIDE, "weights_lr": 4e-3}),
            Config("released-cifar", {"preset": "released-cifar", "warmup_epochs": 0})]


STUDIES = {"tuning": Study(tuning()), "ablation": Study(ablation()), "batch_size": Study(batch_size()),
           "longer": Study(longer(), epochs=20), "convergence": Study(convergence(), images=0),
           "all_images": Study(all_images(), images=0), "hard": Study(hard_negatives(), images=0)}
