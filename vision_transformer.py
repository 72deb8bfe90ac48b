"""Backbones by name, projection heads, and the wrapper that runs a network on views of several resolutions.

    backbone = build_backbone("vit_small", patch_size=16)            # [B, 3, H, W] -> [B, backbone.embed_dim]
    network = MultiCropNet(backbone, ProjectionHead(backbone.embed_dim, out_dim=8192))
    embeddings = network([global0, global1, local0, ..., local7])    # 10 views of n images -> [10, n, 8192]

ViTs are timm's with DINO's interface, ResNets are torchvision's, "cifar/NAME" is a ResNet for small images,
and "timm/NAME" is any other model of timm. Nothing is downloaded.
"""
import math
from collections import OrderedDict
from contextlib import contextmanager, nullcontext
from itertools import groupby, pairwise

import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock

# arch -> (embed_dim, heads); all have 12 blocks
VIT_ARCHS = {"vit_tiny": (192, 3), "vit_small": (384, 6), "vit_base": (768, 12)}
RESNET_ARCHS = torchvision.models.list_models(include=["resnet*", "resnext*", "wide_resnet*"])
CIFAR_ARCHS = [f"cifar/{name}" for name in ("resnet18", "resnet34", "resnet50", "small", "tiny")]


def build_backbone(arch: str, patch_size: int = 16, image_size: int = 224,
                   drop_path_rate: float = 0.0) -> nn.Module:
    """The backbone `arch` with random weights: images [B, 3, H, W] -> features [B, embed_dim].

    Every backbone has the attribute `embed_dim` and the method `set_grad_checkpointing(enable=True)`, which
    trades a second forward pass for the memory of activations. In models of timm other than ours both passes
    then update the running statistics of batch norm.

    Args:
        arch: in VIT_ARCHS, RESNET_ARCHS or CIFAR_ARCHS, or "timm/NAME" for any NAME of timm.list_models().
        patch_size, image_size, drop_path_rate: see VisionTransformer; other backbones ignore them, but timm's
            ViTs learn position embeddings for image_size.

    Raises ValueError for an unknown arch, or a patch size that does not divide the image size.
    """
    library, _, name = arch.partition("/")
    if arch in VIT_ARCHS:
        return VisionTransformer(*VIT_ARCHS[arch], patch_size, image_size, drop_path_rate)
    if arch in RESNET_ARCHS:
        return ResNet(torchvision.models.get_model(arch))
    if arch in CIFAR_ARCHS:
        return ResNet(_small_image_resnet(name))
    if library == "timm" and timm.is_model(name):
        try:
            backbone = timm.create_model(name, num_classes=0, img_size=image_size, dynamic_img_size=True)
        except TypeError:  # not a transformer of one input size
            backbone = timm.create_model(name, num_classes=0)
        backbone.embed_dim = backbone.head_hidden_size  # num_features leaves out MobileNetV3's last layer
        return backbone
    known = ", ".join([*VIT_ARCHS, *RESNET_ARCHS, *CIFAR_ARCHS])
    raise ValueError(f"unknown arch {arch!r}; choose from {known}, or timm/NAME")


class VisionTransformer(timm.models.VisionTransformer):
    """timm's ViT (Dosovitskiy et al., 2021): images [B, 3, H, W] -> class token [B, embed_dim].

    State-dict keys are timm's and DINO's. H and W may be any multiples of the patch size: timm interpolates
    the position embeddings (bicubic, antialiased; DINO does not antialias, so its features differ a little).

    Args:
        patch_size, image_size: pixels; one position embedding for each patch of image_size x image_size.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 in the first.

    Raises ValueError for an image size that is no multiple of the patch size.
    """

    def __init__(self, embed_dim: int, num_heads: int, patch_size: int = 16, image_size: int = 224,
                 drop_path_rate: float = 0.0):
        if patch_size < 1 or image_size < 1 or image_size % patch_size:
            raise ValueError(f"image size {image_size} is no multiple of the patch size {patch_size}")
        super().__init__(img_size=image_size, patch_size=patch_size, embed_dim=embed_dim, num_heads=num_heads,
                         num_classes=0, drop_path_rate=drop_path_rate, dynamic_img_size=True)


class ResNet(nn.Sequential):
    """torchvision's ResNet up to its pooling: images [B, 3, H, W] -> features [B, embed_dim].

    State-dict keys are torchvision's without those of the classifier, fc. With grad checkpointing the
    residual blocks run again in the backward pass, but batch norm updates its running statistics only once.
    """

    def __init__(self, network: torchvision.models.ResNet):
        layers = dict(network.named_children())
        fc = layers.pop("fc")
        super().__init__(OrderedDict(layers, flatten=nn.Flatten()))
        self.embed_dim, self.grad_checkpointing = fc.in_features, False

    def set_grad_checkpointing(self, enable: bool = True):
        self.grad_checkpointing = enable

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            if self.grad_checkpointing and isinstance(layer, nn.Sequential):  # a stage of residual blocks
                for block in layer:
                    contexts = nullcontext(), _buffers_kept(block)  # forward pass, recomputation
                    x = checkpoint(block, x, use_reentrant=False, context_fn=lambda: contexts)
            else:
                x = layer(x)
        return x


@contextmanager
def _buffers_kept(module: nn.Module):
    """Discards what the module writes to its buffers."""
    buffers = [(owner, *named) for owner in module.modules() for named in owner.named_buffers(recurse=False)]
    for owner, name, buffer in buffers:
        setattr(owner, name, buffer.clone())
    try:
        yield
    finally:
        for owner, name, buffer in buffers:
            setattr(owner, name, buffer)


def _small_image_resnet(name: str) -> torchvision.models.ResNet:
    """A ResNet for images of 32 x 32 pixels: a 3x3 stem and no max-pool.

    `small` is ResNet-10 without its last stage, 1.2 M parameters, `tiny` a quarter as wide, 0.08 M. Both have
    a stem of stride 2.
    """
    stride = 2 if name in ("small", "tiny") else 1
    if stride == 1:
        network = torchvision.models.get_model(name)
    else:
        network = torchvision.models.ResNet(BasicBlock, [1, 1, 1, 1])
        network.layer4, network.fc = nn.Identity(), nn.Linear(256, 1)
    if name == "tiny":
        network.inplanes = 16
        network.bn1 = nn.BatchNorm2d(16)
        network.layer1 = network._make_layer(BasicBlock, 16, 1)
        network.layer2 = network._make_layer(BasicBlock, 32, 1, stride=2)
        network.layer3 = network._make_layer(BasicBlock, 64, 1, stride=2)
        network.fc = nn.Linear(64, 1)
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")  # as ResNet does
    network.conv1 = nn.Conv2d(3, network.bn1.num_features, 3, stride, padding=1, bias=False)
    network.maxpool = nn.Identity()
    for module in network.layer4.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            module.__class__ = SideBySideConv2d  # the same parameters
    return network


class SideBySideConv2d(nn.Conv2d):
    """A 3x3 convolution that lays small images side by side, zeros between them, in bfloat16 on CPUs.

    The results are the same up to rounding. For outputs up to 4 pixels wide oneDNN takes up to four times as
    long without, above all for the weights' gradient. [B, in, H, W] -> [B, out, H / stride, W / stride].
    """

    def forward(self, x: Tensor) -> Tensor:
        stride, width = self.stride[1], x.shape[3]
        if x.dtype != torch.bfloat16 or x.device.type != "cpu" or width > 4 * stride:
            return super().forward(x)
        n = math.gcd(len(x), 64)                                # images in a row, then W' pixels each
        x = F.pad(x, (0, stride + width % stride)).unflatten(0, (-1, n))
        x = x.permute(0, 3, 1, 4, 2).flatten(2, 3)              # [B / n, H, n W', in]
        x = super().forward(x.permute(0, 3, 1, 2))              # [B / n, out, H / stride, n W' / stride]
        x = x.unflatten(3, (n, -1))[..., :-1]
        return x.permute(0, 3, 2, 4, 1).flatten(0, 1).permute(0, 3, 1, 2)


class ProjectionHead(nn.Module):
    """DINO's head (Caron et al., 2021), MLP, L2 normalisation, linear layer: [B, in_dim] -> [B, out_dim].

    The rows of `last_layer`'s weight are g v / |v|, g = 1 at first; torch's parametrisation, which an EMA
    teacher can deepcopy, calls g original0 and v original1 (DINO: weight_g and weight_v).

    Args:
        hidden_dim, bottleneck_dim, layers: of the MLP, with GELU between its layers.
        use_bn: batch norm before each GELU.
        norm_last_layer: hold g at 1, which steadies training.
    """

    def __init__(self, in_dim: int, out_dim: int, hidden_dim: int = 2048, bottleneck_dim: int = 256,
                 layers: int = 3, use_bn: bool = False, norm_last_layer: bool = True):
        super().__init__()
        widths = [in_dim] + [hidden_dim] * (layers - 1)
        modules = []
        for before, after in pairwise(widths):
            modules += [nn.Linear(before, after), *([nn.BatchNorm1d(after)] if use_bn else []), nn.GELU()]
        self.mlp = nn.Sequential(*modules, nn.Linear(widths[-1], bottleneck_dim))
        for module in self.mlp:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.last_layer = weight_norm(nn.Linear(bottleneck_dim, out_dim, bias=False))
        g = self.last_layer.parametrizations.weight.original0
        nn.init.ones_(g)
        g.requires_grad_(not norm_last_layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(nn.functional.normalize(self.mlp(x), dim=-1))


def mlp_head(in_dim: int, widths: tuple[int, ...]) -> nn.Sequential:
    """An MLP with BN and ReLU between its layers: [B, in_dim] -> [B, widths[-1]]."""
    *hidden, (width, out_dim) = pairwise([in_dim, *widths])
    layers = []
    for before, after in hidden:
        layers += [nn.Linear(before, after, bias=False), nn.BatchNorm1d(after), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(width, out_dim))


class MultiCropNet(nn.Module):
    """A backbone and a projection head for views of several resolutions (multi-crop, Caron et al., 2020)."""

    def __init__(self, backbone: nn.Module, head: nn.Module):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, views: Tensor | list[Tensor]) -> Tensor:
        """V views [n, 3, H, W] of the same n images -> embeddings [V, n, D]. A tensor is one view: V = 1.

        Neighbours of one resolution go through the backbone as one batch, then all features through the head.
        """
        if isinstance(views, Tensor):
            views = [views]
        batches = [torch.cat([*group]) for _, group in groupby(views, key=lambda view: view.shape[2:])]
        features = torch.cat([self.backbone(batch) for batch in batches])  # [V * n, embed_dim]
        return self.head(features).unflatten(0, (len(views), -1))
