"""Backbones by name, the projection head, and the wrapper that runs a network on views of several resolutions.

    backbone = build_backbone("vit_small", patch_size=16)                       # [B, 3, H, W] -> [B, backbone.embed_dim]
    network = MultiCropNet(backbone, ProjectionHead(backbone.embed_dim, out_dim=8192))
    embeddings = network([global0, global1, local0, ..., local7])               # 10 views of n images -> [10, n, 8192]

ViTs are timm's with DINO's interface, ResNets are torchvision's, and "timm/NAME" is any other model of timm. Nothing is downloaded.
"""
import difflib
from collections import OrderedDict
from contextlib import contextmanager, nullcontext
from itertools import groupby, pairwise

import timm
import torch
import torchvision
from timm.layers import PatchEmbed
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

# arch -> (embed_dim, heads); all have 12 blocks
VIT_ARCHS = {"vit_tiny": (192, 3), "vit_small": (384, 6), "vit_base": (768, 12)}
RESNET_ARCHS = torchvision.models.list_models(torchvision.models, include=["resnet*", "resnext*", "wide_resnet*"])


def build_backbone(arch: str, patch_size: int = 16, image_size: int = 224, drop_path_rate: float = 0.0) -> nn.Module:
    """The backbone `arch` with random weights: images [B, 3, H, W] -> features [B, embed_dim].

    Every backbone has the attribute `embed_dim` and the method `set_grad_checkpointing(enable=True)`, which trades a second forward
    for the memory of activations. Models of timm other than ours then update the running statistics of batch norm in both.

    Args:
        arch: a key of VIT_ARCHS, one of RESNET_ARCHS, or "timm/NAME" for any NAME of timm.list_models().
        patch_size, image_size, drop_path_rate: see VisionTransformer; other backbones have no use for them, but that timm's ViTs
            learn position embeddings for image_size.

    Raises ValueError for an unknown arch, or a patch size that does not divide the image size.
    """
    if arch in VIT_ARCHS:
        embed_dim, num_heads = VIT_ARCHS[arch]
        return VisionTransformer(embed_dim, num_heads, patch_size, image_size, drop_path_rate)
    if arch in RESNET_ARCHS:
        return ResNet(arch)
    library, _, name = arch.partition("/")
    if library == "timm" and timm.is_model(name):
        try:
            backbone = timm.create_model(name, pretrained=False, num_classes=0, img_size=image_size, dynamic_img_size=True)
        except TypeError:                                       # not a transformer of one input size
            backbone = timm.create_model(name, pretrained=False, num_classes=0)
        backbone.embed_dim = backbone.head_hidden_size      # not num_features: MobileNetV3, for one, has a layer behind the pooling
        return backbone
    ours = [*VIT_ARCHS, *RESNET_ARCHS]
    near = difflib.get_close_matches(arch, ours + [f"timm/{name}" for name in timm.list_models()], n=3)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise ValueError(f"unknown arch {arch!r}: {hint}Choose from {', '.join(ours)}, or timm/NAME for a model of timm")


class VisionTransformer(timm.models.VisionTransformer):
    """timm's ViT (Dosovitskiy et al., 2021) with DINO's interface: images [B, 3, H, W] -> normed class token [B, embed_dim].

    State-dict keys are timm's and DINO's. H and W may be any multiples of the patch size: position embeddings are interpolated by
    timm (bicubic, antialiased; DINO's own code does not antialias, so its features of other sizes differ a little).

    Args:
        embed_dim, num_heads: width of the tokens, and number of attention heads in each of the 12 blocks.
        patch_size, image_size: pixels; one position embedding is learned for each patch of image_size x image_size.
        drop_path_rate: probability of skipping a residual branch of an image in training (stochastic depth, Huang et al., 2016) in
            the last block; it rises linearly from 0 in the first.

    Raises ValueError for sizes that are no multiples of the patch size.
    """

    def __init__(self, embed_dim: int, num_heads: int, patch_size: int = 16, image_size: int = 224, drop_path_rate: float = 0.0):
        if patch_size < 1 or image_size < 1 or image_size % patch_size:
            raise ValueError(f"image size {image_size} is no multiple of the patch size {patch_size}")
        super().__init__(img_size=image_size, patch_size=patch_size, embed_dim=embed_dim, num_heads=num_heads, num_classes=0,
                         drop_path_rate=drop_path_rate, dynamic_img_size=True, embed_layer=_PatchEmbed)

    def get_intermediate_layers(self, x: Tensor, n: int = 1) -> list[Tensor]:
        """Outputs of the last n blocks, each through the final norm, class token first: n of [B, 1 + patches, embed_dim]."""
        if not 1 <= n <= len(self.blocks):
            raise ValueError(f"n must be 1 to {len(self.blocks)} blocks, got {n}")
        x = self._pos_embed(self.patch_embed(x))
        outputs = []
        for block in self.blocks:
            x = block(x)
            outputs.append(x)
        return [self.norm(x) for x in outputs[-n:]]

    def get_last_selfattention(self, x: Tensor) -> Tensor:
        """Attention of the last block, rows (queries) that sum to 1: [B, heads, 1 + patches, 1 + patches].

        From the projected queries and keys, because the fused attention of the forward never holds the matrix.
        """
        *blocks, last = self.blocks
        x = self._pos_embed(self.patch_embed(x))
        for block in blocks:
            x = block(x)
        qkv = last.attn.qkv(last.norm1(x))                                                      # [B, N, 3 * heads * d]
        q, k, _ = qkv.unflatten(2, (3, last.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)         # [B, heads, N, d] each
        return (q * last.attn.scale @ k.mT).softmax(-1)


class _PatchEmbed(PatchEmbed):
    """timm's, with an error of one line where it has an assertion."""

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        if height % self.patch_size[0] or width % self.patch_size[1]:
            raise ValueError(f"image sides must be multiples of the patch size {self.patch_size[0]}, got {height} x {width} pixels")
        return super().forward(x)


class ResNet(nn.Sequential):
    """torchvision's ResNet `arch` up to its pooling: images [B, 3, H, W] -> features [B, embed_dim].

    State-dict keys are torchvision's without those of the classifier, fc. Under set_grad_checkpointing() the residual blocks run
    again in the backward pass, but batch norm moves its running statistics only once.
    """

    def __init__(self, arch: str):
        layers = OrderedDict(torchvision.models.get_model(arch, weights=None).named_children())
        embed_dim = layers.pop("fc").in_features
        super().__init__(OrderedDict(layers, flatten=nn.Flatten()))
        self.embed_dim = embed_dim
        self.grad_checkpointing = False

    def set_grad_checkpointing(self, enable: bool = True):
        self.grad_checkpointing = enable

    def forward(self, x: Tensor) -> Tensor:
        if not self.grad_checkpointing:
            return super().forward(x)
        for layer in self:
            if isinstance(layer, nn.Sequential):            # a stage of residual blocks
                for block in layer:
                    recompute = _buffers_kept(block)
                    x = checkpoint(block, x, use_reentrant=False, context_fn=lambda: (nullcontext(), recompute))
            else:
                x = layer(x)
        return x


@contextmanager
def _buffers_kept(module: nn.Module):
    """What the module writes to its buffers goes to copies, and is lost."""
    buffers = [(owner, name, buffer) for owner in module.modules() for name, buffer in owner.named_buffers(recurse=False)]
    for owner, name, buffer in buffers:
        setattr(owner, name, buffer.clone())
    try:
        yield
    finally:
        for owner, name, buffer in buffers:
            setattr(owner, name, buffer)


class ProjectionHead(nn.Module):
    """DINO's head (Caron et al., 2021): features [B, in_dim] -> MLP -> L2-normalised bottleneck -> linear -> [B, out_dim].

    The rows of `last_layer`'s weight are g v / |v| with g = 1. It is torch's parametrisation, because an EMA teacher needs one that
    can be deepcopied. So its keys are last_layer.parametrizations.weight.original0 (g, [out_dim, 1]) and .original1 (v), where DINO
    has last_layer.weight_g and .weight_v; DINO's tools read nothing but the backbone.

    Args:
        hidden_dim, bottleneck_dim, layers: of the MLP, GELU between its layers; a single layer goes straight to the bottleneck.
        use_bn: batch norm before each GELU.
        norm_last_layer: hold g at 1, which steadies training.
    """

    def __init__(self, in_dim: int, out_dim: int, hidden_dim: int = 2048, bottleneck_dim: int = 256, layers: int = 3,
                 use_bn: bool = False, norm_last_layer: bool = True):
        super().__init__()
        if layers < 1:
            raise ValueError(f"the projection head needs at least one layer, got {layers}")
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


class MultiCropNet(nn.Module):
    """A backbone and a projection head for views of several resolutions (multi-crop, Caron et al., 2020)."""

    def __init__(self, backbone: nn.Module, head: nn.Module):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, views: Tensor | list[Tensor]) -> Tensor:
        """V views [n, 3, H, W] of the same n images -> embeddings [V, n, D], in the order given. A tensor is a single view: V = 1.

        Neighbours in the list of the same resolution go through the backbone together, all features through the head together:
        these are the batches of batch norm. Raises ValueError for no views, or views of different numbers of images.
        """
        if isinstance(views, Tensor):
            views = [views]
        if len({len(view) for view in views}) != 1:
            raise ValueError(f"views must be of the same images, got batches of {[len(view) for view in views]}")
        features = [self.backbone(torch.cat(list(same))) for _, same in groupby(views, key=lambda view: view.shape[2:])]
        return self.head(torch.cat(features)).unflatten(0, (len(views), -1))
