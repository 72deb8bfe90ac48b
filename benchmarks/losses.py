"""The losses beside AUC-CL in the benchmarks: lightly's by the name of their class, and those in OURS.

To add one, put a class in OURS that has what Peer has: forward(z0, z1), param_groups(lr), and means after a
call.
"""
import torch
from torch import Tensor, nn

import utils
from auccl_loss import SCORES, AUCCLLoss, unit_rows


def build_loss(name: str, **options) -> nn.Module:
    """The loss `name` of OURS or of lightly.loss. UserError without lightly."""
    if name in OURS:
        return OURS[name](**options)
    try:
        from lightly import loss
    except ImportError as error:
        raise utils.UserError(f"{name} needs the package lightly: pip install lightly") from error
    return Peer(getattr(loss, name)(**options))


class Peer(nn.Module):
    """A foreign loss of two views in AUCCLLoss's place, in float32 under autocast too."""

    def __init__(self, loss: nn.Module):
        super().__init__()
        self.loss = loss

    def forward(self, z0: Tensor, z1: Tensor) -> Tensor:
        """[n, D], [n, D] -> scalar; `means` [2]: mean cosine of positive and of negative pairs."""
        with torch.autocast(z0.device.type, enabled=False):
            z0, z1 = z0.float(), z1.float()
            n, u0, u1 = len(z0), unit_rows(z0.detach()), unit_rows(z1.detach())
            positive = (u0 * u1).sum()
            pairs = (u0 + u1).sum(0).square().sum()     # over all ordered pairs of views
            self.means = torch.stack([positive / n, (pairs - 2 * n - 2 * positive) / (2 * n * (2 * n - 2))])
            return self.loss(z0, z1)

    def param_groups(self, lr: float) -> list[dict]:
        return []


class ClosedForm(AUCCLLoss):
    """AUC-CL with a, b, alpha at each batch's saddle, not learned. Its minibatch gradient is biased."""

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
