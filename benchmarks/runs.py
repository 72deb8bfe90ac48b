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


# AUC-CL with hard negatives (presets whose settings, but the margin of quartic, were chosen on training
# images) and the softmax losses, alike but for the loss: name -> (loss, options, flags).
ALIKE = {"projector": WIDE, "lr": 8e-3}
HARD = {
    "AUC-CL quartic": ("AUCCLLoss", {}, ALIKE | {"preset": "quartic", "weights_lr": 1e-3}),
    "AUC-CL hard": ("AUCCLLoss", {}, ALIKE | {"preset": "hard", "weights_lr": 1e-3}),
    "AUC-CL": ("AUCCLLoss", {}, ALIKE | {"weights_lr": 1e-3}),
    "DCL": ("DCLLoss", {"temperature": 0.1}, ALIKE),
    "NT-Xent": ("NTXentLoss", {"temperature": 0.1}, ALIKE),
}


def seeded(configs, *seeds: int) -> list[Config]:
    """Every run with every seed, which its name ends with."""
    return [config._replace(name=f"{config.name} s{seed}", flags=config.flags | {"seed": seed})
            for seed in seeds for config in configs]


def hard_negatives() -> list[Config]:
    """On all images, where faster weights suit (1); the softmax losses also at their best in hard_tuning."""
    changes = {"AUC-CL": {"weights_lr": 4e-3}}
    configs = [Config(name, flags | changes.get(name, {}), loss, options)
               for name, (loss, options, flags) in HARD.items()]
    configs += [Config(f"{name}, lr 0.006", ALIKE | {"lr": 6e-3}, *HARD[name][:2])
                for name in ("DCL", "NT-Xent")]
    return seeded(configs, *range(5))


def fourth_moment(weight=80, nu=8, **options):
    """(3), by default with the margin 1 (the preset quartic has 2): loss, options, flags."""
    options = {"weight": weight, "negative_weight": float(nu), **options}
    return "FourthMoment", options, ALIKE | {"weights_lr": 1e-3}


def hard_tuning() -> list[Config]:
    """On all images, single changes of the preset hard and of the softmax losses, and weights of the fourth
    moment. To choose by --held_out."""
    def hard(flags={}, **options):
        return "Hard", options, ALIKE | {"weights_lr": 1e-3} | flags

    def softmax(loss, temperature=0.1, **flags):
        return loss, {"temperature": temperature}, ALIKE | flags

    changes = {
        "hard": hard(), "hard, all held": hard(learn=()), "hard, a held": hard(learn=("alpha",)),
        "hard, alpha held": hard(learn=("a",)), "hard, b learned": hard(learn=("a", "b", "alpha")),
        **{f"hard, weights_lr {rate:g}": hard({"weights_lr": rate}) for rate in (4e-3, 1e-2)},
        **{f"hard, T {t}": hard(temperature=t) for t in (0.07, 0.15, 0.2)},
        **{f"hard, nu {nu}": hard(negative_weight=nu) for nu in (2.0, 4.0, 16.0)},
        **{f"hard, kappa {kappa}": hard(margin_negative_weight=kappa) for kappa in (0.5, 2.0)},
        **{f"hard, lr {lr:g}": hard({"lr": lr}) for lr in (4e-3, 6e-3, 1.2e-2)},
        **{f"fourth moment {weight}, nu {nu}": fourth_moment(weight, nu)
           for weight, nu in ((80, 8), (40, 8), (160, 8), (80, 4))},
        "fourth moment 80, nu 8, margin 2": fourth_moment(margin=2.0),
        "fourth moment 80, nu 8, all held": fourth_moment(learn=()),
    }
    for name, loss in {"DCL": "DCLLoss", "NT-Xent": "NTXentLoss"}.items():
        changes |= {name: softmax(loss), **{f"{name}, T {t}": softmax(loss, t) for t in (0.07, 0.15, 0.2)},
                    **{f"{name}, lr {lr:g}": softmax(loss, lr=lr) for lr in (4e-3, 6e-3, 1.2e-2)}}
    return seeded([Config(name, flags, loss, options)
                   for name, (loss, options, flags) in changes.items()], 0, 1)


def hard_batch(sizes, warm_up: float) -> list[Config]:
    """HARD's methods at the batch sizes, for equal epochs; the longest runs first. warm_up: epochs, chosen at
    256 and 512 images by the study of that name."""
    return [run for size in sizes for run in seeded(
        [Config(f"{name} b{size}", at_batch_size(flags, size) | {"warmup_epochs": warm_up}, loss, options)
         for name, (loss, options, flags) in HARD.items()], 0, 1)]


def warm_up() -> list[Config]:
    """Warm-up epochs of large batches. To choose by --held_out."""
    return seeded([Config(f"{name} b{size} w{epochs:g}",
                          at_batch_size(HARD[name][2], size) | {"warmup_epochs": epochs}, *HARD[name][:2])
                   for size in (512, 256) for epochs in (0.5, 1, 2)
                   for name in ("AUC-CL quartic", "AUC-CL", "DCL", "NT-Xent")], 0, 1)


def more_epochs() -> list[Config]:
    """(3) in longer training: a + alpha falls from 2 towards the margin 1, and with it the pull on positives,
    unless all are held, or the margin is 2, as in the preset quartic. To choose by --held_out."""
    runs = {"DCL": HARD["DCL"], "NT-Xent": HARD["NT-Xent"], "margin 1": fourth_moment(),
            "all held": fourth_moment(learn=()), "margin 2": fourth_moment(margin=2.0),
            "margin 1, nu 4, rho 40": fourth_moment(40, 4)}
    return seeded([Config(name, flags, loss, options) for name, (loss, options, flags) in runs.items()], 0, 1)


def views() -> list[Config]:
    """V views: at 512 views a step with equal epochs, or with equal views seen (20, 10 and 5 epochs); at 256
    images a step with equal epochs. DCL, which takes two views, beside them."""
    settings = [(2, 256, 20), (4, 128, 10), (8, 64, 5), (8, 256, 5), (4, 256, 5), (2, 256, 5), (4, 128, 5)]
    configs = [Config(f"{name} V{v} b{size} e{epochs}",
                      HARD[name][2] | {"views": v, "batch_size": size, "epochs": epochs}, *HARD[name][:2])
               for v, size, epochs in settings for name in ("AUC-CL quartic", "AUC-CL")]
    configs += [Config(f"DCL V2 b256 e{epochs}", ALIKE | {"epochs": epochs}, *HARD["DCL"][:2])
                for epochs in (20, 5)]
    return seeded(configs, 0, 1)


def with_small(lr: float) -> list[Config]:
    """HARD's leading methods with the network `small` at another learning rate, the weights at half of it."""
    names = "AUC-CL quartic", "AUC-CL hard", "DCL", "NT-Xent"
    return [Config(name, HARD[name][2] | {"arch": "small", "lr": lr, "weights_lr": lr / 2}, *HARD[name][:2])
            for name in names]


def small_tuning() -> list[Config]:
    """Learning rates for `small`. To choose by --held_out."""
    return [run._replace(name=f"{run.name} lr{lr:g}") for lr in (2e-3, 4e-3, 8e-3) for run in with_small(lr)]


def variants() -> list[Config]:
    """Other ways to hard negatives, and the poster's printed loss."""
    fast = {"learn": "a alpha", "weights_lr": 1e-2}
    per_anchor = {"dim": int(WIDE.split()[1])}
    ours = ALIKE | {"weights_lr": 1e-3}
    return seeded([
        *(Config(name, flags, loss, options) for name, (loss, options, flags) in HARD.items()
          if name != "AUC-CL quartic"),     # (3) follows, with the margin 1
        *(Config(f"fourth moment {weight}, nu 8", ours, "FourthMoment",
                 {"weight": weight, "negative_weight": 8.0}) for weight in (40, 80)),
        *(Config(f"b held, a and alpha fast, nu {nu}", ours | fast | {"negative_weight": nu})
          for nu in (8, 16)),
        *(Config(f"per anchor, nu {nu}", ours, "PerAnchor", per_anchor | {"negative_weight": float(nu)})
          for nu in (8, 16)),
        Config("poster", ours | {"preset": "poster"})], 0, 1)


def convergence() -> list[Config]:
    """Every method as tuned; AUC-CL also as it is best on all images; the released preset's own recipe."""
    return [*(Config(name, flags, loss, options) for name, (loss, options, flags) in METHODS.items()),
            Config("AUC-CL, 2048-1024, weights_lr 4e-3", AUC_CL | {"projector": WIDE, "weights_lr": 4e-3}),
            *(Config(name, HARD[name][2]) for name in ("AUC-CL hard", "AUC-CL quartic")),
            Config("released-cifar", {"preset": "released-cifar", "warmup_epochs": 0})]


STUDIES = {"tuning": Study(tuning()), "ablation": Study(ablation()), "batch_size": Study(batch_size()),
           "longer": Study(longer(), epochs=20), "convergence": Study(convergence(), images=0),
           "all_images": Study(all_images(), images=0), "hard": Study(hard_negatives(), images=0),
           "hard_tuning": Study(hard_tuning(), images=0),
           "hard_batch": Study(hard_batch((16, 32, 64, 128, 256, 512), 2)),
           "hard_longer": Study(hard_batch((8, 16), 0.5) + hard_batch((512,), 2), epochs=20),
           "warm_up": Study(warm_up()), "more_epochs": Study(more_epochs(), epochs=20),
           "views": Study(views()), "variants": Study(variants()), "small_tuning": Study(small_tuning()),
           "long": Study(seeded(with_small(4e-3), 0, 1), images=0, epochs=12)}
