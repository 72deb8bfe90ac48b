"""Backbones against timm and torchvision, heads against their formulas, multi-crop against single views."""
import copy
from functools import partial

import pytest
import timm
import torch
import torchvision
from main import convert_sync_batchnorm
from torch import nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock
from vision_transformer import MultiCropNet, ProjectionHead, SideBySideConv2d, build_backbone, mlp_head


def images(count, height, width=None, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, height, width or height, generator=generator, dtype=dtype)


def small_vit(**kwargs):
    """Three blocks of vit_tiny for 32 x 32 pixels, in float64, with weights so large that tokens differ."""
    torch.manual_seed(0)
    vit = build_backbone("vit_tiny", patch_size=8, image_size=32, **kwargs)
    vit.blocks = vit.blocks[-3:]
    for parameter in vit.parameters():
        nn.init.normal_(parameter, std=0.3)
    return vit.double()


def assert_close(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@torch.no_grad()
def test_vit_equals_timm():
    options = dict(img_size=32, patch_size=8, num_classes=0)
    fixed = timm.create_model("vit_tiny_patch16_224", **options)
    dynamic = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, **options)
    ours = build_backbone("vit_tiny", 8, 32)
    for model in (dynamic, ours):
        model.load_state_dict(fixed.state_dict())
    x, wide = images(2, 32, dtype=torch.float32), images(2, 24, 56, dtype=torch.float32)
    assert torch.equal(ours(x), fixed(x))
    assert torch.equal(ours(wide), dynamic(wide))


def test_drop_path_rises_linearly():
    blocks = build_backbone("vit_tiny", image_size=32, drop_path_rate=0.22).blocks
    rates = [getattr(block.drop_path2, "drop_prob", 0.0) for block in blocks]
    assert rates == pytest.approx([0.02 * i for i in range(12)])


def test_sizes_that_patches_do_not_tile():
    for patch, size in (16, 100), (0, 224), (16, 0):
        with pytest.raises(ValueError, match=f"image size {size} is no multiple of the patch size {patch}"):
            build_backbone("vit_tiny", patch, size)


@pytest.mark.parametrize("arch", ["resnet18", "cifar/small"])
def test_resnet_equals_torchvision_without_its_classifier(arch):
    ours = build_backbone(arch)
    theirs = torchvision.models.ResNet(BasicBlock, [2, 2, 2, 2] if arch == "resnet18" else [1, 1, 1, 1])
    theirs.fc = nn.Identity()
    if arch == "cifar/small":
        theirs.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=2, padding=1, bias=False)
        theirs.maxpool = theirs.layer4 = nn.Identity()
    theirs.load_state_dict(ours.state_dict())  # strict: the same keys
    x = images(4, 32, dtype=torch.float32)
    for training in (True, False):
        assert torch.equal(ours.train(training)(x), theirs.train(training)(x))


@pytest.mark.parametrize("name, embed_dim, stem_stride, parameters", [
    ("resnet18", 512, 1, 11.2e6), ("resnet50", 2048, 1, 23.5e6), ("small", 256, 2, 1.23e6),
    ("tiny", 64, 2, 0.0775e6)])
def test_small_image_resnets_keep_the_resolution(name, embed_dim, stem_stride, parameters):
    sides = []
    with torch.device("meta"):
        backbone = build_backbone(f"cifar/{name}")
        backbone.layer1.register_forward_hook(lambda module, inputs, output: sides.append(output.shape[-1]))
        assert backbone(torch.empty(2, 3, 32, 32)).shape == (2, embed_dim)
    assert sides == [32 // stem_stride] and backbone.embed_dim == embed_dim
    assert sum(weight.numel() for weight in backbone.parameters()) == pytest.approx(parameters, rel=0.01)


@pytest.mark.parametrize("side, stride", [(4, 1), (3, 1), (8, 2), (7, 2), (6, 2)])
def test_images_side_by_side_do_not_touch(side, stride, monkeypatch):
    """Outputs and gradients in bfloat16 are those of the plain convolution in float64."""
    convolution = SideBySideConv2d(8, 16, 3, stride, padding=1, bias=False).bfloat16()
    x = torch.randn(96, 8, side, side).bfloat16().to(memory_format=torch.channels_last).requires_grad_()
    reference, y = x.detach().double().requires_grad_(), convolution(x)
    weight = convolution.weight.detach().double().requires_grad_()
    expected = F.conv2d(reference, weight, stride=stride, padding=1)
    direction = torch.randn_like(expected)
    y.backward(direction.bfloat16())
    expected.backward(direction)
    for ours, theirs in ((y, expected), (x.grad, reference.grad), (convolution.weight.grad, weight.grad)):
        assert (ours.double() - theirs).norm() < 0.01 * theirs.norm()
    forward, rows = nn.Conv2d.forward, []
    monkeypatch.setattr(nn.Conv2d, "forward", lambda self, x: rows.append(len(x)) or forward(self, x))
    convolution(x)
    assert rows == [3]                                  # of 32 images
    assert isinstance(build_backbone("cifar/resnet18").layer4[0].conv1, SideBySideConv2d)


# A layer after the pooling, and two class tokens.
@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "deit_tiny_distilled_patch16_224"])
def test_timm_backbone_returns_features_of_embed_dim(name):
    with torch.device("meta"):
        backbone = build_backbone(f"timm/{name}", image_size=48).eval()
        assert backbone(torch.empty(2, 3, 48, 48)).shape == (2, backbone.embed_dim)
        assert backbone.state_dict().keys() == timm.create_model(name, num_classes=0).state_dict().keys()


@pytest.mark.parametrize("arch", ["vit_gigant", "timm/convnext_tinny", "timm/hf-hub:owner/name", ""])
def test_unknown_arch_is_named_before_its_patch_size(arch):
    with pytest.raises(ValueError, match=f"^unknown arch '{arch}'; choose from .*, or timm/NAME$"):
        build_backbone(arch, patch_size=0)


@pytest.mark.parametrize("build", [
    partial(small_vit, drop_path_rate=0.5), partial(build_backbone, "cifar/small"),
    partial(build_backbone, "timm/test_convnext")])
def test_grad_checkpointing_changes_nothing_but_memory(build):
    """The same features, gradients and buffers after two resolutions, and less kept for the backward pass."""
    plain = build().double()
    checkpointed, kept, weights = copy.deepcopy(plain), {}, sum(p.nbytes for p in plain.parameters())
    checkpointed.set_grad_checkpointing(True)
    for network in (plain, checkpointed):
        tensors = []  # held, so that no address is used twice
        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: tensors.append(t) or t, lambda t: t):
            features = torch.cat([network(images(2, size)) for size in (64, 32)])
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        kept[network] = sum(storages.values()) - weights
        features.square().sum().backward()
    assert kept[checkpointed] < 0.6 * kept[plain]
    for expected, actual in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        assert_close(actual.grad, expected.grad, 1e-9)
    assert_close([*checkpointed.buffers()], [*plain.buffers()], 0)


@pytest.mark.parametrize("build", [
    partial(build_backbone, "timm/mobilenetv3_small_100"), partial(build_backbone, "timm/regnety_002"),
    lambda: MultiCropNet(build_backbone("cifar/tiny"), mlp_head(64, (8, 4))),
    lambda: ProjectionHead(3 * 64 * 64, 4, hidden_dim=8, bottleneck_dim=4, use_bn=True)])
@torch.no_grad()
def test_sync_batchnorm_computes_the_same(build):
    network, x = build().eval(), images(2, 64, dtype=torch.float32)
    x = x.flatten(1) if isinstance(network, ProjectionHead) else x
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 0.0  # as in a teacher
    expected, keys = network(x), network.state_dict().keys()
    network = convert_sync_batchnorm(network)
    assert F.cosine_similarity(network(x), expected, dim=-1).min() > 1 - 1e-5
    converted = [module for module in network.modules() if isinstance(module, nn.SyncBatchNorm)]
    assert len(converted) == len(norms) > 0 and all(norm.momentum == 0.0 for norm in converted)
    assert network.state_dict().keys() == keys


def batch_norm(x):
    return (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()


@pytest.mark.parametrize("layers, use_bn", [(1, False), (3, False), (3, True)])
def test_projection_head_equals_its_formula(layers, use_bn):
    head = ProjectionHead(6, 10, hidden_dim=8, bottleneck_dim=4, layers=layers, use_bn=use_bn).double()
    hidden = x = torch.randn(5, 6, dtype=torch.float64)
    linears = [module for module in head.mlp if isinstance(module, nn.Linear)]
    assert [linear.out_features for linear in linears] == [8] * (layers - 1) + [4]
    for linear in linears[:-1]:
        hidden = hidden @ linear.weight.T + linear.bias
        hidden = batch_norm(hidden) if use_bn else hidden
        hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
    hidden = hidden @ linears[-1].weight.T + linears[-1].bias
    v = head.last_layer.parametrizations.weight.original1
    assert_close(head(x), F.normalize(hidden) @ F.normalize(v).T)


def test_projection_head_starts_as_dino():
    head = ProjectionHead(384, 64)
    for linear, width in [(head.mlp[0], 2048), (head.mlp[2], 2048), (head.mlp[4], 256)]:
        assert linear.out_features == width and not linear.bias.any()
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.02)


@pytest.mark.parametrize("norm_last_layer", [True, False])
def test_norm_last_layer_holds_the_lengths_of_its_rows(norm_last_layer):
    head = ProjectionHead(6, 10, norm_last_layer=norm_last_layer)
    teacher = copy.deepcopy(head)
    head(torch.randn(5, 6)).square().sum().backward()
    copy.deepcopy(head)  # after a step, when torch's older weight norm could not be copied
    torch.optim.SGD([p for p in head.parameters() if p.requires_grad], lr=1.0).step()
    assert not torch.allclose(head.last_layer.weight, teacher.last_layer.weight)
    assert torch.allclose(head.last_layer.weight.norm(dim=1), torch.ones(10)) == norm_last_layer


def test_mlp_head_equals_its_formula():
    head, x = mlp_head(6, (8, 7, 5)).double(), torch.randn(4, 6, dtype=torch.float64)
    hidden = batch_norm(x @ head[0].weight.T).clamp(min=0)
    hidden = batch_norm(hidden @ head[3].weight.T).clamp(min=0)
    assert_close(head(x), hidden @ head[6].weight.T + head[6].bias)
    assert list(mlp_head(6, (5,)).state_dict()) == ["0.weight", "0.bias"]


@pytest.mark.parametrize("sizes, runs", [([32, 32, 16, 16, 16], [(6, 32), (9, 16)]), ([32], [(3, 32)]),
                                         ([16, 32, 16], [(3, 16), (3, 32), (3, 16)])])
def test_multi_crop_equals_one_view_at_a_time(sizes, runs):
    network = MultiCropNet(small_vit(), ProjectionHead(192, 16, hidden_dim=32, bottleneck_dim=8).double())
    views, batches, heads = [images(3, size, seed=seed) for seed, size in enumerate(sizes)], [], []
    expected = torch.cat([network(view) for view in views])  # a tensor is a single view
    assert torch.equal(expected[0], network.head(network.backbone(views[0])))
    network.backbone.register_forward_pre_hook(lambda _, x: batches.append((len(x[0]), x[0].shape[-1])))
    network.head.register_forward_pre_hook(lambda _, x: heads.append(len(x[0])))
    assert_close(network(views), expected)
    assert batches == runs and heads == [3 * len(sizes)]


def test_multi_crop_compiles_into_one_graph():
    backbone = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
    network = MultiCropNet(backbone, ProjectionHead(12, 6, hidden_dim=8, bottleneck_dim=4).double())
    views = [images(3, size, seed=seed) for seed, size in enumerate([32, 32, 16])]
    assert_close(torch.compile(network, backend="eager", fullgraph=True)(views), network(views))
