"""eval_finetune.py: the script as its users run it, and its parts against formulas."""
import random

import data
import eval_finetune
import interrupt
import numpy as np
import pretrained
import pytest
import timm
import torch
import torch.nn.functional as F
import torch.utils.tensorboard  # noqa: F401  (here lest every forked run imports it)
import utils
import vision_transformer
from augmentations import MultiCrop
from conftest import assert_same, refusal
from PIL import Image
from vision_transformer import build_backbone


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", autouse=True)
def narrow():
    """vit_tiny is quick, and has as many layers as it should."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(vision_transformer.VIT_ARCHS, "vit_tiny", (32, 2))
        yield


def flags(images, output, *more):
    """Three epochs of 3 steps: 21 training images, batches of 6."""
    return [str(word) for word in (
        "--random_weights", "--arch", "vit_tiny", "--patch_size", 8, "--image_size", 16, "--device", "cpu",
        "--data_path", images, "--batch_size_per_gpu", 6, "--num_workers", 0, "--epochs", 3,
        "--warmup_epochs", 1, "--output_dir", output, *more)]


def outcome(output):
    """All that a run leaves, without its times, flags and description."""
    state = utils.load_checkpoint(output / eval_finetune.CHECKPOINT)
    del state["args"], state["backbone"]
    records = utils.read_records(output / "log.txt")
    return state, [{name: value for name, value in r.items() if name != "seconds"} for r in records]


# ------------------------------------------------------------------------------------------ the whole script

@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """The folder of a run that nothing interrupted, with an EMA."""
    output = tmp_path_factory.mktemp("whole")
    eval_finetune.main(flags(images, output, "--ema", 0.9))
    return output


def test_what_a_run_leaves_behind(whole, images):
    state, records = outcome(whole)
    assert [record["epoch"] for record in records] == [0, 1, 2] and (state["epoch"], state["step"]) == (3, 0)
    assert records[0].keys() == {"epoch", "train_loss", "train_lr", "test_loss", "test_acc1", "test_acc5",
                                 "test_class_acc1"}
    assert records[0]["train_lr"] == pytest.approx(5e-4 * 6 / 256) and records[2]["train_lr"] == 1e-6
    groups = state["optimizer"]["param_groups"]  # as the last step left them
    assert {round(group["lr"] / group["lr_scale"], 12) for group in groups} == {1e-6}
    assert min(group["lr_scale"] for group in groups) == pytest.approx(0.75 ** 13)

    exported = whole / "classifier.safetensors"
    model, description = pretrained.load_backbone(exported)
    assert description[:3] == ("vit_tiny", 8, 16)
    classifier = timm.models.VisionTransformer(16, 8, embed_dim=32, num_heads=2, num_classes=3)
    timm.models.load_checkpoint(classifier, str(exported))
    assert_same(dict(classifier.state_dict()), dict(state["ema"]))
    test = data.build_dataset("folder", images, "test", data.eval_transform(16, *description[3:5]))
    batch, labels = map(torch.stack, zip(*[(image, torch.tensor(label)) for image, label in test]))
    with torch.no_grad():
        logits = classifier.eval()(batch)
        assert torch.equal(model(batch), classifier.forward_head(classifier.forward_features(batch), True))
    assert records[-1]["test_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)
    for key in ("model", "ema"):
        weights = pretrained.load_backbone(whole / eval_finetune.CHECKPOINT, key)[0].state_dict()
        assert all(torch.equal(value, state[key][name]) for name, value in weights.items())


def test_kill_and_resume_is_bitwise_the_same(whole, images, tmp_path):
    """Killed in the second epoch, asked to end in the last, killed before a checkpoint was replaced and after
    an evaluation."""
    command = flags(images, tmp_path / "run", "--ema", 0.9)
    for point, count, name, code, words in (
            ("step", 5, "KILL", -9, ""), ("step", 4, "TERM", 143, "saved after step 2/3 of epoch 3"),
            ("fsync", 1, "KILL", -9, ""), ("evaluate", 1, "KILL", -9, "")):
        ended = interrupt.run(command, tmp_path, point, count, name, script=eval_finetune, code=code)
        assert words in ended.stderr
    eval_finetune.main(command)
    assert_same(outcome(tmp_path / "run"), outcome(whole))


def test_two_ranks_equal_one(images, tmp_path):
    """Without stochastic depth and batch norm: the same images in the same blends."""
    command = flags(images, "OUT", "--drop_path", 0, "--clip_grad", 1)
    one, two = ([*command, "--output_dir", str(tmp_path / name), "--batch_size_per_gpu", size]
                for name, size in (("one", "8"), ("two", "4")))
    eval_finetune.main(one)
    interrupt.run_ranks(two, tmp_path, eval_finetune, codes=(0, 0))
    (_, records), (_, others) = outcome(tmp_path / "one"), outcome(tmp_path / "two")
    for record, other in zip(records, others, strict=True):
        assert record == pytest.approx(other, rel=1e-4)
    eval_finetune.main([*two, "--batch_size_per_gpu", "8"])  # finished, by another number of ranks


def test_other_runs_are_not_mixed(whole, images):
    for more, words in ((("--lr", 0.1), "--lr 0.0005 there, 0.1 here"),
                        (("--batch_size_per_gpu", 4), "--batch_size 6 there, 4 here")):
        assert words in refusal(eval_finetune.main, flags(images, whole, "--ema", 0.9, *more))
    before = (whole / eval_finetune.CHECKPOINT).stat().st_mtime_ns
    eval_finetune.main(flags(images, whole, "--ema", 0.9))
    assert (whole / eval_finetune.CHECKPOINT).stat().st_mtime_ns == before


def test_all_weights_of_a_checkpoint_learn_bright_from_dark(images, tmp_path):
    backbone = build_backbone("cifar/tiny")
    description = pretrained.Description("cifar/tiny", None, 32, (0.5,) * 3, (0.25,) * 3)
    pretrained.export_backbone(backbone, description, tmp_path / "weights.safetensors")
    command = [str(word) for word in (
        "--pretrained_weights", tmp_path / "weights.safetensors", "--data_path", images, "--device", "cpu",
        "--num_workers", 0, "--batch_size_per_gpu", 10, "--epochs", 8, "--warmup_epochs", 1, "--lr", 0.2,
        "--mixup", 0, "--cutmix", 0, "--rand_augment", "none", "--crop_scale", 0.5, 1, "--val_freq", 8,
        "--output_dir", tmp_path / "run")]
    message = refusal(eval_finetune.main, [*command, "--drop_path", "1"])
    assert "--drop_path cannot be used with a backbone that is no vit_*" in message
    eval_finetune.main(command)
    state, records = outcome(tmp_path / "run")
    assert records[-1]["test_acc1"] >= 80 and records[-1]["train_loss"] < records[0]["train_loss"]
    assert ["test_acc1" in record for record in records] == [True] + 6 * [False] + [True]
    assert all((state["model"][name] != value).any() for name, value in backbone.named_parameters())
    pretrained.export_backbone(build_backbone("cifar/tiny"), description, tmp_path / "weights.safetensors")
    assert "had another backbone or other images" in refusal(eval_finetune.main, command)  # the same name


# -------------------------------------------------------------------------------------------------- its parts

def build(images, output, *more):
    return eval_finetune.Run(eval_finetune.parse_args(flags(images, output, *more)), torch.device("cpu"))


def layer(name, blocks):
    """A parameter's layer, counted from the input: stem, `blocks` of them, classifier."""
    parts = name.split(".")
    if parts[0] == "blocks":
        return 1 + int(parts[1])
    if parts[0].startswith("layer"):
        return 1 + blocks.index((parts[0], parts[1]))
    return {"norm": 12, "head": 13, "fc": 1 + len(blocks)}.get(parts[0], 0)


@pytest.mark.parametrize("arch, stages", [("vit_tiny", ()), ("resnet18", (2, 2, 2, 2)),
                                          ("timm/resnet10t", (1, 1, 1, 1))])
def test_layers_learn_at_rates_that_decay_from_the_top(arch, stages):
    blocks = [(f"layer{stage}", str(i)) for stage, depth in enumerate(stages, 1) for i in range(depth)]
    model = build_backbone(arch, 8, 16)
    eval_finetune.add_classifier(model, 5)
    assert model.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 5)
    optimizer = eval_finetune.build_optimizer(model, 1.0, 0.1, 0.7)
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    top = 13 if arch == "vit_tiny" else 1 + len(blocks)
    for name, parameter in model.named_parameters():
        group = groups.pop(parameter)
        assert group["lr_scale"] == pytest.approx(0.7 ** (top - layer(name, blocks))), name
        undecayed = parameter.ndim == 1 or name in ("pos_embed", "cls_token")
        assert group["weight_decay"] == (0 if undecayed else 0.1), name
    assert not groups


def test_a_fraction_is_eval_linears_and_an_epoch_holds_no_image_twice(images, tmp_path):
    run = build(images, tmp_path, "--fraction", 0.7, "--seed", 3)
    targets = torch.tensor(data.build_dataset("folder", images, "train").targets)
    assert list(run.train.images.indices) == data.choose_subset(targets, None, 0.7, 3).tolist()
    keys = [key for batch in eval_finetune.make_loader(run).batch_sampler for key in batch]
    assert len({index for index, _ in keys}) == len(keys) == 12  # of 15


def test_views_depend_on_index_and_seed_alone(images, tmp_path):
    views = build(images, tmp_path).train
    image, label = views[3, 7]
    views[4, 8], random.random(), np.random.rand(), torch.rand(1)
    again, _ = views[3, 7]
    assert torch.equal(image, again) and image.shape == (3, 16, 16) and label == views.images.targets[3]
    assert not torch.equal(image, views[3, 8][0])


def test_without_augmentation_a_view_is_the_image_or_its_mirror(images, tmp_path):
    run = build(images, tmp_path, "--crop_scale", 1, 1, "--rand_augment", "none", "--erasing", 0)
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    run.train.images = [(Image.fromarray(pixels), 0)]
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in run.description[3:5])
    expected = (torch.from_numpy(pixels).permute(2, 0, 1) / 255 - mean) / std
    for view in (run.train[0, seed][0] for seed in range(4)):
        assert any(torch.allclose(view, x, atol=1e-5) for x in (expected, expected.flip(2)))


def test_rand_augment_keeps_a_bit(images, tmp_path):
    """timm would keep none at these levels, for which Pillow 13 has no answer but an error."""
    run = build(images, tmp_path, "--rand_augment", "rand-m10-inc1")
    step, = (step for step in run.train.transform.transforms if hasattr(step, "ops"))
    image = Image.radial_gradient("L").convert("RGB")
    for transform in (step, MultiCrop(rand_augment="rand-m0").rand_augment):
        operation, = (op for op in transform.ops if op.name.startswith("Posterize"))
        operation.prob = 1
        assert np.unique(operation(image)).tolist() == [0, 128]


def test_scores_are_those_of_their_formulas():
    torch.manual_seed(0)
    logits, labels = torch.randn(40, 7), torch.arange(40) % 6  # no image of the last class
    right = (logits.argmax(1) == labels).double()
    expected = {"loss": -logits.log_softmax(1)[range(40), labels].mean(), "acc1": 100 * right.mean(),
                "acc5": 100 * sum(y in x.argsort()[-5:] for x, y in zip(logits, labels)) / 40,
                "class_acc1": 100 * sum(right[labels == c].mean() for c in range(6)) / 6}
    assert eval_finetune.score(logits, labels) == pytest.approx({k: float(v) for k, v in expected.items()})


@pytest.mark.parametrize("arguments, words", [
    (["--batch_size_per_gpu", "5"], "--batch_size_per_gpu must be even"),
    (["--batch_size_per_gpu", "22"], "a step takes 22 images, more than the 21"),
    (["--rand_augment", "strong"], "timm knows no --rand_augment strong"),
    (["--shots", "2", "--fraction", "0.1"], "--fraction: not allowed with argument --shots"),
    (["--shots", "17"], "6 training images of class"),
    (["--num_labels", "4"], "--num_labels 4"),
    (["--crop_scale", "1", "0.5"], "--crop_scale needs 0 < MIN <= MAX"),
    (["--pretrained_weights", "nowhere.pth"], "--random_weights"),
])
def test_a_mistake_is_one_clear_line(images, tmp_path, arguments, words):
    assert words in refusal(eval_finetune.main, flags(images, tmp_path, *arguments))
    assert not (tmp_path / eval_finetune.CHECKPOINT).exists()
