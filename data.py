"""Labelled data sets by name, class folders, and the one reader of image files.

    train, test = build_splits("cifar10", root, transform)             # LabelledImages: (image, label)

A data set of your own: one line in DATASETS. Its value is called as make(root, split, download=bool), and
returns what is read by index as (PIL image, label), with `targets`, all labels, and perhaps `classes`, names.
"""
import io
import os
import struct
import zlib
from contextlib import suppress
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torchvision import datasets as tv
from torchvision import transforms
from torchvision.datasets.folder import IMG_EXTENSIONS

import distributed
import utils
from utils import UserError

# split is "train" or "test", or a value of PRETRAINING; train includes an official validation set.
DATASETS = {
    "folder": lambda root, split, **_: ClassFolders(split_folder(root, split)),
    "cifar10": lambda root, split, **more: tv.CIFAR10(root, split == "train", **more),
    "cifar100": lambda root, split, **more: tv.CIFAR100(root, split == "train", **more),
    "stl10": lambda root, split, **more: tv.STL10(root, split, **more),
    "svhn": lambda root, split, **more: tv.SVHN(root, split, **more),
    "food101": lambda root, split, **more: tv.Food101(root, split, **more),
    "flowers102": lambda root, split, **more: _joined(tv.Flowers102, root, split, **more),
    "dtd": lambda root, split, **more: _joined(tv.DTD, root, split, **more),
    "pets": lambda root, split, **more: tv.OxfordIIITPet(root, TRAINVAL[split], **more),
    "aircraft": lambda root, split, **more: tv.FGVCAircraft(root, TRAINVAL[split], **more),
    # without an official split: by a fixed seed, 30 images of each class or 80 % of each are for training
    "caltech101": lambda root, split, **more: _chosen(tv.Caltech101(root, **more), split, lambda n: 30),
    "eurosat": lambda root, split, **more: _chosen(tv.EuroSAT(root, **more), split, lambda n: n * 4 // 5),
}
PRETRAINING = {"stl10": "train+unlabeled"}  # splits to train on without labels, where not "train"
TRAINVAL = {"train": "trainval", "test": "test"}
BACKGROUND = "white"  # shown through transparent pixels
UNDECODABLE = OSError, ValueError, SyntaxError, Image.DecompressionBombError


class LabelledImages(torch.utils.data.Dataset):
    """RGB images and labels: item i is (transform(PIL image), int).

    source: read by index as (PIL image, label). classes: names of the labels 0, 1, ..., or None.
    targets: labels of all of the source. indices: its images that are in the set; None for all.
    """

    def __init__(self, source, classes, targets, transform=None, indices=None):
        self.source, self.classes, self.source_targets, self.transform = source, classes, targets, transform
        self.indices = range(len(targets)) if indices is None else indices
        self.targets = [int(targets[index]) for index in self.indices]

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, index: int):
        try:
            image = to_rgb(self.source[self.indices[index]][0])
        except UNDECODABLE as error:
            raise UserError(f"cannot decode image {index} of the data set: {utils.reason(error)}") from error
        return image if self.transform is None else self.transform(image), self.targets[index]

    def subset(self, indices, transform=None) -> "LabelledImages":
        """The images at `indices`, with another transform."""
        return LabelledImages(self.source, self.classes, self.source_targets, transform,
                              [self.indices[index] for index in indices])

    def checksum(self) -> int:
        """Tells sets apart by their labels and, of class folders, the names of the files."""
        files = self.source.files if isinstance(self.source, ClassFolders) else self.source_targets
        return zlib.crc32(repr([(files[i], label) for i, label in zip(self.indices, self.targets)]).encode())


class SeededViews(torch.utils.data.Dataset):
    """Random views of labelled images by (index, seed): item (transform(image), label), the same on any rank
    and worker. The transform may draw from the global generators of Python, NumPy and torch."""

    def __init__(self, images: LabelledImages, transform):
        self.images, self.transform = images, transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]):
        index, seed = key
        image, label = self.images[index]
        utils.seed_all(seed)
        return self.transform(image), label


def make_loader(dataset, device: torch.device, num_workers: int, **batching) -> torch.utils.data.DataLoader:
    """A DataLoader for `device`. batching: its arguments that say what a batch is."""
    return torch.utils.data.DataLoader(dataset, num_workers=num_workers, pin_memory=device.type == "cuda",
                                       worker_init_fn=utils.ignore_group_signals, **batching)


def seeded_loader(dataset, batches, stream: tuple[int, ...], device: torch.device, num_workers: int):
    """Loads the items (index, seed) of each of `batches` of indices [b]; stream: of the seeds, see
    `utils.stream_seed`."""
    keys = ([(index, utils.stream_seed(*stream, index)) for index in batch.tolist()] for batch in batches)
    return make_loader(dataset, device, num_workers, batch_sampler=keys)


class ClassFolders:
    """The images of a folder that has a folder for each class."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.classes = sorted(entry.name for entry in os.scandir(folder)
                              if entry.is_dir() and not entry.name.startswith("."))
        if not self.classes:
            raise UserError(f"{folder} holds no class folders; it needs a folder of images for each class")
        others = {os.path.realpath(place) for place in (folder, *(folder / name for name in self.classes))}
        self.files, self.targets = [], []
        for label, name in enumerate(self.classes):
            files = image_files(folder / name, others)
            self.files += [os.path.join(name, file) for file in files]
            self.targets += [label] * len(files)

    def __getitem__(self, index):
        return load_image(self.folder / self.files[index]), self.targets[index]


def build_dataset(name: str, root: Path | None, split: str, transform=None, download=False) -> LabelledImages:
    """The split "train", "test" or PRETRAINING[name] of a data set: a key of DATASETS, or "hfds/NAME"
    of the Hugging Face hub. root: for "folder" what holds train/ and test/ (or val/), with class folders.
    download: fetch the set into `root` if it is missing; of several ranks, the first fetches it.

    UserError for an unknown name, a set or folder that is missing or empty, a failed download and, on access,
    an image that cannot be decoded.
    """
    make = DATASETS.get(name)
    if make is None and not name.startswith("hfds/"):
        raise UserError(f"unknown data set {name!r}; choose from {', '.join(DATASETS)}, or hfds/NAME")
    try:
        if download and distributed.rank() > 0:
            torch.distributed.barrier()
        source = make(root, split, download=download) if make else _hugging_face(name, root, split, download)
        if download and distributed.world_size() > 1 and distributed.rank() == 0:
            torch.distributed.barrier()
    except UserError:
        raise
    except Exception as error:  # urllib, ssl, tarfile, torchvision and timm each raise their own
        if name == "folder":
            raise
        files = getattr(getattr(tv, name.upper(), None), "url", "its files")
        advice = f"unpack {files} in {root} by hand" if download else "add --download to fetch it"
        if download and not make:
            advice = "it needs the package datasets, and columns named image and label"
        verb = "download" if download else "read"
        raise UserError(f"cannot {verb} {name} in {root}: {utils.reason(error)}; "
                        f"{advice}, or give class folders with --dataset folder --data_path DIR") from error
    classes = getattr(source, "classes", None) or getattr(source, "categories", None)
    return LabelledImages(source, list(classes) if classes else None, _targets(source), transform,
                          getattr(source, "indices", None))


def build_splits(name: str, root: Path | None, transform=None, download=False):
    """`build_dataset` of train and test. UserError also if their classes differ."""
    train, test = (build_dataset(name, root, split, transform, download) for split in ("train", "test"))
    if train.classes != test.classes:
        differing = ", ".join(sorted(set(train.classes or ()) ^ set(test.classes or ()))[:10])
        raise UserError(f"train and test in {root} have different classes: {differing} in one of them")
    return train, test


def split_folder(root: Path | None, split: str) -> Path:
    """The folder of a split's class folders below `root`: train, or test or val. UserError if none."""
    if root is None:
        raise UserError("--data_path is missing; name a folder with train/ and test/ (or val/), or --dataset")
    names = ("test", "val") if split == "test" else (split,)
    folders = [root / name for name in names if (root / name).is_dir()]
    if not folders:
        missing = " or ".join(str(root / name) for name in names)
        raise UserError(f"no folder {missing}; --data_path needs train/ and test/ (or val/), each with a "
                        "folder of images for each class")
    # ImageNet's test/ has no labels, its val/ is what everyone tests on
    return next((place for place in folders if any(e.is_dir() for e in os.scandir(place))), folders[0])


def image_files(folder: Path, others: set[str] = frozenset()) -> list[str]:
    """All image files below `folder`, relative to it, sorted. Links are followed, every real folder is read
    once; parents of `folder`, `others` (real paths) and names that begin with a dot are left out. UserError
    if there are none; OSError for a folder that cannot be listed."""
    def refuse(error):
        raise error

    home = os.path.realpath(folder)
    seen, files = set(others) - {home}, []
    for place, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        real = os.path.realpath(place)
        if real in seen or home.startswith(os.path.join(real, "")):
            folders.clear()
            continue
        seen.add(real)
        files += [os.path.relpath(os.path.join(place, name), folder) for name in names
                  if name.lower().endswith(IMG_EXTENSIONS) and not name.startswith(".")]
    if not files:
        raise UserError(f"no images in {folder} ({', '.join(IMG_EXTENSIONS)}); name a folder of images")
    return sorted(files)


def load_image(path) -> Image.Image:
    """The upright RGB image of a file, see `to_rgb`. UserError if it cannot be decoded."""
    if not os.path.isfile(path):  # to open a FIFO would wait for ever
        raise UserError(f"{path} is missing or no regular file; restore or remove it")
    try:
        with Image.open(path) as image:
            return to_rgb(image)
    except UNDECODABLE as error:
        raise UserError(f"cannot decode image {path}: {utils.reason(error)}; replace or remove it") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """An RGB image of 8 bits: upright by its EXIF tag, 16-bit grey scaled, transparency on BACKGROUND.
    ValueError for 32-bit integers and floats, whose range is unknown."""
    image.load()
    with suppress(SyntaxError, ValueError, struct.error):  # garbage in the place of EXIF
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I;16") or image.mode == "I" and image.format == "PNG":
        image = image.convert("I").point(lambda value: value / 257 + 0.5).convert("L")  # 65535 = 257 * 255
    elif image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode} has no known range; convert it to 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def eval_transform(image_size: int, mean, std):
    """PIL image -> normalised [3, S, S], S = image_size: bicubic resize of the shorter side to 8/7 S (256 for
    224; S itself up to 96) and centre crop."""
    resized = round(image_size * 8 / 7) if image_size > 96 else image_size
    return transforms.Compose([
        transforms.Resize(resized, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(image_size),
        transforms.ToTensor(), transforms.Normalize(mean, std)])


def split_by_class(labels: torch.Tensor, take, generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of a random choice out of every class, and of all others, both class by class.

    labels: [N] in [0, C), on the CPU. take: images per class [C] (float64) -> how many to choose [C] or ().
    """
    counts = labels.bincount()
    order = torch.randperm(len(labels), generator=generator)
    order = order[labels[order].argsort(stable=True)]
    place = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[order]]     # within its class
    chosen = place < torch.as_tensor(take(counts.double())).expand(len(counts))[labels[order]]
    return order[chosen], order[~chosen]


def count_labels(num_labels: int | None, *splits) -> int:
    """The number of classes: of names, else --num_labels, else what the labels need."""
    labels = {label for split in splits for label in split.targets}
    low, high = min(labels), max(labels)
    found = len(splits[0].classes or ()) or num_labels or high + 1
    if num_labels not in (None, found) or low < 0 or high >= found:
        raise UserError(f"--num_labels {num_labels or found} and labels from {low} to {high} contradict the "
                        f"{found} classes; leave --num_labels out, or check the data set")
    return found


def choose_subset(labels: torch.Tensor, shots: int | None, fraction: float | None, seed: int) -> torch.Tensor:
    """Indices of the training images to use: `shots` or `fraction` of every class (at least one), or all."""
    counts = labels.bincount()
    if shots and shots > counts.min():
        raise UserError(f"--shots {shots} is more than the {counts.min()} training images of class "
                        f"{counts.argmin()}; lower it")
    if not shots and not fraction:
        return torch.arange(len(labels))
    generator = torch.Generator().manual_seed(utils.stream_seed(seed, 0))
    return split_by_class(labels, lambda n: shots or (fraction * n).round().clamp_min(1), generator)[0]


def _joined(constructor, root, split, **more):
    """The official training and validation sets together, or the test set."""
    parts = [constructor(root, part, **more) for part in (("train", "val") if split == "train" else (split,))]
    joined = torch.utils.data.ConcatDataset(parts)
    joined.targets, joined.classes = sum(map(_targets, parts), []), getattr(parts[0], "classes", None)
    return joined


def _chosen(source, split, take):
    train, test = split_by_class(torch.tensor(_targets(source)), take, torch.Generator().manual_seed(0))
    source.indices = (train if split == "train" else test).sort().values.tolist()
    return source


def _targets(source) -> list[int]:
    name = next((name for name in ("targets", "labels", "_labels", "y") if hasattr(source, name)), None)
    if name is None:
        raise UserError(f"{type(source).__name__} has no list of its labels; use class folders")
    return [int(label) for label in getattr(source, name)]


def _hugging_face(name: str, root, split: str, download: bool):
    """A data set of the Hugging Face hub, through timm's reader."""
    if not download:
        raise ConnectionError("it comes over the network or from its library's cache")
    from timm.data import create_dataset
    try:
        rows = create_dataset(name, root and str(root), split, download=True).reader.dataset
    except ValueError:  # sets without a test split have this one
        rows = create_dataset(name, root and str(root), "validation", download=True).reader.dataset
    return _HubRows(rows)


class _HubRows:
    def __init__(self, rows):
        self.rows, self.classes, self.targets = rows, rows.features["label"].names, rows["label"]

    def __getitem__(self, index):
        image = self.rows[index]["image"]  # timm leaves images encoded
        file = io.BytesIO(image["bytes"]) if image["bytes"] else image["path"]
        return Image.open(file), self.targets[index]
