"""Evaluates frozen features by weighted k-nearest neighbours, or from a few labelled images per class.

    python eval_knn.py --pretrained_weights checkpoint.pth --data_path /path/to/imagenet                # our and DINO's checkpoints
    torchrun --nproc_per_node=8 eval_knn.py --pretrained_weights checkpoint.pth --data_path /path/to/imagenet --use_cuda False
    python eval_knn.py --pretrained_weights resnet50.safetensors --arch resnet50 --dataset cifar10 --download
    python eval_knn.py --pretrained_weights checkpoint.pth --data_path DIR --shots 5 --episodes 100
    python eval_knn.py --random_weights --arch vit_small --data_path DIR                                # the baseline of any table

DIR holds train/ and val/ (or test/), each with a folder of images per class. As a module:

    accuracy = knn_accuracy(bank, bank_labels, queries, query_labels, ks=(10, 20, 100, 200))
    top1, top5 = accuracy[200]                                                             # percent

The classifier is that of Wu et al., "Unsupervised feature learning via non-parametric instance discrimination" (CVPR 2018), as
DINO uses it. The search is exact, in float32, and holds a few chunks in memory whatever the number of images, classes and
neighbours; several ranks share the bank. Features are computed in full precision unless --amp says otherwise.
"""
import argparse
import json
import math
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
stdtrit = None

import utils

# ------------------------------------------------------------------------------------------------------------- classifier

QUERY_CHUNK, BANK_CHUNK = 256, 65536        # rows; their cosines are 64 MB
BANK_FEATURES = 2 ** 24                     # normalised features of the bank held at once; 64 MB
NEIGHBOURS = 2 ** 20                        # neighbours kept at once, over all queries; 8 MB of keys
SCORES = 2 ** 18                            # class scores held at once; 2 MB
BLOCK, PART = 32, 4                         # columns that the search discards together
LAST = torch.iinfo(torch.int64).min         # the key behind every neighbour's


@torch.no_grad()
def knn_accuracy(bank, bank_labels, queries, query_labels, ks=(10, 20, 100, 200), temperature=0.07, num_classes=None, vote="exp"):
    """Top-1 and top-5 accuracy, in percent, of `knn_classify`: a dict k -> (top1, top5).

    query_labels: [Q] integers, Q >= 1, below num_classes where that is given; a class beyond the bank's is otherwise a miss.
    Other arguments and errors as for `knn_classify`. With C < 5 classes top-5 is top-C.
    """
    _check_labels(len(queries), query_labels, num_classes, "query")
    predictions = knn_classify(bank, bank_labels, queries, ks, temperature, num_classes, vote)
    return {k: _percent(_hits(classes, query_labels)) for k, classes in predictions.items()}


@torch.no_grad()
def knn_classify(bank, bank_labels, queries, ks=(200,), temperature=0.07, num_classes=None, vote="exp"):
    """The five classes that each query's k nearest neighbours vote highest.

    bank: [N, D], bank_labels: [N] integers, queries: [Q, D]. Features of any float dtype, normalised here; a zero row has cosine
    0 with all.
    ks: numbers of neighbours, all served by one search; one above N takes the whole bank.
    num_classes: by default the largest label of the bank plus one.
    vote: what a neighbour adds to its class, "exp" exp(cos / temperature) or "linear" (cos + 1) / 2.

    Returns a dict k -> [Q, min(5, num_classes)] int64, the best class first.

    Of equal cosines the lower bank index is nearer; of equal scores the lower class is first, classes without a vote included.
    Cosines are float32 and scores float64 as computed: chunks of another size can move the last bit of a cosine, and CUDA adds
    votes in no fixed order.

    ValueError: shapes, lengths or labels that do not fit, an empty bank, features that are not finite, k < 1, temperature <= 0,
    an unknown vote.
    """
    predictions = knn_sweep(bank, bank_labels, queries, ks, (temperature,), num_classes, vote)
    return {k: predictions[k, temperature] for k in ks}


@torch.no_grad()
def knn_sweep(bank, bank_labels, queries, ks, temperatures, num_classes=None, vote="exp", shared=False):
    """`knn_classify` for several temperatures by one search: a dict (k, temperature) -> [Q, min(5, num_classes)].

    shared: the bank is shared out over the W ranks of the process group: `bank` holds rows rank, rank + W, ... of it, while
        `bank_labels` are of all its N rows. The results are those of one rank that holds it all, ties included, on every rank.
    """
    _check_features(bank, queries)
    _check_vote(ks, temperatures, vote)
    total = len(bank_labels) if shared else len(bank)
    _check_labels(total, bank_labels, num_classes, "bank")
    if num_classes is None:
        num_classes = int(bank_labels.max()) + 1
    bank_labels = bank_labels.to(bank.device, torch.int64)
    search = _search_shared if shared and utils.world_size() > 1 else _search

    predictions = {(k, temperature): [] for k in ks for temperature in temperatures}
    deepest = min(max(ks), total)
    rows = max(1, SCORES // num_classes)
    for block in queries.split(max(1, NEIGHBOURS // deepest)):
        for keys in search(bank, block, deepest).split(rows):
            cos, labels = _read_cos(keys), bank_labels[_read_index(keys)]
            for temperature in temperatures:
                for k, classes in knn_vote(cos, labels, num_classes, ks, temperature, vote).items():
                    predictions[k, temperature].append(classes)
    return {setting: torch.cat(classes) for setting, classes in predictions.items()}


@torch.no_grad()
def knn_search(bank, queries, k):
    """Cosines (float32) and bank indices (int64), [Q, k] each, of every query's k nearest rows of the bank, nearest first.

    bank: [N, D], queries: [Q, D], 1 <= k <= N; the results are on the bank's device. Ties and errors as for `knn_classify`.
    """
    _check_features(bank, queries)
    if not 1 <= k <= len(bank):
        raise ValueError(f"k must lie between 1 and the bank's {len(bank)} rows, got {k}")
    keys = _search(bank, queries, k)
    return _read_cos(keys), _read_index(keys)


@torch.no_grad()
def knn_vote(cos, labels, num_classes, ks=(200,), temperature=0.07, vote="exp"):
    """The vote of `knn_classify` among neighbours already found; for several temperatures, search once and vote for each.

    cos, labels: [Q, n], the neighbours' cosines, nearest first, and classes. Returns as `knn_classify`; holds [Q, num_classes].
    """
    _check_vote(ks, (temperature,), vote)
    cos = cos.double()                      # a wide range: at temperature 0.001 a neighbour 0.2 behind votes exp(-200)
    if vote == "exp":
        votes = ((cos - cos[:, :1]) / temperature).exp()                # relative to the nearest: same ranking, no overflow
    else:
        votes = ((cos + 1) / 2).clamp_min(0)                            # rounding may leave cos just below -1
    scores = votes.new_zeros(len(cos), num_classes)                     # [Q, C]
    predictions, counted = {}, 0
    for k in sorted(ks):
        scores.scatter_add_(1, labels[:, counted:k], votes[:, counted:k])
        predictions[k], counted = _highest(scores, min(5, num_classes)), k
    return predictions


def _search(bank, queries, k):
    """The neighbours of `knn_search` as `_keys`, [Q, k] int64: all k are real, since k <= N; sorting keys settles ties."""
    nearest = torch.full((len(queries), k), LAST, device=bank.device)
    step = max(1, min(len(bank), BANK_CHUNK, BANK_FEATURES // bank.shape[1]))
    # One buffer for all products: on a CPU, the first touch of fresh memory costs as much as selecting from it.
    buffer = torch.empty(min(QUERY_CHUNK, len(queries)) * _padded(step), device=bank.device)
    with _full_float32():
        for start in range(0, len(bank), step):
            rows = _unit_rows(bank[start:start + step])                                                     # [n, D]
            width = _padded(len(rows))
            for chunk, best in zip(queries.split(QUERY_CHUNK), nearest.split(QUERY_CHUNK)):
                cos = buffer[:len(chunk) * width].view(len(chunk), width)                                   # [q, n, padded]
                cos[:, len(rows):] = -torch.inf
                torch.mm(_unit_rows(chunk.to(bank.device)), rows.T, out=cos[:, :len(rows)])
                best.copy_(torch.cat([best, _candidates(cos, k) - start], 1).topk(k).values)
    return nearest


def _search_shared(shard, queries, k):
    """`_search` in a bank of which rank r of W holds rows r, r + W, ...: each rank's k nearest, then the k nearest of those."""
    keys = queries.new_full((len(queries), k), LAST, dtype=torch.int64, device=shard.device)
    own = min(k, len(shard))
    if own:
        found = _search(shard, queries, own)
        keys[:, :own] = _keys(_read_cos(found), _read_index(found) * utils.world_size() + utils.rank())
    candidates = utils.gather_rows(keys[None], utils.world_size())                                          # [W, Q, k]
    return candidates.transpose(0, 1).flatten(1).topk(k).values


def _padded(columns):
    return -(-columns // BLOCK) * BLOCK


def _candidates(cos, k):
    """Keys of entries of cos [q, n], n a multiple of BLOCK, that include the k largest of each row: [q, min(PART * k, n)].

    The k largest lie in the k blocks of columns with the largest maxima: an entry of any other block is behind k of them. So blocks
    are discarded first, then parts of those left. Both rank by (maximum, lower column), which keeps the rule for ties.
    """
    queries, width = cos.shape
    first_entry = torch.arange(queries, device=cos.device)[:, None] * width
    entries, columns = cos, torch.zeros(queries, 1, dtype=torch.int64, device=cos.device)
    for part in (BLOCK, PART):
        columns = (columns[..., None] + torch.arange(0, width, part, device=cos.device)).flatten(1)         # [q, parts] begins
        maxima = _keys(entries.view(*columns.shape, part).amax(2), columns)
        columns, width = _read_index(maxima.topk(min(k, columns.shape[1]), sorted=False).values), part      # [q, <= k]
        entries = cos.view(-1, part).index_select(0, ((first_entry + columns) // part).flatten())           # [q * <= k, part]
    columns = (columns[..., None] + torch.arange(PART, device=cos.device)).flatten(1)
    return _keys(entries.view(columns.shape), columns)


def _keys(cos, index):
    """int64 keys in the order of (cos, lower index): the float's bits, as an integer of the same order, above those of -index."""
    bits = (cos + 0.0).view(torch.int32)                                # + 0.0: -0.0 equals 0.0
    return (_flip_negative(bits).long() << 32) - index


def _read_index(keys):
    return -keys & 0xFFFFFFFF


def _read_cos(keys):
    order = (keys + _read_index(keys)) >> 32
    return _flip_negative(order.int()).view(torch.float32)


def _flip_negative(bits):
    """Sign and magnitude, as floats have it, to two's complement order, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _unit_rows(features):
    """Rows of length one in float32; a zero row stays zero. Scaled by the largest entry first, lest squares overflow or vanish."""
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    largest = torch.linalg.vector_norm(features, torch.inf, dim=1, keepdim=True)
    if not largest.isfinite().all():
        raise ValueError("features must be finite")
    features = features / largest.clamp_min(torch.finfo(features.dtype).tiny)
    norm = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    return features.div_(norm.clamp_min(torch.finfo(features.dtype).tiny)).float()


def _highest(scores, count):
    """Columns of the `count` highest scores of each row; argmax, unlike topk and sort, takes the first of equals."""
    scores, columns = scores.clone(), []
    for _ in range(count):
        columns.append(scores.argmax(1, keepdim=True))
        scores.scatter_(1, columns[-1], -1.0)
    return torch.cat(columns, 1)


def _hits(classes, labels):
    """Whether the first, and any, of the classes [Q, 5] is the label: bool [Q, 2]."""
    hits = classes == labels.to(classes.device)[:, None]
    return torch.stack([hits[:, 0], hits.any(1)], 1)


def _percent(hits):
    return tuple((100 * hits.double().mean(0)).tolist())


@contextmanager
def _full_float32():
    """Turns off the TF32 and bfloat16 products that training may have turned on for float32."""
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):           # torch >= 2.9
        backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
        before = [backend.fp32_precision for backend in backends]
        try:
            for backend in backends:
                backend.fp32_precision = "ieee"
            yield
        finally:
            for backend, precision in zip(backends, before):
                backend.fp32_precision = precision
    else:
        before = torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision("highest")
            yield
        finally:
            torch.set_float32_matmul_precision(before)


def _check_features(bank, queries):
    if bank.dim() != 2 or queries.dim() != 2 or bank.shape[1] != queries.shape[1] or bank.shape[1] == 0:
        raise ValueError(f"bank and queries must be [N, D] and [Q, D], got {list(bank.shape)} and {list(queries.shape)}")
    if not bank.is_floating_point() or not queries.is_floating_point():
        raise ValueError(f"features must be floating point, got {bank.dtype} and {queries.dtype}")


def _check_labels(count, labels, num_classes, side):
    if labels.shape != (count,) or labels.is_floating_point():
        raise ValueError(f"{side} labels must be {count} integers, got {labels.dtype} {list(labels.shape)}")
    if len(labels) == 0:
        raise ValueError(f"there are no {side} images")
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or num_classes is not None and highest >= num_classes:
        raise ValueError(f"{side} labels must lie in [0, {num_classes or 'num_classes'}), got {lowest} to {highest}")


def _check_vote(ks, temperatures, vote):
    if not ks or min(ks) < 1:
        raise ValueError(f"ks must be numbers of neighbours of at least 1, got {ks}")
    for temperature in temperatures:
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
    if vote not in ("exp", "linear"):
        raise ValueError(f'vote must be "exp" or "linear", got {vote!r}')


# ----------------------------------------------------------------------------------------------------------------- models

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DINO_NAMES = {"deit_tiny": "vit_tiny", "deit_small": "vit_small"}           # what its older files call them
NAMED_KEYS = 5                                                              # keys of weights that an error lists


class Description(NamedTuple):
    """What must be known of a backbone to feed it. patch_size: None unless it is one of our ViTs; mean, std: of channels;
    checkpoint_key: which network of its checkpoint it is, None for weights alone and random ones."""

    arch: str
    patch_size: int | None
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    checkpoint_key: str | None = None


def load_backbone(path, checkpoint_key="teacher", arch=None, patch_size=None, image_size=None, random_weights=False):
    """A frozen backbone in evaluation mode, images [B, 3, H, W] -> features [B, embed_dim], and its Description.

    path: a checkpoint of main.py, cifar/main.py or DINO, or a file of weights alone, as DINO, timm and torchvision publish them;
        .safetensors, or what torch.save wrote. No code of the file is ever run. None with `random_weights`.
    checkpoint_key: which network of a checkpoint with several; weights alone have none.
    arch, patch_size, image_size: needed (arch), or 16 and 224 by default, where the file does not tell. Files of other projects
        are fed ImageNet's mean and std, models of timm those they were trained with.

    Weights must fit name by name; only a classifier behind the features is left out, with a note. UserError for a file that
    cannot be read, a wrong key, weights that do not fit and arguments that contradict the file.
    """
    if random_weights:
        if path is not None:
            raise utils.UserError("--random_weights contradicts --pretrained_weights; leave one of them out")
        known, weights = {}, None
    elif path is None:
        raise utils.UserError("--pretrained_weights is missing; name a checkpoint, or ask for --random_weights")
    else:
        known, weights = _read_weights(Path(path), checkpoint_key)
    description, backbone = _build(known, path, arch, patch_size, image_size)
    if weights is not None:
        _load_strictly(backbone, weights, path)
    return backbone.eval().requires_grad_(False), description


def _read_weights(path, checkpoint_key):
    """What a file knows of its backbone (fields of Description), and the weights with their keys as the backbone's."""
    state, known = _read_file(path, checkpoint_key), {}
    networks = {key: value for key, value in state.items() if "loss" not in key and _is_state_dict(value)}
    if _is_state_dict(state):
        if checkpoint_key != "teacher":
            raise utils.UserError(f"{path} holds one network and no key {checkpoint_key!r}; leave --checkpoint_key out")
        weights = state
    elif checkpoint_key in networks:
        weights, known = networks[checkpoint_key], {"checkpoint_key": checkpoint_key}
    elif networks:
        there = " or ".join(f"--checkpoint_key {key}" for key in networks)
        raise utils.UserError(f"{path} has no network {checkpoint_key!r}; choose {there}")
    else:
        raise utils.UserError(f"{path} holds no network's weights, only {', '.join(map(str, state)) or 'nothing'}")
    weights = {key.removeprefix("module."): value for key, value in weights.items()}
    if any(key.startswith("backbone.") for key in weights):                 # beside it, the projection head of its training
        weights = {key.removeprefix("backbone."): value for key, value in weights.items() if not key.startswith("head.")}
    return known | _known(state, weights), weights


def _read_file(path, checkpoint_key):
    if path.suffix != ".safetensors":
        # DINO pickles its flags as a Namespace: an object that only takes attributes, so building one runs nothing.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return utils.load_checkpoint(path, "if you trust its source, save the weights alone: torch.save(torch.load(PATH, "
                                               f"weights_only=False)[{checkpoint_key!r}], 'weights.pth')")
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise utils.UserError(f"cannot read weights {path}: {error}") from error


def _is_state_dict(value):
    return isinstance(value, dict) and len(value) > 0 and all(isinstance(weight, torch.Tensor) for weight in value.values())


def _known(state, weights):
    """The fields of Description that a file tells: in its own words, DINO's flags, or by the shapes of a ViT's weights."""
    from vision_transformer import VIT_ARCHS
    if isinstance(state.get("backbone"), dict) and "arch" in state["backbone"]:
        return {name: tuple(value) if isinstance(value, list) else value for name, value in state["backbone"].items()}
    known = {}
    flags = state.get("args", {})
    flags = vars(flags) if isinstance(flags, argparse.Namespace) else flags
    if isinstance(flags, dict) and isinstance(flags.get("arch"), str):
        known["arch"] = DINO_NAMES.get(flags["arch"], flags["arch"])
    if {"patch_embed.proj.weight", "pos_embed"} <= weights.keys() and known.get("arch", "vit_tiny") in VIT_ARCHS:
        known["patch_size"] = weights["patch_embed.proj.weight"].shape[-1]
        known["image_size"] = known["patch_size"] * math.isqrt(weights["pos_embed"].shape[1] - 1)
    return known


def _build(known, path, arch, patch_size, image_size):
    """The Description of what a file and the flags tell together, and a backbone of it."""
    from vision_transformer import VIT_ARCHS, build_backbone
    arch = DINO_NAMES.get(arch, arch)
    given = {"arch": arch, "patch_size": patch_size, "image_size": image_size}
    if arch is not None and arch not in VIT_ARCHS and "arch" not in known:
        known = {"checkpoint_key": known.get("checkpoint_key")}             # shapes of weights tell of our ViTs alone
    told_size = known.get("image_size")
    for name, value in given.items():
        if value is not None and known.get(name, value) != value:
            raise utils.UserError(f"--{name} {value} contradicts {path}, whose {name} is {known[name]}; leave --{name} out")
    known = {**{name: value for name, value in given.items() if value is not None}, **known}
    if "arch" not in known:
        raise utils.UserError(f"{path or '--random_weights'} does not tell the architecture; give it as --arch")
    arch = known["arch"]
    if arch in VIT_ARCHS:
        known.setdefault("patch_size", 16)
    elif patch_size is not None:
        raise utils.UserError(f"--patch_size has no meaning for {arch}; leave it out")
    try:
        if arch.startswith("cifar/"):
            from cifar.model import ARCHS, build_backbone as build_small
            if (name := arch.removeprefix("cifar/")) not in ARCHS:
                raise ValueError(f"unknown arch {arch!r}: choose from {', '.join(f'cifar/{name}' for name in ARCHS)}")
            backbone = build_small(name)
            usual = {"image_size": 32}
        else:
            usual = _timm_input(arch) if arch.startswith("timm/") else {}
            size = told_size or usual.get("image_size") or image_size or 224               # of its position embeddings
            backbone = build_backbone(arch, known.get("patch_size") or 16, size)
            if usual and image_size:
                _try_size(backbone, image_size, size)
    except ValueError as error:
        raise utils.UserError(str(error)) from error
    values = {"patch_size": None, "image_size": 224, "mean": IMAGENET_MEAN, "std": IMAGENET_STD, "checkpoint_key": None,
              **usual, **known}
    return Description(**{name: values[name] for name in Description._fields}), backbone


def _timm_input(arch):
    """What timm trained a model of its own on; nothing for one it does not know."""
    import timm
    config = timm.get_pretrained_cfg(arch.removeprefix("timm/"))
    if config is None:
        return {}
    return {"image_size": config.input_size[-1], "mean": config.mean, "std": config.std}


def _try_size(backbone, image_size, usual):
    try:
        backbone.eval()(torch.zeros(1, 3, image_size, image_size))
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"this model of timm takes images of {usual} pixels, not {image_size}; leave --image_size out") from error


def _load_strictly(backbone, weights, path):
    """Copies the weights. UserError if names or shapes differ, but for the classifier's, which are left out with a note."""
    own = backbone.state_dict()
    layers = getattr(backbone, "pretrained_cfg", {}).get("classifier") or ()
    layers = {"head", "fc", *([layers] if isinstance(layers, str) else layers)}
    unexpected = [key for key in weights if key not in own]
    classifier = [key for key in unexpected if any(key.startswith(f"{layer}.") for layer in layers)]
    differing = {
        "missing": [key for key in own if key not in weights and not key.endswith("num_batches_tracked")],
        "unexpected": [key for key in unexpected if key not in classifier],
        "of other shapes": [f"{key} {list(weights[key].shape)}, not {list(own[key].shape)}" for key in own
                            if key in weights and weights[key].shape != own[key].shape]}
    if any(differing.values()):
        text = "; ".join(f"{len(keys)} {kind}: {', '.join(keys[:NAMED_KEYS])}{', ...' if len(keys) > NAMED_KEYS else ''}"
                         for kind, keys in differing.items() if keys)
        raise utils.UserError(f"the weights in {path} do not fit the backbone, {text}. Check --arch and --checkpoint_key")
    if classifier and utils.rank() == 0:
        print(f"note: the classifier in {path} is not used: {', '.join(classifier)}", flush=True)
    backbone.load_state_dict({key: value for key, value in weights.items() if key in own}, strict=False)


# --------------------------------------------------------------------------------------------------------------- features

@torch.inference_mode()
def extract_features(network, dataset, device, batch_size=128, num_workers=0, amp_dtype=None, title="features", gather=True,
                     keep_on=None):
    """Features [N, F] in float32 and labels [N] of all images in order, on every rank; each image is computed once.

    network: images [B, 3, S, S] on `device` -> [B, F], in evaluation mode. dataset: of `utils.build_dataset`, with its transform.
    gather: with False the features are only this rank's, of images rank, rank + W, ... of W ranks; the labels are still all.
    keep_on: the device of the results, `device` by default.

    UserError for an empty data set, for images that cannot be decoded, for features that are not finite, and for a stream of
    images on several ranks.
    """
    if isinstance(dataset, utils.ImageStream):
        if utils.world_size() > 1:
            raise utils.UserError("a stream of images cannot be shared out exactly over ranks; run one process")
        own, images, num_workers = None, dataset, 0
    elif len(dataset) == 0:
        raise utils.UserError("there are no images to compute features of")
    else:
        own = utils.share(range(len(dataset)))
        images = torch.utils.data.Subset(dataset, own or range(1))          # a rank without images learns the width from one
    loader = torch.utils.data.DataLoader(images, batch_size, num_workers=num_workers, pin_memory=device.type == "cuda",
                                         worker_init_fn=utils.leave_group)
    features, labels = [], []
    for (batch, targets), _ in utils.progress(loader, 0, -(-len(images) // batch_size), title):
        with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
            rows = network(batch.to(device, non_blocking=True))
        features.append(rows.float().to(keep_on or device))
        labels.append(targets.to(keep_on or device))
    if not all(rows.isfinite().all() for rows in features):
        raise utils.UserError("the backbone's features are not finite; its training may have diverged; or --amp none may help")
    features, labels = torch.cat(features), torch.cat(labels)
    if own is None:
        return features, labels
    features, labels = features[:len(own)], utils.gather_rows(labels[:len(own)], len(dataset))
    return utils.gather_rows(features, len(dataset)) if gather else features, labels


def draw_shots(labels, shots, generator):
    """Indices of `shots` images of each class, drawn without replacement: [C * shots], class by class. labels: [N] in [0, C), on
    the CPU. UserError for a class with fewer images."""
    counts = labels.bincount()
    if counts.min() < shots:
        scarce = int(counts.argmin())
        raise utils.UserError(f"--shots {shots} is more than the {int(counts[scarce])} training images of class {scarce}; lower it")
    return utils.split_by_class(labels, lambda n: shots, generator)[0]


# ----------------------------------------------------------------------------------------------------------- command line

DUMPS = "trainfeat.pth", "trainlabels.pth", "testfeat.pth", "testlabels.pth"


def add_evaluation_flags(parser):
    """The flags that all evaluations share."""
    add = parser.add_argument
    add("--pretrained_weights", type=Path, help="a checkpoint of main.py, cifar/main.py or DINO, or weights of timm or torchvision "
        "(.pth, .safetensors)")
    add("--checkpoint_key", default="teacher", help="the network of a checkpoint with several")
    add("--random_weights", action="store_true", help="evaluate an untrained network, the baseline")
    add("--arch", help="vit_tiny, vit_small, vit_base, a ResNet of torchvision, timm/NAME, cifar/NAME (default: the checkpoint's)")
    add("--patch_size", type=utils.positive_int, help="of a ViT, in pixels (default: the checkpoint's, else 16)")
    add("--image_size", type=utils.positive_int, help="pixels a side (default: the checkpoint's, timm's, or 224)")
    add("--dataset", type=utils.dataset_name, default="folder",
        help=f"{', '.join(utils.DATASETS)}, or a source of timm such as torch/NAME, hfds/NAME, wds/")
    add("--data_path", type=Path, help="the folder with train/ and val/, or the root of --dataset (default for others than folder: "
        "cifar/datasets beside this script)")
    add("--download", action="store_true", help="fetch --dataset if it is not in --data_path")
    add("--batch_size_per_gpu", type=utils.positive_int, default=128, help="images a batch of each process")
    add("--num_workers", type=utils.non_negative_int, default=10, help="processes that load images, for each process that computes")
    add("--amp", choices=("none", "auto", "bf16", "fp16"), default="none",
        help="autocast of the backbone; full precision by default, so that figures are comparable across machines")
    add("--seed", type=utils.non_negative_int, default=0, help="of random weights and of the choice of images")
    add("--output_dir", type=Path, help="where to append the results, a JSON object a line")
    utils.add_process_flags(parser)


def refuse_flags(parser, args, names, other):
    """UserError if one of the flags has another value than its default, which would have no effect beside the flag `other`."""
    if given := [f"--{name}" for name in names if getattr(args, name) != parser.get_default(name)]:
        raise utils.UserError(f"{' and '.join(given)} cannot be used with {other}; leave one of them out")


def complete_evaluation_flags(parser, args):
    """Fills in the data's folder, and makes the output's. UserError for what has no effect or cannot be written to."""
    if args.dataset in utils.TORCHVISION:
        args.data_path = args.data_path or Path(__file__).resolve().parent / "cifar" / "datasets"
    if args.dataset == "folder":
        refuse_flags(parser, args, ["download"], "--dataset folder")
    if args.random_weights:
        refuse_flags(parser, args, ["checkpoint_key"], "--random_weights")
    if args.output_dir:
        utils.make_output_dir(args.output_dir)


def load_from_flags(args):
    """`load_backbone` as the shared flags say."""
    torch.manual_seed(args.seed)
    return load_backbone(args.pretrained_weights, args.checkpoint_key, args.arch, args.patch_size, args.image_size,
                         args.random_weights)


def describe_run(args, description):
    """The fields of a result's record that name the network and the data."""
    return {"weights": str(args.pretrained_weights or "random"), **description._asdict(), "dataset": args.dataset,
            "data_path": args.data_path and str(args.data_path)}


def write_record(record, path=None):
    """Prints a record and appends it to `path` as a line of JSON; on the first rank alone."""
    if utils.rank() == 0:
        print(utils.format_record(record), flush=True)
        if path:
            try:
                with open(path, "a") as file:
                    file.write(json.dumps(record) + "\n")
            except OSError as error:
                raise utils.UserError(f"cannot write {path}: {error.strerror}; choose another --output_dir") from error


def parse_args(argv=None):
    parser = utils.ArgumentParser(__doc__)
    add = parser.add_argument
    add("--nb_knn", type=utils.positive_int, nargs="+", default=[10, 20, 100, 200], help="neighbours that vote")
    add("--temperature", type=utils.positive_float, nargs="+", help="of the votes exp(cos / T) (default: 0.07)")
    add("--vote", choices=("exp", "linear"), default="exp", help="of a neighbour: exp(cos / T) or (cos + 1) / 2")
    add("--per_class", action="store_true", help="top-1 of each class as well")
    add("--shots", type=utils.positive_int, help="few-shot: k-NN and nearest centroid from so many training images per class")
    add("--episodes", type=utils.positive_int, help="choices of --shots images, over which the mean is taken (default: 100)")
    add("--use_cuda", type=utils.boolean, default=True, help="true: features stay on the GPU, and the search runs there; "
        "false: both are on the CPU, which may have more memory")
    add("--dump_features", type=Path, help="folder to write the features and labels to")
    add("--load_features", type=Path, help="folder to read them from, instead of computing them")
    add_evaluation_flags(parser)
    args = parser.parse_args(argv)
    if args.load_features:
        refuse_flags(parser, args, ["pretrained_weights", "checkpoint_key", "random_weights", "arch", "patch_size", "image_size",
                                    "dataset", "data_path", "download", "batch_size_per_gpu", "num_workers", "amp",
                                    "dump_features"], "--load_features")
    complete_evaluation_flags(parser, args)
    if args.dump_features:
        utils.make_output_dir(args.dump_features, "--dump_features")
    if args.vote == "linear":
        refuse_flags(parser, args, ["temperature"], "--vote linear")
    if args.shots:
        refuse_flags(parser, args, ["per_class"], "--shots")
    elif args.episodes:
        raise utils.UserError("--episodes needs --shots, the images per class of an episode")
    args.temperature = args.temperature or [0.07]
    args.episodes = args.episodes or 100
    args.nb_knn, args.temperature = sorted(set(args.nb_knn)), sorted(set(args.temperature))
    return args


def compute_features(args, device, keep_on):
    """This rank's part of the bank, the labels of all of it, all queries and their labels, on `keep_on`; then what describes them
    in a result, and the classes' names."""
    backbone, description = load_from_flags(args)
    backbone.to(device)
    amp_dtype = utils.select_amp(args.amp, device)
    transform = utils.eval_transform(description.image_size, description.mean, description.std)
    splits = utils.build_splits(args.dataset, args.data_path, transform, args.download)
    (bank, bank_labels), (queries, query_labels) = (
        extract_features(backbone, split, device, args.batch_size_per_gpu, args.num_workers, amp_dtype, title, gather, keep_on)
        for split, title, gather in zip(splits, ("train features", "test features"), (False, True)))
    if args.dump_features:
        whole_bank = utils.gather_rows(bank.cpu(), len(bank_labels))        # it may be too large for one GPU
        if utils.rank() == 0:
            for name, tensor in zip(DUMPS, (whole_bank, bank_labels, queries, query_labels)):
                utils.save_checkpoint(tensor.cpu(), args.dump_features / name)
    return bank, bank_labels, queries, query_labels, describe_run(args, description), splits[0].classes


def read_features(args, keep_on):
    """What `compute_features` returns, from the files that it, or DINO, dumped. UserError if they are missing or do not fit."""
    tensors = []
    for name in DUMPS:
        path = args.load_features / name
        try:
            tensor = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # torch.load raises half a dozen types for damaged files
            reason = " ".join(str(error).split())[:200]
            raise utils.UserError(f"cannot read {path}: {reason}; write it with --dump_features") from error
        if not isinstance(tensor, torch.Tensor):
            raise utils.UserError(f"{path} holds a {type(tensor).__name__}, not a tensor; write it with --dump_features")
        tensors.append(tensor)
    bank, bank_labels, queries, query_labels = tensors
    try:
        _check_features(bank, queries)
        _check_labels(len(bank), bank_labels, None, "train")
        _check_labels(len(queries), query_labels, None, "test")
    except ValueError as error:
        raise utils.UserError(f"the features in {args.load_features} do not fit each other: {error}") from error
    tensors = utils.share(bank).contiguous(), bank_labels.long(), queries, query_labels.long()
    return *(tensor.to(keep_on) for tensor in tensors), {"features": str(args.load_features)}, None


@torch.no_grad()
def few_shot_accuracy(bank, bank_labels, queries, query_labels, shots, episodes, seed, ks, temperatures, vote="exp"):
    """Top-1 and top-5 accuracy, in percent, of classifiers that know `shots` images per class: k-NN, and the class whose centroid,
    the mean of its features of length one, has the largest cosine.

    bank is shared out over the ranks as for `knn_sweep`; queries and all labels are whole on every rank. An episode draws its
    images by (seed, episode), the same for every classifier and number of ranks.

    Returns a dict (k, temperature) or "centroid" -> [episodes, 2], float64. UserError for a class with too few images.
    """
    num_classes = int(bank_labels.max()) + 1
    labels = torch.arange(num_classes, device=bank.device).repeat_interleave(shots)
    world, rank = utils.world_size(), utils.rank()
    queries, truth = utils.share(queries), utils.share(query_labels)
    accuracy = {}
    for episode, _ in utils.progress(range(episodes), 0, episodes, "episodes"):
        generator = torch.Generator().manual_seed(utils.stream_seed(seed, episode))
        drawn = draw_shots(bank_labels.cpu(), shots, generator).to(bank.device)
        rows = bank.new_zeros(len(drawn), bank.shape[1])                                                    # [C * shots, D]
        here = drawn % world == rank
        rows[here] = bank[drawn[here] // world]
        utils.sum_over_ranks(rows)
        predictions = knn_sweep(rows, labels, queries, ks, temperatures, num_classes, vote)
        centroids = _unit_rows(rows).unflatten(0, (num_classes, shots)).mean(1)
        predictions["centroid"] = knn_search(centroids, queries, min(5, num_classes))[1]
        for setting, classes in predictions.items():
            hits = utils.sum_over_ranks(_hits(classes, truth).sum(0).cpu())
            accuracy.setdefault(setting, []).append(100 * hits.double() / len(query_labels))
    return {setting: torch.stack(values) for setting, values in accuracy.items()}


def interval(values):
    """Mean of values [episodes], and half the width of its 95% interval by Student's t; None from one episode."""
    half = None if len(values) < 2 else stdtrit(len(values) - 1, 0.975) * values.std().item() / math.sqrt(len(values))
    return values.mean().item(), half


def results(args, bank, bank_labels, queries, query_labels, classes):
    """The fields of one record for every setting: how it classified, and how well."""
    def fields(setting):
        if setting == "centroid":
            return {"classifier": "centroid"}
        k, temperature = setting
        return {"classifier": "knn", "k": k, "vote": args.vote} | ({"temperature": temperature} if args.vote == "exp" else {})

    if args.shots:
        accuracy = few_shot_accuracy(bank, bank_labels, queries, query_labels, args.shots, args.episodes, args.seed, args.nb_knn,
                                     args.temperature, args.vote)
        for setting, values in accuracy.items():
            (top1, half1), (top5, half5) = map(interval, values.T)
            yield {**fields(setting), "shots": args.shots, "episodes": args.episodes, "seed": args.seed,
                   "top1": top1, "top1_ci95": half1, "top5": top5, "top5_ci95": half5}
        return
    predictions = knn_sweep(bank, bank_labels, queries, args.nb_knn, args.temperature, vote=args.vote, shared=True)
    for setting, predicted in predictions.items():
        hits = _hits(predicted, query_labels)
        top1, top5 = _percent(hits)
        record = {**fields(setting), "top1": top1, "top5": top5}
        if args.per_class:
            labels = query_labels.unique().tolist()
            record["top1_per_class"] = {classes[label] if classes else str(label): _percent(hits[query_labels == label])[0]
                                        for label in labels}
        yield record


def main(argv=None):
    args = parse_args(argv)
    device = utils.init_distributed(args.device, args.dist_url)
    # The vote is in float64, which MPS lacks.
    keep_on = device if args.use_cuda and device.type == "cuda" else torch.device("cpu")
    if args.load_features:
        bank, bank_labels, queries, query_labels, run, classes = read_features(args, keep_on)
    else:
        bank, bank_labels, queries, query_labels, run, classes = compute_features(args, device, keep_on)
    run |= {"train_images": len(bank_labels), "test_images": len(query_labels)}
    try:
        for result in results(args, bank, bank_labels, queries, query_labels, classes):
            write_record({**run, **result}, args.output_dir and args.output_dir / "knn.txt")
    except ValueError as error:  # features that are not finite, say
        raise utils.UserError(str(error)) from error


if __name__ == "__main__":
    utils.run_script(main)
