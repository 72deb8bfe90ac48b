"""Class folders, labelled sets by name, and the reader of image files, on what people's data look like."""
import io
import os
import re
import shutil
from types import SimpleNamespace

import data
import numpy as np
import pytest
import timm.data
import torch
from conftest import refusal, write_noise
from PIL import Image

NOISE = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)


def saved(image, path, **options):
    image.save(path, **options)
    return np.asarray(data.load_image(path))


# ------------------------------------------------------------------------------------------------ image files

@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_keeps_its_levels(tmp_path, suffix):
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    levels = saved(Image.fromarray(values), tmp_path / f"x.{suffix}")
    np.testing.assert_array_equal(levels, np.rint(values / 257)[..., None].repeat(3, 2))  # nearest of 8 bits
    wide = Image.fromarray(values.astype(np.int32))
    wide.format = "PNG"  # mode I, as some versions of Pillow read it
    np.testing.assert_array_equal(np.asarray(data.to_rgb(wide)), levels)


def test_images_are_turned_upright(tmp_path):
    corners = NOISE, NOISE[:, ::-1], NOISE[::-1, ::-1], NOISE[::-1]  # EXIF: where the file's first pixel is
    for tag, turned in enumerate((*corners, *(image.swapaxes(0, 1) for image in corners)), 1):
        exif = Image.Exif()
        exif[0x0112] = tag
        np.testing.assert_array_equal(saved(Image.fromarray(turned), tmp_path / "x.png", exif=exif), NOISE)
    for garbage in (b"garbage", b"MM\0*"):
        image = saved(Image.fromarray(NOISE), tmp_path / "x.png", exif=b"Exif\0\0" + garbage)
        np.testing.assert_array_equal(image, NOISE)


def test_hidden_colours_do_not_show(tmp_path):
    alpha = np.where(np.arange(40) < 20, 0, 255).astype(np.uint8) * np.ones((30, 40), np.uint8)
    for mode in ("RGB", "L"):
        image = Image.fromarray(NOISE).convert(mode)
        opaque = np.asarray(image.convert("RGB"))
        image.putalpha(Image.fromarray(alpha))
        levels = saved(image, tmp_path / "x.png")
        assert (levels[:, :20] == 255).all() and (levels[:, 20:] == opaque[:, 20:]).all()
    half = Image.new("RGBA", (1, 1), (0, 0, 0, 51))
    assert (saved(half, tmp_path / "x.png") == 204).all()  # 20 % of black on white
    palette = Image.fromarray(alpha // 255)
    palette.putpalette([9, 9, 9, 70, 80, 90])
    for tRNS in (0, b"\0\xff"):
        levels = saved(palette, tmp_path / "x.png", transparency=tRNS)
        assert (levels[:, :20] == 255).all() and (levels[:, 20:] == [70, 80, 90]).all()


def test_files_that_cannot_be_decoded(tmp_path, monkeypatch):
    for kind, mode in ((np.int32, "I"), (np.float32, "F")):
        Image.fromarray(np.ones((4, 4), dtype=kind)).save(tmp_path / "x.tif")
        message = rf"{tmp_path}/x.tif: mode {mode} .*convert it to 8 or 16 bits"
        assert re.search(message, refusal(data.load_image, tmp_path / "x.tif"))
    jpeg, bomb = tmp_path / "x.jpg", tmp_path / "bomb.png"
    Image.fromarray(NOISE).save(jpeg, quality=95)
    whole = jpeg.read_bytes()
    for content in (whole[:len(whole) // 2], b"no image", b""):
        jpeg.write_bytes(content)
        assert re.match(f"cannot decode image {jpeg}: .*replace", refusal(data.load_image, jpeg))
    os.mkfifo(tmp_path / "fifo.jpg")
    for name in ("fifo.jpg", "gone.jpg"):
        assert f"{name} is missing or no regular file" in refusal(data.load_image, tmp_path / name)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    Image.fromarray(NOISE).save(bomb)
    assert re.search("bomb.png: .*decompression bomb", refusal(data.load_image, bomb))


def test_eval_transform():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8))
    for size, side in ((224, 256), (96, 96)):
        ours = data.eval_transform(size, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))(image)
        width = side * 400 // 300
        left, top = round((width - size) / 2), round((side - size) / 2)
        plain = image.resize((width, side), Image.BICUBIC).crop((left, top, left + size, top + size))
        reference = (np.asarray(plain, dtype=np.float64) / 255 - 0.5) / 0.25
        np.testing.assert_allclose(ours.numpy(), reference.transpose(2, 0, 1), atol=1e-6)


# ---------------------------------------------------------------------------------------------- class folders

def test_links_and_hidden_names(tmp_path, images):
    root = tmp_path / "linked"  # as people make ImageNet-100
    for split, name in (("train", "cat"), ("train", "dog"), ("test", "cat"), ("test", "dog")):
        (root / split).mkdir(parents=True, exist_ok=True)
        (root / split / name).symlink_to(images / {"test": "val"}.get(split, split) / name)
    (root / "train" / ".ipynb_checkpoints").mkdir()
    train, test = data.build_splits("folder", root)
    assert (train.targets, test.classes) == ([0] * 6 + [1] * 7, ["cat", "dog"])

    root = write_noise(tmp_path / "loops", {"train": 2, "val": 1})
    folder = root / "train" / "dark"
    for place, target in (("up", ".."), ("root", root), ("itself", "."), ("other", "../light")):
        (folder / place).symlink_to(target)
    (folder / ".hidden").mkdir()
    for name in (".hidden/2.png", "._0.png"):
        (folder / name).write_bytes(b"")
    assert data.build_dataset("folder", root, "train").targets == [0, 0, 1, 1]
    for place in ("again", "twice"):
        (folder / place).symlink_to(root / "val" / "dark")
    files = ["0.png", "1.png", "again/0.png", "other/0.png", "other/1.png"]
    assert data.image_files(folder) == files


def test_a_file_name_that_is_no_text(tmp_path):
    (tmp_path / "cat").mkdir()
    Image.fromarray(NOISE).save(os.path.join(os.fsencode(tmp_path), b"cat", b"\xff.png"))
    folders = data.ClassFolders(tmp_path)
    np.testing.assert_array_equal(np.asarray(folders[0][0]), NOISE)


def test_folders_that_cannot_be_used(tmp_path, images, monkeypatch):
    def refused(root, split="train"):
        return refusal(data.build_dataset, "folder", root, split)
    assert "--data_path is missing" in refused(None)
    for root in (tmp_path / "nowhere", images / "train"):
        assert f"no folder {root}/train" in refused(root)
    cat, dog = tmp_path / "train" / "cat", tmp_path / "val" / "dog"
    cat.mkdir(parents=True), dog.mkdir(parents=True)
    assert f"no images in {cat}" in refused(tmp_path)
    assert f"{cat} holds no class folders" in refusal(data.ClassFolders, cat)
    for folder in (cat, dog):
        Image.fromarray(NOISE).save(folder / "x.png")
    assert "different classes: cat, dog in one" in refusal(data.build_splits, "folder", tmp_path)
    scan = os.scandir

    def scandir(place):
        if str(place) == str(dog):
            raise PermissionError(13, "Permission denied", str(place))
        return scan(place)
    monkeypatch.setattr(os, "scandir", scandir)
    assert refused(tmp_path, "test") == f"Permission denied: {dog}"


def test_imagenet_with_a_test_folder_without_classes(images, tmp_path):
    for split in ("train", "val"):
        (tmp_path / split).symlink_to(images / split)
    (tmp_path / "test").mkdir()
    test = data.build_dataset("folder", tmp_path, "test", lambda image: image.mode)
    assert len(test) == 11 and test[10] == ("RGB", 2)
    part = test.subset([0, 10], lambda image: image.size)
    assert part.targets == [0, 2] and part[1][0][0] == 40 and part.subset([1])[0][1] == 2


# ----------------------------------------------------------------------------------------------- sets by name

class Standin:
    """A data set of torchvision with 50 images of one class and 53 of another."""
    classes, y = ["cat", "dog"], [0] * 50 + [1] * 53

    def __init__(self, root, split="", download=False):
        self.split, self.download = split, download

    def __len__(self):
        return len(self.y)

    def __getitem__(self, index):
        return Image.new("L", (8, 8), index), self.y[index]


@pytest.mark.parametrize("name, constructor, train", [("caltech101", "Caltech101", [30, 30]),
                                                      ("eurosat", "EuroSAT", [40, 42])])
def test_sets_without_an_official_split_are_split_by_class(name, constructor, train, tmp_path, monkeypatch):
    monkeypatch.setattr(data.tv, constructor, Standin)
    splits = data.build_splits(name, tmp_path)
    values = [[(image.getpixel((0, 0))[0], label) for image, label in split] for split in splits]
    assert [splits[0].targets.count(label) for label in (0, 1)] == train
    assert sorted(value for value, _ in values[0] + values[1]) == list(range(103))  # all, none twice
    assert all(label == (value >= 50) for part in values for value, label in part)
    assert data.build_dataset(name, tmp_path, "train").indices == splits[0].indices


@pytest.mark.parametrize("name, constructor, asked", [
    ("flowers102", "Flowers102", ["train", "val", "test"]), ("dtd", "DTD", ["train", "val", "test"]),
    ("pets", "OxfordIIITPet", ["trainval", "test"]), ("aircraft", "FGVCAircraft", ["trainval", "test"]),
    ("food101", "Food101", ["train", "test"]), ("svhn", "SVHN", ["train", "test"]),
    ("stl10", "STL10", ["train", "test"]), ("cifar10", "CIFAR10", [True, False]),
    ("cifar100", "CIFAR100", [True, False])])
def test_training_includes_official_validation_sets(name, constructor, asked, tmp_path, monkeypatch):
    made = []

    def make(root, split, download):
        made.append(Standin(root, split, download))
        return made[-1]
    monkeypatch.setattr(data.tv, constructor, make)
    train, test = data.build_splits(name, tmp_path, download=True)
    assert [part.split for part in made] == asked and all(part.download for part in made)
    assert len(train) == 103 * (len(asked) - 1) == len(train.targets) and len(test) == 103
    assert train[len(train) - 1][1] == 1 and train[0][0].mode == "RGB" and train.classes == ["cat", "dog"]


def test_every_choice_out_of_the_classes_is_possible():
    labels = torch.tensor([2, 0, 0, 2, 2, 0, 2])  # class 1 has no images
    choices = [data.split_by_class(labels, lambda n: 1, torch.Generator().manual_seed(seed))[0].tolist()
               for seed in range(200)]
    assert len(set(map(tuple, choices))) == 3 * 4


def test_sets_that_cannot_be_read(tmp_path, monkeypatch):
    def refused(name, root=tmp_path, **more):
        return refusal(data.build_dataset, name, root, "train", **more)
    assert re.match("unknown data set 'cifar'; choose from folder, .*hfds", refused("cifar"))
    assert re.match(f"cannot read cifar10 in {tmp_path}: .*add --download", refused("cifar10"))
    monkeypatch.setattr("urllib.request.urlopen", lambda *args, **kwargs: 1 / 0)
    message = "cannot download cifar10 .*unpack https:.*cifar-10-python.tar.gz in .* by hand, or .*folder"
    assert re.match(message, refused("cifar10", download=True))
    assert re.match("cannot read hfds/x in None: it comes over .*add --download", refused("hfds/x", None))
    monkeypatch.setattr(data.tv, "CIFAR10", lambda *args, **more: [(Image.new("L", (8, 8)), 0)])
    assert "has no list of its labels" in refused("cifar10")


def test_checksums_tell_sets_apart(images, tmp_path):
    folder = shutil.copytree(images, tmp_path / "images")

    def checksum(root=folder):
        return data.build_dataset("folder", root, "train").checksum()
    expected = checksum()
    assert expected == checksum(images)                                # wherever they are
    moved = (folder / "train" / "cat" / "3.png").rename(folder / "train" / "dog" / "99.png")
    assert checksum() != expected
    moved.rename(folder / "train" / "cat" / "4x.png")                  # the same labels
    assert data.build_dataset("folder", folder, "train").targets == data.build_dataset(
        "folder", images, "train").targets and checksum() != expected


def test_sets_of_the_hugging_face_hub(monkeypatch, tmp_path):
    class Rows(list):
        features = {"label": SimpleNamespace(names=["cat", "dog"])}

        def __getitem__(self, key):
            return [row["label"] for row in self] if key == "label" else super().__getitem__(key)

    def create(name, root, split, download):
        if split == "test":
            raise ValueError("Unknown split")
        values = (3, 4, 5)[split == "validation":]
        rows = Rows()
        for value in values:
            Image.new("L", (8, 8), value).save(file := io.BytesIO(), "PNG")
            path = tmp_path / f"{value}.png"
            path.write_bytes(file.getvalue())
            content = None if value == 3 else file.getvalue()                      # as timm leaves them
            rows.append({"image": {"bytes": content, "path": str(path)}, "label": value % 2})
        return SimpleNamespace(reader=SimpleNamespace(dataset=rows))
    monkeypatch.setattr(timm.data, "create_dataset", create)
    train, test = data.build_splits("hfds/x", None, lambda image: image.getpixel((0, 0)), download=True)
    assert (train.classes, train.targets, test.targets) == (["cat", "dog"], [1, 0, 1], [0, 1])
    assert list(train) == [((3,) * 3, 1), ((4,) * 3, 0), ((5,) * 3, 1)]
    assert "<locals>" not in type(test.source).__qualname__     # workers that do not fork unpickle it
