"""The losses that the benchmarks hold against AUC-CL: lightly's, by the name of their class, and those in OURS.

Another loss is a class in OURS with forward(z0, z1), `param_groups(lr)` and, after a call, `means` (see Peer).
"""
import torch
from torch import Tensor, nn

import utils
from auccl_loss import SCORES, AUCCLLoss, unit_rows


def build_loss(name: str, **options) -> nn.Module:
    """The loss `name` of OURS or of lightly.loss, called with two views [n, D]. UserError without lightly."""
    if name in OURS:
        return OURS[name](**options)
    try:
        from lightly import loss
    except ImportError as error:
        raise utils.UserError(f"{name} is a loss of the package lightly, which is missing: pip install lightly") from error
    return Peer(getattr(loss, name)(**options))


class Peer(nn.Module):
    """Another loss in AUCCLLoss's place: in float32 under autocast too, and with the means that a record holds."""

    def __init__(self, loss: nn.Module):
        super().__init__()
        self.loss = loss

    def forward(self, z0: Tensor, z1: Tensor) -> Tensor:
        with torch.autocast(z0.device.type, enabled=False):
            z0, z1 = z0.float(), z1.float()
            self.means = mean_cosines(z0.detach(), z1.detach())
            return self.loss(z0, z1)

    def param_groups(self, lr: float) -> list[dict]:
        return []


def mean_cosines(z0: Tensor, z1: Tensor) -> Tensor:
    """[n, D], [n, D] -> [2], the mean cosine of positive pairs and of negative pairs."""
    n, z0, z1 = len(z0), unit_rows(z0), unit_rows(z1)
    positive = (z0 * z1).sum()
    pairs = (z0 + z1).sum(0).square().sum()     # all ordered pairs of views, each with itself included
    return torch.stack([positive / n, (pairs - 2 * n - 2 * positive) / (2 * n * (2 * n - 2))])


class ClosedForm(AUCCLLoss):
    """AUC-CL with a, b and alpha at each batch's saddle instead of learned. Its minibatch gradient is biased."""

    def __init__(self, **options):
        super().__init__(learn=(), **options)

    def _objective(self, moments):
        s, t = SCORES[self.score]
        kappa = moments.negatives if self.margin_negative_weight == "sum" else self.margin_negative_weight
        with torch.no_grad():
            self.a.copy_(s * moments.positive_mean + t)
            self.b.copy_(s * moments.negative_mean + t)
            self.alpha.copy_(self.margin - self.a + kappa * self.b)
        return super()._objective(moments)


OURS = {"ClosedForm": ClosedForm}
