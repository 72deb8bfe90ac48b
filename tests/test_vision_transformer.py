"""The backbones against timm and torchvision, the head against its formula, multi-crop against one view at a time."""
import copy
from functools import partial

import pytest
import timm
import torch
import torchvision
from torch.nn import functional as F

from vision_transformer import MultiCropNet, ProjectionHead, build_backbone


def images(count, height, width=None, seed=0, dtype=torch.float32):
    return torch.randn(count, 3, height, width or height, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def small_vit(**kwargs):
    """Four blocks of vit_tiny for 32 x 32 pixels, in float64, with weights so large that no two tokens look alike."""
    torch.manual_seed(0)
    vit = build_backbone("vit_tiny", patch_size=8, image_size=32, **kwargs)
    vit.blocks = vit.blocks[-4:]
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return vit.double()


def timm_vit(arch, patch_size=16, image_size=224):
    return timm.create_model(f"{arch}_patch16_224", patch_size=patch_size, img_size=image_size, num_classes=0,
                             dynamic_img_size=True)


def assert_close(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# --- vision transformers ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("arch, patch_size, image_size", [("vit_tiny", 16, 224), ("vit_tiny", 8, 224), ("vit_small", 16, 224),
                                                          ("vit_base", 8, 224), ("vit_small", 4, 32)])
def test_vit_has_the_keys_and_shapes_of_timm(arch, patch_size, image_size):
    with torch.device("meta"):
        ours, theirs = build_backbone(arch, patch_size, image_size), timm_vit(arch, patch_size, image_size)
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert ours.embed_dim == theirs.num_features


@torch.no_grad()
def test_vit_small_equals_timm():
    torch.manual_seed(0)
    fixed = timm.create_model("vit_small_patch16_224", num_classes=0).eval()
    dynamic = timm_vit("vit_small").eval()
    ours = build_backbone("vit_small").eval()
    for model in (dynamic, ours):
        model.load_state_dict(fixed.state_dict())
    assert torch.equal(ours(images(2, 224)), fixed(images(2, 224)))
    for size in [(96, 96), (64, 112)]:
        assert torch.equal(ours(images(2, *size)), dynamic(images(2, *size)))


@torch.no_grad()
def test_position_embeddings_follow_the_image():
    """A feature map that is linear in the position stays so, rows and columns in their places, at another, non-square size."""
    vit = small_vit()
    rows = torch.arange(4.0, dtype=torch.float64)[:, None].expand(4, 4)
    vit.pos_embed.zero_()
    vit.pos_embed[0, 1:, 0] = rows.flatten()
    vit.pos_embed[0, 1:, 1] = 10 * rows.T.flatten()
    for parameter in (*vit.patch_embed.parameters(), vit.cls_token):
        parameter.zero_()
    tokens = vit._pos_embed(vit.patch_embed(images(1, 32, 64, dtype=torch.float64)))[0]        # 4 x 8 patches
    grid = tokens[1:].view(4, 8, -1)
    assert_close(grid[:, :, 0], rows[:, :1].expand(4, 8), 1e-6)     # timm interpolates in float32
    assert (grid[:, :, 1].diff(dim=1) > 0).all()
    assert_close(grid[:, :, 1], grid[:1, :, 1].expand(4, 8), 1e-6)
    assert not tokens[0].any()


@torch.no_grad()
def test_intermediate_layers():
    vit = small_vit()
    x = images(2, 32, 48, dtype=torch.float64)
    hidden = []
    for block in vit.blocks:
        block.register_forward_hook(lambda module, inputs, output: hidden.append(output))
    layers = vit.get_intermediate_layers(x, 3)
    assert [layer.shape for layer in layers] == [(2, 1 + 4 * 6, 192)] * 3
    for layer, output in zip(layers, hidden[1:4]):
        assert_close(layer, F.layer_norm(output, (192,), vit.norm.weight, vit.norm.bias, vit.norm.eps))
    assert_close(layers[-1], vit.forward_features(x))
    assert_close(layers[-1][:, 0], vit(x))
    assert_close(vit.get_intermediate_layers(x)[0], layers[-1])


@pytest.mark.parametrize("n", [0, 5])
def test_intermediate_layers_that_do_not_exist(n):
    with pytest.raises(ValueError, match=f"1 to 4 blocks, got {n}"):
        small_vit().get_intermediate_layers(images(1, 32, dtype=torch.float64), n)


@torch.no_grad()
def test_last_selfattention_reproduces_the_fused_attention():
    vit = small_vit()
    last = vit.blocks[-1].attn
    seen = {}
    last.register_forward_hook(lambda module, inputs, output: seen.update(input=inputs[0], output=output))
    x = images(2, 32, 24, dtype=torch.float64)
    vit(x)
    attention = vit.get_last_selfattention(x)
    assert attention.shape == (2, 3, 13, 13)
    assert attention.std() > 0.05                                                               # not uniform
    assert_close(attention.sum(-1), torch.ones(2, 3, 13, dtype=torch.float64))
    values = last.qkv(seen["input"])[..., -192:].view(2, 13, 3, 64)
    mixed = torch.einsum("bhqk,bkhd->bqhd", attention, values).reshape(2, 13, 192)
    assert_close(last.proj(mixed), seen["output"])


def test_drop_path_rises_linearly_and_is_off_in_evaluation():
    vit = build_backbone("vit_tiny", image_size=32, drop_path_rate=0.22)
    rates = [getattr(block.drop_path2, "drop_prob", 0.0) for block in vit.blocks]
    assert rates == pytest.approx([0.02 * i for i in range(12)])
    x = images(2, 32)
    plain = build_backbone("vit_tiny", image_size=32)
    plain.load_state_dict(vit.state_dict())
    assert torch.equal(vit.eval()(x), plain(x))
    vit.train()
    assert not torch.equal(vit(x), vit(x))


@pytest.mark.parametrize("size", [(30, 32), (32, 30)])
def test_images_that_patches_do_not_tile(size):
    with pytest.raises(ValueError, match=f"multiples of the patch size 8, got {size[0]} x {size[1]} pixels"):
        small_vit()(images(1, *size, dtype=torch.float64))


@pytest.mark.parametrize("patch_size, image_size", [(16, 100), (0, 224), (16, 0)])
def test_image_size_that_patches_do_not_tile(patch_size, image_size):
    with pytest.raises(ValueError, match=f"image size {image_size} is no multiple of the patch size {patch_size}"):
        build_backbone("vit_tiny", patch_size, image_size)


# --- other backbones ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("arch, embed_dim", [("resnet18", 512), ("resnet50", 2048)])
def test_resnet_equals_torchvision_without_its_classifier(arch, embed_dim):
    ours, theirs = build_backbone(arch), torchvision.models.get_model(arch)
    theirs.fc = torch.nn.Identity()
    theirs.load_state_dict(ours.state_dict())                                                   # strict: the same keys
    x = images(2, 64)
    for training in (True, False):
        assert torch.equal(ours.train(training)(x), theirs.train(training)(x))
    assert ours(x).shape == (2, embed_dim) and ours.embed_dim == embed_dim


# A plain one, a layer behind the pooling, batch norm, and two class tokens.
@pytest.mark.parametrize("name, size", [("convnext_atto", 32), ("mobilenetv3_small_050", 32), ("resnet10t", 32),
                                        ("deit_tiny_distilled_patch16_224", 224)])
@torch.no_grad()
def test_timm_backbone_returns_features_of_embed_dim(name, size):
    backbone = build_backbone(f"timm/{name}").eval()
    assert backbone(images(2, size)).shape == (2, backbone.embed_dim)
    assert backbone.state_dict().keys() == timm.create_model(name, num_classes=0).state_dict().keys()


@pytest.mark.parametrize("arch, hint", [
    ("vit_smal", "vit_small"), ("resnet51", "resnet50"), ("timm/convnext_tinny", "timm/convnext_tiny"),
    ("convnext_tiny", "timm/convnext_tiny"), ("timm/hf-hub:owner/name", "timm/NAME"), ("", "vit_tiny")])
def test_unknown_arch(arch, hint):
    with pytest.raises(ValueError) as error:
        build_backbone(arch)
    message = str(error.value)
    assert repr(arch) in message and hint in message and "\n" not in message


@pytest.mark.parametrize("build", [small_vit, partial(build_backbone, "resnet18"), partial(build_backbone, "timm/convnext_atto")],
                         ids=["vit", "resnet", "timm"])
def test_grad_checkpointing_changes_nothing_but_memory(build):
    """Same features, gradients and batch norm buffers after a step on two resolutions, and less kept for the backward pass."""
    torch.manual_seed(0)
    plain = build().double().train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.set_grad_checkpointing()
    kept = {}
    for network in (plain, checkpointed):
        storages = {}

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor          # holds it, so that no address is used twice
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            features = torch.cat([network(images(2, size, dtype=torch.float64)) for size in (64, 32)])
        kept[network] = sum(tensor.untyped_storage().nbytes() for tensor in storages.values())
        features.square().sum().backward()
    assert kept[checkpointed] < 0.8 * kept[plain]
    for (name, expected), actual in zip(plain.named_parameters(), checkpointed.parameters()):
        assert torch.allclose(actual.grad, expected.grad, rtol=1e-9, atol=1e-12), name
    for (name, expected), actual in zip(plain.named_buffers(), checkpointed.buffers()):
        assert torch.equal(actual, expected), name
    assert checkpointed.eval()(images(2, 32, dtype=torch.float64)).equal(plain.eval()(images(2, 32, dtype=torch.float64)))


def test_grad_checkpointing_replays_drop_path():
    plain = small_vit(drop_path_rate=0.5)
    checkpointed = copy.deepcopy(plain)
    checkpointed.set_grad_checkpointing()
    for network in (plain, checkpointed):
        torch.manual_seed(1)
        network(images(4, 32, dtype=torch.float64)).square().sum().backward()
    for expected, actual in zip(plain.parameters(), checkpointed.parameters()):
        assert_close(actual.grad, expected.grad, 1e-9)


# --- projection head ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("use_bn", [False, True])
def test_projection_head_equals_its_formula(layers, use_bn):
    torch.manual_seed(0)
    head = ProjectionHead(6, 10, hidden_dim=8, bottleneck_dim=4, layers=layers, use_bn=use_bn).double()
    x = torch.randn(5, 6, dtype=torch.float64)
    hidden = x
    linears = [module for module in head.mlp if isinstance(module, torch.nn.Linear)]
    assert [linear.out_features for linear in linears] == [8] * (layers - 1) + [4]
    for linear in linears[:-1]:
        hidden = hidden @ linear.weight.T + linear.bias
        if use_bn:
            hidden = (hidden - hidden.mean(0)) / (hidden.var(0, correction=0) + 1e-5).sqrt()
        hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
    hidden = hidden @ linears[-1].weight.T + linears[-1].bias
    v = head.last_layer.parametrizations.weight.original1
    cosine = (hidden / hidden.norm(dim=1, keepdim=True)) @ (v / v.norm(dim=1, keepdim=True)).T
    assert_close(head(x), cosine)


def test_projection_head_starts_as_dino():
    head = ProjectionHead(384, 64)
    for linear in head.mlp[0], head.mlp[2], head.mlp[4]:
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.02) and not linear.bias.any()
    assert [head.mlp[i].out_features for i in (0, 2, 4)] == [2048, 2048, 256]                   # DINO's keys, too
    assert head.last_layer.bias is None


@pytest.mark.parametrize("norm_last_layer", [True, False])
def test_norm_last_layer_holds_the_lengths_of_its_rows(norm_last_layer):
    head = ProjectionHead(6, 10, norm_last_layer=norm_last_layer)
    optimizer = torch.optim.SGD([p for p in head.parameters() if p.requires_grad], lr=1.0)
    before = head.last_layer.weight.detach().clone()
    head(torch.randn(5, 6)).square().sum().backward()
    optimizer.step()
    lengths = head.last_layer.weight.norm(dim=1)
    assert not torch.allclose(head.last_layer.weight, before)
    assert torch.allclose(lengths, torch.ones(10)) == norm_last_layer


def test_projection_head_can_be_copied_for_a_teacher():
    head = ProjectionHead(6, 10)
    x = torch.randn(5, 6)
    head(x).sum().backward()                            # after a step, when torch's older weight norm could not be copied
    teacher = copy.deepcopy(head)
    assert torch.equal(teacher(x), head(x))
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn_like(parameter))
    assert not torch.allclose(teacher(x), head(x))
    teacher.load_state_dict(head.state_dict())
    assert torch.equal(teacher(x), head(x))


def test_projection_head_without_layers():
    with pytest.raises(ValueError, match="at least one layer, got 0"):
        ProjectionHead(6, 10, layers=0)


# --- multi-crop ---------------------------------------------------------------------------------------------------------

def multi_crop_net():
    vit = small_vit()
    return MultiCropNet(vit, ProjectionHead(vit.embed_dim, 16, hidden_dim=32, bottleneck_dim=8).double())


def views(sizes, count=3):
    return [images(count, size, seed=seed, dtype=torch.float64) for seed, size in enumerate(sizes)]


@pytest.mark.parametrize("sizes, runs", [([32, 32, 16, 16, 16], [(6, 32), (9, 16)]), ([32, 32], [(6, 32)]), ([32], [(3, 32)]),
                                         ([16, 32, 16], [(3, 16), (3, 32), (3, 16)])])
def test_multi_crop_equals_one_view_at_a_time(sizes, runs):
    network, batches = multi_crop_net(), []
    expected = torch.stack([network.head(network.backbone(view)) for view in views(sizes)])
    network.backbone.register_forward_pre_hook(lambda module, inputs: batches.append((len(inputs[0]), inputs[0].shape[-1])))
    heads = []
    network.head.register_forward_pre_hook(lambda module, inputs: heads.append(len(inputs[0])))
    actual = network(views(sizes))
    assert actual.shape == (len(sizes), 3, 16)
    assert_close(actual, expected)
    assert batches == runs and heads == [3 * len(sizes)]


def test_a_tensor_is_a_single_view():
    network, x = multi_crop_net(), images(3, 32, dtype=torch.float64)
    assert torch.equal(network(x), network([x]))
    assert network(x).shape == (1, 3, 16)


@pytest.mark.parametrize("batch", [[], [images(4, 32), images(12, 16)]], ids=["none", "other numbers"])
def test_views_of_other_images(batch):
    with pytest.raises(ValueError, match="views must be of the same images"):
        multi_crop_net()(batch)


def test_multi_crop_compiles_into_one_graph():
    network, batch = multi_crop_net(), views([32, 32, 16])
    network.backbone.blocks = network.backbone.blocks[:1]
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    assert_close(compiled(batch), network(batch))
