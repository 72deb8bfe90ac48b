"""The losses beside AUC-CL in the benchmarks: lightly's by the name of their class, and those in OURS.

To add one, put a class in OURS that has what Peer has: forward(*views), param_groups(lr), and means after a
call.
"""
from functools import partial

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

    def forward(self, *views: Tensor) -> Tensor:
        """[n, D], [n, D] -> scalar; `means` [2]: mean cosine of positive and of negative pairs."""
        if len(views) != 2:
            raise utils.UserError(f"lightly's losses take two views, got {len(views)}; leave --views out")
        z0, z1 = views
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


class PerAnchor(AUCCLLoss):
    """AUC-CL that weighs the negatives' spread of anchor z by 1 / (z . C z), mean 1: as in a softmax, every
    anchor is measured by its own negatives. C is the Gram matrix of earlier batches, a moving average."""

    def __init__(self, dim: int, decay: float = 0.9, **options):
        super().__init__(**options)
        self.register_buffer("gram", torch.zeros(dim, dim))
        self.decay = decay

    def forward(self, *views: Tensor) -> Tensor:
        with torch.autocast(views[0].device.type, enabled=False):
            z = torch.cat([unit_rows(view) for view in views])              # [V n, D]
            same_image = torch.eye(len(views[0]), dtype=torch.bool, device=z.device)
            negative = ~same_image.repeat(len(views), len(views))           # [V n, V n]
            with torch.no_grad():
                weights = 1 / ((z @ self.gram) * z).sum(1).clamp(min=1e-6)  # [V n]; equal on the first batch
                weights = weights / weights.mean()
                self.gram.lerp_(z.T @ z / len(z), 1 - self.decay)
            spread = ((z @ z.T - self.b.detach()).square() * negative).sum(1) / negative.sum(1)
        return super().forward(*views) + self.negative_weight * ((weights - 1) * spread).mean()


OURS = {"ClosedForm": ClosedForm, "PerAnchor": PerAnchor, "Hard": partial(AUCCLLoss.preset, "hard"),
        "FourthMoment": lambda weight, **options: AUCCLLoss(fourth_moment=weight, **options)}
