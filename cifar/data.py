"""Small-image data sets, decoded once and held in memory as uint8."""
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision import transforms
from torchvision.transforms.functional import InterpolationMode, center_crop, pil_to_tensor

from cifar.shapes import draw_shapes
from data import PRETRAINING, build_dataset, build_splits
from utils import UserError

NATIVE_SIZE = {"stl10": 96}  # pixels; 32 elsewhere


class ImageData(NamedTuple):
    """Images uint8 [N, 3, S, S] and labels int64 [N]: `train` without labels, the k-NN's `bank`, `test`."""

    train: Tensor
    bank: Tensor
    bank_labels: Tensor
    test: Tensor
    test_labels: Tensor


def load_data(name: str, path: Path | None, size: int | None = None) -> ImageData:
    """The data set `name`, "shapes" or one of data.py, at `size` x `size` pixels, its native size if None.

    The bank is the training set; stl10 trains on its unlabelled images too. UserError as `data.build_splits`,
    and for fewer than two test images.
    """
    size = size or NATIVE_SIZE.get(name, 32)
    if name == "shapes":
        bank, bank_labels = draw_shapes("train")
        return ImageData(bank, bank, bank_labels, *draw_shapes("test"))
    train, test = build_splits(name, path, download=name != "folder")
    if len(test) < 2:
        raise UserError(f"the test set has {len(test)} image; the AUC of its pairs needs at least two")
    bank = images, _ = decode(train, size)
    if name in PRETRAINING:
        images, _ = decode(build_dataset(name, path, PRETRAINING[name]), size)
    return ImageData(images, *bank, *decode(test, size))


def decode(dataset, size: int) -> tuple[Tensor, Tensor]:
    """All images, uint8 [N, 3, size, size], and labels, int64 [N]. Images of other sizes are scaled by their
    shorter side (bicubic) and cropped in the centre."""
    images = torch.empty(len(dataset), 3, size, size, dtype=torch.uint8)
    resize = transforms.Resize(size, InterpolationMode.BICUBIC)

    def store(index):
        images[index] = pil_to_tensor(center_crop(resize(dataset[index][0]), size))

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes outside the interpreter's lock
        for _ in pool.map(store, range(len(dataset))):
            pass
    return images, torch.tensor(dataset.targets)
