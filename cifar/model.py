"""Small-image ResNets with a projection head."""
import torch
from torch import Tensor, nn
from torchvision.models import ResNet, resnet18, resnet34, resnet50
from torchvision.models.resnet import BasicBlock


def small_resnet() -> ResNet:
    """ResNet-10 without its last stage, which at 2 x 2 pixels costs a CPU as much as all others: 1.2 M parameters."""
    net = ResNet(BasicBlock, [1, 1, 1, 1])
    net.layer4, net.fc = nn.Identity(), nn.Linear(256, 1)
    return net


def tiny_resnet() -> ResNet:
    """`small` at a quarter of its width, 0.08 M parameters: for studies that need many runs."""
    net = small_resnet()
    net.inplanes = 16
    net.bn1 = nn.BatchNorm2d(16)
    net.layer1, net.layer2, net.layer3 = (net._make_layer(BasicBlock, 16 * stride, 1, min(stride, 2)) for stride in (1, 2, 4))
    net.fc = nn.Linear(64, 1)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")  # as ResNet does for its own
    return net


# arch -> (constructor, stride of the 3x3 stem)
ARCHS = {"resnet18": (resnet18, 1), "resnet34": (resnet34, 1), "resnet50": (resnet50, 1), "small": (small_resnet, 2),
         "tiny": (tiny_resnet, 2)}


def build_backbone(arch: str) -> ResNet:
    """torchvision's ResNet `arch`, a key of ARCHS, with a 3x3 stem and no max-pool, as images of 32 x 32 pixels want:
    [B, 3, H, W] -> features [B, embed_dim]."""
    make, stride = ARCHS[arch]
    net = make()
    net.embed_dim = net.fc.in_features
    net.conv1 = nn.Conv2d(3, net.bn1.num_features, kernel_size=3, stride=stride, padding=1, bias=False)
    net.maxpool, net.fc = nn.Identity(), nn.Identity()
    return net


class ContrastiveNet(nn.Module):
    """A backbone, whose features are evaluated, and a projection head, whose output the loss sees.

    Args:
        arch: a key of ARCHS.
        projector: widths of the head's layers, (..., D); BN and ReLU between them.
    """

    def __init__(self, arch: str, projector: tuple[int, ...]):
        super().__init__()
        self.backbone = build_backbone(arch)
        width = self.backbone.embed_dim
        layers = []
        for hidden in projector[:-1]:
            layers += [nn.Linear(width, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True)]
            width = hidden
        self.head = nn.Sequential(*layers, nn.Linear(width, projector[-1]))

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> embeddings [B, D], not yet normalised."""
        return self.head(self.backbone(images))


@torch.inference_mode()
def extract_features(backbone: nn.Module, batches) -> Tensor:
    """Features [N, F] in float32 of an iterable of image batches [B, 3, H, W], with the network in evaluation mode."""
    training = backbone.training
    backbone.eval()
    features = torch.cat([backbone(images).float() for images in batches])
    backbone.train(training)
    return features
