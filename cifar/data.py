"""Small-image data sets, decoded once and held in memory as uint8."""
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision import transforms
from torchvision.transforms.functional import InterpolationMode, pil_to_tensor

import utils
from cifar.shapes import draw_shapes

DATASETS = (*utils.DATASETS, "shapes")
NATIVE_SIZE = {"stl10": 96}  # pixels; 32 elsewhere


class ImageData(NamedTuple):
    """Images uint8 [N, 3, S, S] and labels int64 [N]: `train` without labels, the k-NN's labelled `bank`, the `test` set."""

    train: Tensor
    bank: Tensor
    bank_labels: Tensor
    test: Tensor
    test_labels: Tensor


def load_data(name: str, path: Path, size: int | None = None) -> ImageData:
    """The data set `name` (one of DATASETS) at `size` x `size` pixels, its native size if None; see `utils.build_dataset`.

    The bank is the training set; stl10 trains on its unlabelled and labelled images, and its bank is the labelled ones.
    UserError as `build_dataset`, and if the splits have different classes.
    """
    size = size or NATIVE_SIZE.get(name, 32)
    if name == "shapes":
        bank, bank_labels = draw_shapes("train")
        return ImageData(bank, bank, bank_labels, *draw_shapes("test"))
    train, test = utils.build_splits(name, path, download=True)
    bank, bank_labels = decode(train, size)
    images = bank if name != "stl10" else torch.cat([decode(utils.build_dataset(name, path, "unlabeled"), size)[0], bank])
    return ImageData(images, bank, bank_labels, *decode(test, size))


def decode(dataset, size: int) -> tuple[Tensor, Tensor]:
    """All of a data set of PIL images, in parallel: uint8 [N, 3, size, size] and labels int64 [N]. Other sizes are scaled by
    their shorter side (bicubic) and cropped in the centre."""
    images = torch.empty(len(dataset), 3, size, size, dtype=torch.uint8)
    labels = torch.empty(len(dataset), dtype=torch.int64)
    fit = transforms.Compose([transforms.Resize(size, InterpolationMode.BICUBIC), transforms.CenterCrop(size)])

    def store(index):
        image, label = dataset[index]
        images[index] = pil_to_tensor(fit(image))
        labels[index] = label
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes outside the interpreter's lock
        for _ in pool.map(store, range(len(dataset))):
            pass
    return images, labels
