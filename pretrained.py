"""A file of weights -> a backbone and how to feed it; the features of a data set.

    backbone, description = load_backbone("checkpoint.pth")                   # [B, 3, H, W] -> [B, F]
    transform = data.eval_transform(description.image_size, description.mean, description.std)
    train, test = data.build_splits("folder", root, transform)
    features, labels = extract_features(backbone.to(device), train, device)
"""
import argparse
import json
import math
import zlib
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from timm.layers import resample_abs_pos_embed

import data
import distributed
import utils
from augmentations import IMAGENET_MEAN, IMAGENET_STD
from utils import UserError
from vision_transformer import CIFAR_ARCHS, VIT_ARCHS, build_backbone

DINO_NAMES = {"deit_tiny": "vit_tiny", "deit_small": "vit_small"}  # in DINO's older files
CHECKPOINT = Path("checkpoint.pth")                                # where main.py writes by default
NAMED_KEYS = 5                                                     # keys of weights that an error lists


class Description(NamedTuple):
    """How to build and feed a backbone. patch_size: of a ViT, else None. mean, std: of the three channels.
    checkpoint_key: the network of a checkpoint; None for weights alone and random ones."""

    arch: str
    patch_size: int | None
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    checkpoint_key: str | None = None


def load_backbone(path, checkpoint_key=None, arch=None, patch_size=None, image_size=None,
                  random_weights=False, drop_path_rate=0.0):
    """A frozen backbone in evaluation mode, images [B, 3, H, W] -> features [B, F], and its Description.

    path: a checkpoint of main.py, cifar/main.py or DINO, or weights alone as DINO, timm and torchvision
        publish them (.safetensors or .pth). No code of the file is run. None with `random_weights`.
    checkpoint_key: the network of a checkpoint; by default the teacher, or the only one there.
    arch, patch_size, image_size: what the file does not tell; by default patches of 16 pixels, and images of
        224 or, for timm's models, of the size that they were trained on.
    drop_path_rate: stochastic depth of a vit_*, should it be trained further.

    Weights must fit name by name; only a classifier is left out, with a note. UserError for a file that
    cannot be read, a wrong key, weights that do not fit, and arguments that contradict the file.
    """
    # What the file tells comes first, then the arguments, then what is usual.
    if random_weights == (path is not None):
        raise UserError("give either --pretrained_weights or --random_weights")
    weights, known = _read_weights(Path(path), checkpoint_key) if path is not None else ({}, {})
    given = {"arch": DINO_NAMES.get(arch, arch), "patch_size": patch_size, "image_size": image_size}
    given = {name: value for name, value in given.items() if value is not None}
    arch = known.get("arch", given.get("arch"))
    if arch is None:
        raise UserError(f"{path or '--random_weights'} does not tell the architecture; name it with --arch")
    if arch in VIT_ARCHS and {"patch_embed.proj.weight", "pos_embed"} <= weights.keys():
        patch = weights["patch_embed.proj.weight"].shape[-1]
        side = math.isqrt(weights["pos_embed"].shape[1] - 1)  # patches
        known = {"patch_size": patch, "image_size": patch * side, **known}
    for name, value in given.items():
        if known.get(name, value) != value:
            raise UserError(f"--{name} {value} contradicts {path}, whose {name} is {known[name]}; leave "
                            f"--{name} out")

    usual = _usual_input(arch)
    description = Description(**{**usual, **given, **known})
    built_size = description.image_size
    if arch.startswith("timm/"):  # its position embeddings are those of the file, or of timm's training
        built_size = known.get("image_size", usual["image_size"])
    with utils.user_errors():
        backbone = build_backbone(arch, description.patch_size or 16, built_size, drop_path_rate)
    if "patch_size" in given and arch not in VIT_ARCHS:
        raise UserError(f"--patch_size has no meaning for {arch}; leave it out")
    if weights:
        _load_strictly(backbone, weights, path)
    backbone.eval().requires_grad_(False)
    if description.image_size != built_size:
        try:
            backbone(torch.zeros(1, 3, description.image_size, description.image_size))
        except (AssertionError, RuntimeError) as error:
            raise UserError(f"{arch} takes images of {built_size} pixels, not {description.image_size}; "
                            "leave --image_size out") from error
    return backbone, description


def init_backbones(backbones, source, description: Description, download=False):
    """Copies the weights named by --init_weights into networks of one architecture, and says so in a line.

    source: the path of a file that `load_backbone` reads, or the text "timm/NAME", fetched if `download`.
    description: of the backbones. Of a ViT, position embeddings are resampled to the backbone's image size.

    UserError as by `load_backbone`.
    """
    first, *others = backbones
    if isinstance(source, Path):
        weights, known = _read_weights(source, None)
    else:
        weights, known = _fetch_timm(source, download)
    if known.get("arch", description.arch) != description.arch:
        raise UserError(f"--init_weights {source} holds {known['arch']}, this run trains {description.arch}; "
                        "give the same --arch")
    lines = [f"the backbone starts from {source}, the head anew"]
    if isinstance(first, timm.models.VisionTransformer) and "pos_embed" in weights:
        prefix = 0 if first.no_embed_class else first.num_prefix_tokens
        given, grid = weights["pos_embed"], first.patch_embed.grid_size
        if given.shape[1] != prefix + math.prod(grid):
            weights["pos_embed"] = resample_abs_pos_embed(given, grid, num_prefix_tokens=prefix)
            lines.append(f"position embeddings resampled from {given.shape[1] - prefix} to {math.prod(grid)} "
                         "patches")
    _load_strictly(first, weights, source, advice="Check --arch and --patch_size")
    for backbone in others:
        backbone.load_state_dict(first.state_dict())
    own = {"mean": tuple(description.mean), "std": tuple(description.std)}
    if any(known.get(name, value) != value for name, value in own.items()):
        lines.append(f"its images had mean {known['mean']} and std {known['std']}, here they have "
                     f"{own['mean']} and {own['std']}")
    if distributed.rank() == 0:
        print("; ".join(lines), flush=True)


def _fetch_timm(source, download):
    """The weights of "timm/NAME", without classifier, and how their images were normalised."""
    if not download:
        raise UserError(f"--init_weights {source} comes over the network; add --download, or give a file")
    try:
        network = timm.create_model(source.removeprefix("timm/"), pretrained=True, num_classes=0)
    except Exception as error:  # huggingface_hub, its client and timm each raise their own
        raise UserError(f"cannot fetch {source}: {utils.reason(error)}; check its name and the network, or "
                        "give a file") from error
    trained = network.pretrained_cfg
    return network.state_dict(), {name: tuple(trained[name]) for name in ("mean", "std")}


def export_backbone(backbone, description: Description, path: Path) -> None:
    """Writes the backbone's weights as .safetensors, whose metadata is the description, in JSON."""
    from safetensors.torch import save
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in backbone.state_dict().items()}
    content = save(tensors, {name: json.dumps(value) for name, value in description._asdict().items()})
    utils.replace_file(path, lambda file: file.write(content), "wb")


def _read_safetensors(path):
    """The weights, and the description if `export_backbone` wrote the file."""
    from safetensors import SafetensorError, safe_open
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            known = {name: json.loads(metadata[name]) for name in Description._fields if "mean" in metadata}
            return {key: file.get_tensor(key) for key in file.keys()}, known
    except (SafetensorError, ValueError, KeyError) as error:
        raise UserError(f"cannot read weights {path}: {utils.reason(error)}; restore a copy") from error


def _read_checkpoint(path, checkpoint_key):
    """The whole file, and the fields of Description that it tells, in our words or by DINO's flags."""
    # A Namespace only takes attributes: to build one, as DINO's files do for their flags, runs no code.
    with torch.serialization.safe_globals([argparse.Namespace]):
        state = utils.load_checkpoint(
            path, "if you trust its source, save the weights alone: torch.save(torch.load(PATH, "
                  f"weights_only=False)[{checkpoint_key or 'teacher'!r}], 'weights.pth')")
    known, flags = state.get("backbone"), state.get("args")
    if isinstance(known, dict) and "arch" in known:
        return state, {name: known[name] for name in Description._fields if name in known}
    flags = vars(flags) if isinstance(flags, argparse.Namespace) else flags
    arch = flags.get("arch") if isinstance(flags, dict) else None
    return state, {"arch": DINO_NAMES.get(arch, arch)} if isinstance(arch, str) else {}


def _read_weights(path, checkpoint_key):
    """The weights of a file with the backbone's keys, and the fields of Description that the file tells."""
    if path.exists() and not path.is_file():  # to open a FIFO would wait for ever
        raise UserError(f"{path} is no regular file; name a file of weights")
    if path.suffix == ".safetensors":
        state, known = _read_safetensors(path)
    else:
        state, known = _read_checkpoint(path, checkpoint_key)
    known = {name: tuple(value) if isinstance(value, list) else value for name, value in known.items()}

    networks = {key: value for key, value in state.items() if "loss" not in key and _is_state_dict(value)}
    if _is_state_dict(state):
        if checkpoint_key:
            raise UserError(f"{path} holds one network and no key {checkpoint_key!r}; leave --checkpoint_key "
                            "out")
        weights = state
    elif networks:
        key = checkpoint_key or ("teacher" if len(networks) > 1 else next(iter(networks)))
        if key not in networks:
            there = " or ".join(f"--checkpoint_key {key}" for key in networks)
            raise UserError(f"{path} has no network {key!r}; choose {there}")
        weights, known = networks[key], {**known, "checkpoint_key": key}
    else:
        raise UserError(f"{path} holds no network's weights, only {', '.join(map(str, state)) or 'nothing'}")
    weights = {key.removeprefix("module."): value for key, value in weights.items()}
    if any(key.startswith("backbone.") for key in weights):  # beside it, the projection head
        weights = {key.removeprefix("backbone."): value for key, value in weights.items()
                   if not key.startswith("head.")}
    return weights, known


def _is_state_dict(value):
    return isinstance(value, dict) and value and all(isinstance(w, torch.Tensor) for w in value.values())


def _usual_input(arch):
    """How a backbone is built and fed where nothing else tells."""
    usual = {"patch_size": 16 if arch in VIT_ARCHS else None,
             "image_size": 32 if arch in CIFAR_ARCHS else 224, "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    if arch.startswith("timm/") and (trained := timm.get_pretrained_cfg(arch.removeprefix("timm/"))):
        usual.update(image_size=trained.input_size[-1], mean=trained.mean, std=trained.std)
    return usual


def _load_strictly(backbone, weights, path, advice="Check --arch and --checkpoint_key"):
    """Copies the weights; a classifier is left out, with a note. UserError, with `advice`, if names or shapes
    differ."""
    own = backbone.state_dict()
    layers = getattr(backbone, "pretrained_cfg", {}).get("classifier") or ()
    layers = tuple(f"{x}." for x in ("head", "fc", *([layers] if isinstance(layers, str) else layers)))
    unknown = [key for key in weights if key not in own]
    left_out = [key for key in unknown if key.startswith(layers)]
    differing = {
        "missing": [key for key in own if key not in weights and not key.endswith("num_batches_tracked")],
        "unexpected": [key for key in unknown if key not in left_out],
        "of other shapes": [f"{key} {list(weights[key].shape)}, not {list(own[key].shape)}" for key in own
                            if key in weights and weights[key].shape != own[key].shape]}
    if any(differing.values()):
        text = "; ".join(f"{len(keys)} {kind}: {', '.join(keys[:NAMED_KEYS])}"
                         f"{', ...' if len(keys) > NAMED_KEYS else ''}"
                         for kind, keys in differing.items() if keys)
        raise UserError(f"the weights in {path} do not fit the backbone, {text}. {advice}")
    if left_out and distributed.rank() == 0:
        print(f"note: the classifier in {path} is not used: {', '.join(left_out)}", flush=True)
    backbone.load_state_dict(weights, strict=False)


@torch.no_grad()
def feature_batches(network, loader, device, amp_dtype=None):
    """Yields features [b, F] in float32, on `device`, and labels [b] for the loader's (images, labels).

    network: images [B, 3, S, S] on `device` -> [B, F], in evaluation mode. UserError for images that cannot
    be decoded, and features that are not finite.
    """
    for images, labels in loader:
        with utils.autocast(device, amp_dtype):
            rows = network(utils.send(images, device)).float()
        if not rows.isfinite().all():
            raise UserError("the backbone's features are not finite; its training may have diverged, or "
                            "--amp none may help")
        yield rows, labels


@torch.no_grad()
def extract_features(network, dataset, device, batch_size=128, num_workers=0, amp_dtype=None,
                     title="features", keep_on=None):
    """Features [N, F] in float32 and labels [N] of all images in order, on every rank: see `feature_batches`.

    dataset: of `data.build_dataset`; every image is computed once. keep_on: the device of the results.
    UserError also for an empty data set.
    """
    if len(dataset) == 0:
        raise UserError("there are no images to compute features of; check --data_path")
    own = distributed.share(range(len(dataset)))
    images = torch.utils.data.Subset(dataset, own or range(1))  # a rank without images needs the width F
    features, labels = [], []
    loader = data.make_loader(images, device, num_workers, batch_size=batch_size)
    loader = utils.progress(loader, 0, len(loader), title, quiet=distributed.rank() > 0)
    for rows, targets in feature_batches(network, loader, device, amp_dtype):
        features.append(rows.to(keep_on or device))
        labels.append(targets.clone().to(keep_on or device))  # a worker's tensor would keep a file open
    features, labels = torch.cat(features)[:len(own)], torch.cat(labels)[:len(own)]
    return distributed.gather_rows(features, len(dataset)), distributed.gather_rows(labels, len(dataset))


def checksum(backbone: torch.nn.Module) -> int:
    """Tells backbones apart, whatever their files are called."""
    total = 0
    for value in backbone.state_dict().values():
        total = zlib.crc32(value.float().cpu().numpy().tobytes(), total)
    return total


def load_from_flags(args, drop_path_rate=0.0):
    """`load_backbone` by the flags of `utils.add_backbone_flags`; fills in paths that were not given."""
    if args.random_weights:
        utils.refuse(args, ("checkpoint_key",), "with --random_weights")
    if args.data_path is None and args.dataset in data.DATASETS and args.dataset != "folder":
        args.data_path = Path(__file__).resolve().parent / "cifar" / "datasets"
    if args.pretrained_weights is None and not args.random_weights:
        if not CHECKPOINT.exists():
            raise UserError(f"--pretrained_weights is missing, and there is no {CHECKPOINT.resolve()}; name "
                            "a file of weights, or ask for --random_weights")
        args.pretrained_weights = CHECKPOINT
        if distributed.rank() == 0:
            print(f"note: no --pretrained_weights; taking {CHECKPOINT.resolve()}", flush=True)
    torch.manual_seed(args.seed)
    return load_backbone(args.pretrained_weights, args.checkpoint_key, args.arch, args.patch_size,
                         args.image_size, args.random_weights, drop_path_rate)


def describe_run(args, description: Description) -> dict:
    """The fields of a result's record that name the network and the data."""
    return {"weights": str(args.pretrained_weights or "random"), **description._asdict(),
            "dataset": args.dataset, "data_path": args.data_path and str(args.data_path)}


def write_record(record: dict, path: Path | None = None) -> None:
    """Prints a record, and appends it to `path` as a line of JSON; on the first rank alone."""
    if distributed.rank() == 0:
        print(utils.format_record(record), flush=True)
        if path:
            with utils.writing_to(path), open(path, "a") as file:
                file.write(json.dumps(record) + "\n")
