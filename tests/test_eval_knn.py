"""The k-NN classifier against a slow reference, float64 and plain loops; eval_knn.py as its users run it."""
import json
import math

import data
import distributed
import eval_knn
import neighbours
import pytest
import torch
import torchvision
from conftest import refusal, run_ranks
from eval_knn import knn_accuracy
from neighbours import nearest_rows
from pretrained import load_backbone
from torch.nn.functional import normalize
from vision_transformer import build_backbone


def reference(bank, labels, queries, truth, k, temperature):
    """Top-1 and top-5 in percent."""
    def unit(row):
        norm = math.hypot(*row)
        return [x / norm for x in row] if norm else row

    bank, labels, hits = [unit(row) for row in bank.double().tolist()], labels.tolist(), [0, 0]
    for query, label in zip(map(unit, queries.double().tolist()), truth.tolist()):
        cos = [sum(x * y for x, y in zip(query, row)) for row in bank]
        scores = {}
        for i in sorted(range(len(bank)), key=lambda i: -cos[i])[:k]:
            scores[labels[i]] = scores.get(labels[i], 0) + math.exp((cos[i] - max(cos)) / temperature)
        ranking = sorted(scores, key=lambda c: -scores[c])
        hits[0] += label in ranking[:1]
        hits[1] += label in ranking[:5]
    return tuple(100 * hit / len(queries) for hit in hits)


def clusters(count, num_classes, seed, spread=2.0, dim=12):
    """Features around one centre per class, [count, dim], and labels."""
    centres = torch.randn(num_classes, dim, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (count,), generator=generator)
    return centres[labels] + spread * torch.randn(count, dim, generator=generator), labels


@pytest.mark.parametrize("queries, numbers", [(256, 2 ** 25), (3, 5000), (7, 150)])
@pytest.mark.parametrize("size, num_classes", [(30, 2), (99, 7), (200, 40), (300, 2000)])
def test_equals_brute_force_in_chunks_of_any_size(size, num_classes, queries, numbers, monkeypatch):
    monkeypatch.setattr(neighbours, "QUERY_CHUNK", queries)
    for module in (neighbours, eval_knn):
        monkeypatch.setattr(module, "MAX_ELEMENTS", numbers)
    problem = *clusters(size, num_classes, seed=1), *clusters(20, num_classes, seed=2)
    for temperature in (0.07, 0.5, 0.002):
        found = knn_accuracy(*problem, (200, 1, 5, 20, 5), temperature)    # 200 is above two of the sizes
        assert list(found) == [200, 1, 5, 20]
        for k, accuracy in found.items():
            assert accuracy == pytest.approx(reference(*problem, k, temperature)), (k, temperature)


@pytest.mark.parametrize("dtype, scale", [
    (torch.bfloat16, 1), (torch.float16, 1), (torch.float16, 1e3), (torch.float64, 1),
    (torch.float32, 1e-42), (torch.float32, 1e-30), (torch.float32, 1e30), (torch.float32, 1e37)])
def test_features_of_any_dtype_and_scale(dtype, scale):
    (bank, labels), (queries, truth) = clusters(120, 7, seed=1), clusters(40, 7, seed=2)
    if scale == 1e-42:                                                 # few bits are left: signs alone
        bank, queries = bank.sign(), queries.sign() + 0.5
    bank[3], queries[4] = 0, 0                                         # zero rows have cosine 0 with all
    truth[4] = 99
    bank, queries = (bank * scale).to(dtype), (queries * scale).to(dtype)
    cos, index = nearest_rows(bank, queries, 120)
    exact = normalize(queries.double(), eps=1e-60) @ normalize(bank.double(), eps=1e-60).T
    for expected in (exact.gather(1, index), exact.sort(1, descending=True).values):
        torch.testing.assert_close(cos.double(), expected, rtol=0, atol=1e-6)
    if scale != 1e-42:
        problem = bank, labels, queries, truth
        assert knn_accuracy(*problem, (20,))[20] == reference(*problem, 20, 0.07)


def test_a_vote_never_vanishes():
    bank, labels = torch.tensor([[1.0, 0], [0, 1], [-1, 0]]), torch.tensor([0, 3, 5])
    accuracy = knn_accuracy(bank, labels, bank[:1], torch.tensor([3]), (2,), temperature=1e-4)
    assert accuracy == {2: (0, 100)}


def test_several_ranks_share_the_queries_and_equal_one():
    bank, queries = clusters(101, 11, seed=1), clusters(17, 11, seed=2)

    def both():
        few = queries[0][:2], queries[1][:2]                           # a rank of three has none
        return knn_accuracy(*bank, *queries, (1, 10, 200)), knn_accuracy(*bank, *few, (1, 10, 200))
    assert run_ranks(both, 3) == [both()] * 3


def test_autocast_does_not_reach_the_product():
    bank, queries = clusters(2000, 10, seed=1, dim=64)[0], clusters(300, 10, seed=2, dim=64)[0]
    exact = nearest_rows(bank, queries, 5)
    with torch.autocast("cpu", torch.bfloat16):
        found = nearest_rows(bank, queries, 5)
    assert all(torch.equal(one, other) for one, other in zip(exact, found))


EYE, SIX = torch.eye(6), torch.arange(6)


@pytest.mark.parametrize("bad, message", [
    (dict(bank=torch.ones(6)), "bank features must"),
    (dict(queries=EYE[:, :5]), r"query features .* \[6, 6\]"),
    (dict(bank=EYE.long()), "bank features must be floating point"),
    (dict(queries=EYE[:0], query_labels=SIX[:0]), "query features must be"),
    (dict(bank_labels=SIX[:5]), r"bank features must be floating point \[5, 6\]"),
    (dict(query_labels=SIX[:, None]), "query labels must be integers"),
    (dict(query_labels=SIX.float()), "query labels must be integers"),
    (dict(bank_labels=SIX - 1), "bank labels must be integers >= 0"),
    (dict(bank=EYE / 0), "bank features are not finite")])
def test_bad_input_is_named(bad, message):
    good = dict(bank=EYE, bank_labels=SIX, queries=EYE, query_labels=SIX)
    with pytest.raises(ValueError, match=message):
        knn_accuracy(**{**good, **bad})


# ------------------------------------------------------------------------------------------------- the script

@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """What main.py and cifar/main.py save, as far as an evaluation reads it."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("run") / "checkpoint.pth"
    described = {"arch": "cifar/small", "patch_size": None, "image_size": 32, "mean": [0.4, 0.5, 0.6],
                 "std": [0.2, 0.25, 0.3]}
    networks = {name: {f"backbone.{key}": value for key, value in net.state_dict().items()}
                for name, net in ((name, build_backbone("cifar/small")) for name in ("student", "teacher"))}
    torch.save({**networks, "backbone": described, "epoch": 1, "args": {"arch": "small"}}, path)
    return path


def flags(checkpoint, images, *more):
    return ["--pretrained_weights", str(checkpoint), "--data_path", str(images), "--num_workers", "0",
            "--batch_size_per_gpu", "4", "--device", "cpu", *map(str, more)]


def run(argv, output):
    """The records that a run of the script appends."""
    eval_knn.main([*argv, "--output_dir", str(output)])
    return [json.loads(line) for line in (output / "knn.txt").read_text().splitlines()]


def refused(argv):
    return refusal(eval_knn.main, [*argv, "--device", "cpu"])


def test_the_script_against_plain_features(checkpoint, images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(checkpoint.parent)                               # whose checkpoint.pth is the default
    eval_knn.main(["--checkpoint_key", "teacher", "--data_path", str(images)])
    printed = capsys.readouterr().out
    assert "k = 100, 200: the training set has 21 images; the result is of k = 21" in printed
    assert f"taking {checkpoint}" in printed and list(checkpoint.parent.iterdir()) == [checkpoint]
    more = ("--nb_knn", 3, 10, 200, "--temperature", 0.5, "--checkpoint_key", "student",
            "--dump_features", tmp_path / "dumps")
    records = run(flags(checkpoint, images, *more), tmp_path / "new" / "folder")

    backbone, description = load_backbone(checkpoint, "student")
    transform, plain = data.eval_transform(*description[2:5]), []
    for split in ("train", "val"):                                   # torchvision's loops, image by image
        folder = torchvision.datasets.ImageFolder(images / split)
        with torch.no_grad():
            plain += [torch.cat([backbone(transform(image)[None]) for image, _ in folder]),
                      torch.tensor(folder.targets)]
    for name, expected in zip(("trainfeat", "trainlabels", "testfeat", "testlabels"), plain):
        found = torch.load(tmp_path / "dumps" / f"{name}.pth", weights_only=True)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert [(r["k"], r["temperature"]) for r in records] == [(k, 0.5) for k in (3, 10, 21)]
    for record in records:
        accuracy = knn_accuracy(*plain, (record["k"],), record["temperature"])
        assert (record["top1"], record["top5"]) == pytest.approx(accuracy[record["k"]])
        told = [record[x] for x in ("arch", "image_size", "checkpoint_key", "train_images", "test_images")]
        assert told == ["cifar/small", 32, "student", 21, 11]
    again = run(flags(checkpoint, images, "--nb_knn", 3), tmp_path / "new" / "folder")
    assert len(again) == 4 and again[:3] == records


def test_dumps_round_trip(checkpoint, images, tmp_path):
    dumps = tmp_path / "dumps"
    records = run(flags(checkpoint, images, "--dump_features", dumps), tmp_path / "one")
    load, features = ["--load_features", str(dumps)], dumps / "testfeat.pth"
    for one, two in zip(records, run([*load, "--device", "cpu"], tmp_path / "two"), strict=True):
        assert all(one[name] == two[name] for name in ("k", "temperature", "top1", "top5", "train_images"))
    damaged = "testfeat.pth is damaged or no tensor"
    for content, message in ((torch.zeros(3, 5), str(dumps)), ({}, damaged), (torch.tensor(1.0), damaged)):
        torch.save(content, features)
        assert message in refused(load)
    features.write_bytes(b"junk")
    assert "testfeat.pth is damaged" in refused(load)
    features.unlink()
    assert refused(load) == f"No such file or directory: {features}"


def test_random_weights_are_explicit_and_seeded(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    common = ["--data_path", str(images), "--num_workers", "0", "--device", "cpu", "--nb_knn", "5"]
    assert f"there is no {tmp_path}/checkpoint.pth" in refused(common)
    dumps = []
    for seed in ("1", "1", "2"):
        record = run([*common, "--random_weights", "--arch", "cifar/tiny", "--seed", seed,
                      "--dump_features", str(tmp_path)], tmp_path)[-1]
        dumps.append(torch.load(tmp_path / "testfeat.pth", weights_only=True))
    assert (record["weights"], record["checkpoint_key"], record["image_size"]) == ("random", None, 32)
    assert torch.equal(dumps[0], dumps[1]) and not torch.equal(dumps[0], dumps[2])


def test_two_ranks_equal_one(checkpoint, images, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "leave", lambda: None)            # run_ranks leaves its group itself
    records, dumps = [], []
    for world in (1, 2):
        output = tmp_path / str(world)
        more = "--nb_knn", 3, 30, "--dump_features", output, "--output_dir", output
        run_ranks(lambda: eval_knn.main(flags(checkpoint, images, *more)), world)
        records.append((output / "knn.txt").read_text())
        dumps.append([torch.load(output / name, weights_only=True) for name in eval_knn.DUMPS])
    assert records[0] == records[1]
    torch.testing.assert_close(*dumps, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("argv, message", [
    ("--random_weights --arch cifar/tiny", "--data_path is missing"),
    ("--random_weights --arch cifar/tiny --data_path /nowhere", "no folder /nowhere"),
    ("--random_weights --pretrained_weights x.pth", "give either --pretrained_weights or --random_weights"),
    ("--random_weights --checkpoint_key x", "--checkpoint_key cannot be used with --random_weights"),
    ("--load_features X --arch vit_tiny", "--arch cannot be used with --load_features")])
def test_mistakes_about_flags_and_data_are_one_line(argv, message):
    assert message in refused(argv.split())
