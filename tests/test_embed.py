"""embed.py: the files that it writes, near-copies that it finds, ranks, interruptions and mistakes."""
import csv
import json

import data
import distributed
import embed
import neighbours
import numpy as np
import pytest
import torch
from conftest import refusal, run_ranks
from PIL import Image
from pretrained import load_backbone

NETWORK = ["--random_weights", "--arch", "cifar/tiny", "--device", "cpu", "--num_workers", "0",
           "--batch_size_per_gpu", "4"]


def run(folder, output, *more):
    embed.main(["--data_path", str(folder), "--output_dir", str(output), *NETWORK, *map(str, more)])
    return np.load(output / "features.npy", mmap_mode="r"), (output / "files.txt").read_text().splitlines()


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def photo(seed, size=(96, 80)):
    """A few soft blobs of colour."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def save_photos(folder, count):
    folder.mkdir()
    for index in range(count):
        photo(index).save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """13 images in a folder and its subfolders. Not to be changed."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "deep" / "er").mkdir(parents=True)
    for index in range(13):
        place = (folder, folder / "deep", folder / "deep" / "er")[index % 3]
        photo(index).save(place / f"{index}.png")
    return folder


@pytest.mark.parametrize("side", (3, 7, 2048))
def test_pairs_equal_brute_force(side, monkeypatch):
    monkeypatch.setattr(neighbours, "PAIR_BLOCK", side)
    features = torch.randn(5, 6, generator=torch.Generator().manual_seed(0)).repeat(8, 1)
    features = 100 * (features + 0.4 * torch.randn(40, 6, generator=torch.Generator().manual_seed(1)))
    features[11] = 0
    rows = [row / max(np.linalg.norm(row), 1e-300) for row in features.double().numpy()]
    cosines = {(i, j): float(rows[i] @ rows[j]) for j in range(40) for i in range(j)}
    expected = sorted((pair for pair, cos in cosines.items() if cos > 0.8), key=cosines.get, reverse=True)
    assert len(expected) > 40

    cos, pairs = neighbours.similar_pairs(features, 0.8)
    assert list(map(tuple, pairs.tolist())) == expected
    assert cos.tolist() == pytest.approx([cosines[pair] for pair in expected], abs=1e-6)
    found = run_ranks(lambda: [x.tolist() for x in neighbours.similar_pairs(features, 0.8)], 3)
    assert found[0] == found[1] == found[2] and found[0][1] == pairs.tolist()
    assert len(neighbours.similar_pairs(features, 1.0)[0]) == 0
    monkeypatch.setattr(neighbours, "MAX_PAIRS", 20)
    assert "more than 20 pairs have a cosine above 0.8" in refusal(neighbours.similar_pairs, features, 0.8)


def test_features_and_names_in_one_order(photos, tmp_path, monkeypatch):
    features, files = run(photos, tmp_path / "one")
    assert files == sorted(str(path.relative_to(photos)) for path in photos.rglob("*.png"))
    torch.manual_seed(0)
    backbone, description = load_backbone(None, arch="cifar/tiny", random_weights=True)
    transform = data.eval_transform(*description[2:5])
    with torch.no_grad():
        expected = torch.cat([backbone(transform(Image.open(photos / file))[None]) for file in files])
    assert features.dtype == np.float32 and features.shape == (13, 64)
    torch.testing.assert_close(torch.tensor(features), expected, rtol=1e-5, atol=1e-6)
    record = json.loads((tmp_path / "one" / "features.json").read_text())
    assert (record["arch"], record["images"], record["data_path"]) == ("cifar/tiny", 13, str(photos))
    names = {"features.npy", "files.txt", "features.json"}
    assert {path.name for path in (tmp_path / "one").iterdir()} == names

    monkeypatch.setattr(distributed, "leave", lambda: None)            # run_ranks leaves its group itself
    run_ranks(lambda: run(photos, tmp_path / "three", "--duplicates", 0.5) and None, 3)
    np.testing.assert_allclose(np.load(tmp_path / "three" / "features.npy"), features, rtol=1e-5, atol=1e-6)
    assert {path.name for path in (tmp_path / "three").iterdir()} == names | {"duplicates.csv"}


def test_planted_copies_come_first(tmp_path):
    folder, output = save_photos(tmp_path / "photos", 10), tmp_path / "out"
    photo(3).resize((60, 50)).save(folder / "resized of 3.png")
    photo(5).save(folder / "encoded of 5.jpg", quality=60)
    photo(7).crop((3, 2, 94, 77)).save(folder / "cropped of 7.png")
    query = tmp_path / "query of $9$ and $9{.jpg"
    photo(9, (128, 100)).save(query)

    run(folder, output, "--duplicates", 0.1, "--query", query, folder / "3.png", "--neighbours", 4)
    pairs = table(output / "duplicates.csv")
    assert {frozenset((row["file"], row["other"])) for row in pairs[:3]} == {
        frozenset(pair) for pair in (("3.png", "resized of 3.png"), ("5.png", "encoded of 5.jpg"),
                                     ("7.png", "cropped of 7.png"))}
    rows = table(output / "neighbours.csv")
    assert [(row["query"], row["rank"]) for row in rows] == [
        (str(path), str(rank)) for path in (query, folder / "3.png") for rank in (1, 2, 3, 4)]
    assert rows[0]["file"] == "9.png" and rows[4]["file"] == "resized of 3.png"
    assert "3.png" not in [row["file"] for row in rows[4:]]            # itself
    with Image.open(output / "neighbours.png") as picture:
        assert picture.width > picture.height > 300                    # two rows of five


def test_computed_once_for_the_same_network_and_files(tmp_path, monkeypatch, capsys):
    folder, output = save_photos(tmp_path / "photos", 3), tmp_path / "out"
    before = np.array(run(folder, output)[0])
    write, computed = embed.write_features, []
    monkeypatch.setattr(embed, "write_features", lambda *args: (computed.append(args[1]), write(*args)))
    run(folder, output, "--batch_size_per_gpu", 2, "--query", folder / "0.png")
    assert not computed and "remove it to compute it again" in capsys.readouterr().out
    assert len(table(output / "neighbours.csv")) == 2                  # the folder has no more
    assert not np.allclose(run(folder, output, "--seed", 1)[0], before)
    photo(3).save(folder / "3.png")
    run(folder, output, "--seed", 1)
    assert computed == [3, 4]


def test_an_interrupted_run_leaves_the_old_file_or_none(photos, tmp_path, monkeypatch):
    load, loaded = data.load_image, []

    def interrupt(file, name=None):
        loaded.append(file)
        if len(loaded) == 9:
            raise KeyboardInterrupt
        return load(file)
    monkeypatch.setattr(data, "load_image", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(photos, tmp_path)
    assert not (tmp_path / "features.npy").exists() and not (tmp_path / "files.txt").exists()
    features = np.array(run(photos, tmp_path)[0])
    loaded.clear()
    with pytest.raises(KeyboardInterrupt):
        run(photos, tmp_path, "--seed", 1)
    assert np.array_equal(np.load(tmp_path / "features.npy"), features)
    assert not (tmp_path / "features.json").exists()                   # so that they are computed again
    loaded[:] = range(20)
    assert not np.allclose(run(photos, tmp_path, "--seed", 1)[0], features)


@pytest.mark.parametrize("workers", (0, 1))
def test_an_undecodable_image_is_named_or_skipped(tmp_path, capfd, workers):
    folder, output, more = save_photos(tmp_path / "photos", 4), tmp_path / "out", ("--num_workers", workers)
    (folder / "1.png").write_bytes(b"no image")
    message = refusal(run, folder, output, *more)
    assert message.startswith(f"cannot decode image {folder / '1.png'}") and message.endswith(
        "or add --skip_bad_images") and not (output / "features.npy").exists()
    features, files = run(folder, output, *more, "--skip_bad_images", "--query", folder / "0.png",
                          "--duplicates", 0)
    assert files == ["0.png", "1.png", "2.png", "3.png"]
    assert features.any(1).tolist() == [True, False, True, True]
    assert f"cannot decode image {folder / '1.png'}" in capfd.readouterr().err
    assert {row["file"] for row in table(output / "neighbours.csv")} == {"2.png", "3.png"}
    assert "1.png" not in (output / "duplicates.csv").read_text()


def test_mistakes_are_one_line(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(embed, "write_features", None)                 # a query is looked at before
    (bad := tmp_path / "bad.png").write_bytes(b"no image")
    for flag, value, message in (("--checkpoint_key", "x", "cannot be used with --random_weights"),
                                 ("--query", "nowhere.jpg", "nowhere.jpg is missing"),
                                 ("--query", bad, f"cannot decode image {bad}")):
        assert message in refusal(run, photos, tmp_path, flag, value)
