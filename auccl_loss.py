"""The AUC-CL objective: contrastive learning as AUC maximisation (Sharma, Ji, Xu, Chen; ICLR 2024).

    from auccl_loss import AUCCLLoss
    criterion = AUCCLLoss()                                   # weights a, b and alpha are its parameters
    optimizer = torch.optim.AdamW([{"params": model.parameters()},
                                   *criterion.param_groups(lr=1e-3, adaptive=True)], lr=1e-3)
    loss = criterion(model(view0), model(view1))              # [n, D], [n, D] -> scalar
    loss.backward(); optimizer.step()                         # descends in model, a, b; ascends in alpha

A score is an affine map of the cosine of two embeddings, h = s cos + t. Positive pairs are two views of one image, negative
pairs two views of different images; E+ and E- are means over pairs, m the margin, nu and kappa weights of the negatives:

    min over network, a, b   max over alpha
    L = E+[(h - a)^2] + nu E-[(h - b)^2] + 2 alpha (m - E+[h] + kappa E-[h]) - alpha^2                                    (1)

At the saddle a = E+[h], b = E-[h], alpha = m - a + kappa b. With nu = kappa = 1, (1) there equals the mean of (m - h+ + h-)^2
over all couples of a positive and a negative pair: the square surrogate of the AUC (Ying, Wen, Lyu; NeurIPS 2016).

(1) needs only the first two moments of the cosine over pairs, and those are sums over images:

    sum_ij  q_i . k_j     = (sum_i q_i) . (sum_j k_j)
    sum_ij (q_i . k_j)^2  = < Q^T Q , K^T K >_F                                                                           (2)

so the exact objective over all pairs costs O(n D^2) time and O(D^2) memory, and over all pairs of all ranks one all-reduce
of a D-vector and a D x D matrix per branch: no n x n matrix, and no gathering of embeddings.
"""
import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

SCORES = {"cosine": (1.0, 0.0), "unit": (0.5, 0.5)}  # name -> (s, t) of the score h = s cos + t
WEIGHTS = ("a", "b", "alpha")


class PairMoments(NamedTuple):
    """Moments of the cosine over positive and over negative pairs, 0-dim tensors; `negatives` counts them per anchor."""

    positive_mean: Tensor
    positive_square: Tensor
    negative_mean: Tensor
    negative_square: Tensor
    negatives: Tensor


# ---------------------------------------------------------------------------------------------------- functions of tensors

def unit_rows(z: Tensor) -> Tensor:
    """Rows scaled to length 1, in float32 at least: [..., D] -> [..., D]. A zero row stays zero and gets zero gradient."""
    return _UnitRows.apply(_at_least_float32(z))[0]


def symmetric_moments(z0: Tensor, z1: Tensor, gather: bool = True, gram: bool | None = None) -> PairMoments:
    """Moments over all pairs of 2n views, gradient through both branches.

    Args:
        z0, z1: unit rows [n, D]; row i of both comes from image i. Anchors are all 2n views, an anchor's negatives the
            2n - 2 views of other images.
        gather: take the pairs over the images of all ranks (when a process group is up), not only of this one.
        gram: by D x D Gram matrices, equation (2), or by the 2n x 2n matrix of cosines; None takes the cheaper.
    """
    n, dim = z0.shape
    z = torch.cat([z0, z1])                                               # [2n, D]
    positives = (z0 * z1).sum(1)                                          # [n]
    # Ordered pairs within one image, each view with itself included. A unit row's square is constant: no gradient.
    squares = z.detach().square().sum(1)                                  # [2n], 1, or 0 for a zero row
    own = torch.stack([positives.sum(), positives.square().sum()])        # [2]
    within = 2 * own + torch.stack([squares.sum(), squares.square().sum()])

    if gram or _world_size(gather) > 1 or (gram is None and 2 * n > dim):
        count = z.new_full((), n)
        count, own, within, total, square = _sum_over_ranks(count, own, within, *_Sums.apply(z), gather=gather)
        pairs = torch.stack([total.square().sum(), square.square().sum()])
    else:
        count, cosines = z.new_full((), n), z @ z.T                       # [2n, 2n]
        pairs = torch.stack([cosines.sum(), cosines.square().sum()])

    negatives = 2 * count - 2
    return PairMoments(*(own / count), *((pairs - within) / (2 * count * negatives)), negatives)


def teacher_student_moments(teacher: Tensor, student: Tensor, gather: bool = True, gram: bool | None = None) -> PairMoments:
    """Moments over every couple of a teacher view u and a student view v != u; no gradient into the teacher.

    Args:
        teacher: rows [U, n, D] of the U global views. They need not be of unit length: `cos` is then the plain product.
        student: rows [V, n, D], V >= U, V > 1; student view u < U is the same view as teacher view u. In a couple, anchor
            t_u[i] has the positive s_v[i] and the n - 1 negatives s_v[j], j != i. All couples weigh the same.
        gather, gram: as in `symmetric_moments`.
    """
    (u, n, dim), v = teacher.shape, len(student)
    teacher = teacher.detach()
    other = 1 - torch.eye(u, v, dtype=teacher.dtype, device=teacher.device)            # [U, V]: 0 for the same view
    positives = torch.einsum("und,vnd->uvn", teacher, student) * other[..., None]      # [U, V, n]
    own = torch.stack([positives.sum(), positives.square().sum()])

    # Gram matrices cost (U + V) n D^2, matrices of cosines U V n^2 D.
    if gram or _world_size(gather) > 1 or (gram is None and u * v * n > (u + v) * dim):
        local = student[u:].reshape(-1, dim)                                           # the views that no teacher view is
        count, t_sum, t_gram = _sum_over_ranks(
            teacher.new_full((), n), teacher.sum(1), teacher.mT @ teacher, gather=gather)
        s_sum, s_gram = (torch.stack(x) for x in zip(*map(_Sums.apply, [*student[:u], local])))   # [U + 1, ...], last: local
        own, s_sum, s_gram = _sum_over_ranks(own, s_sum, s_gram, gather=gather)
        other = 1 - torch.eye(u, u + 1, dtype=teacher.dtype, device=teacher.device)
        pairs = torch.stack([(other * (t_sum @ s_sum.T)).sum(),
                             (other * (t_gram.flatten(1) @ s_gram.flatten(1).T)).sum()])
    else:
        count = teacher.new_full((), n)
        cosines = torch.einsum("uid,vjd->uvij", teacher, student) * other[..., None, None]
        pairs = torch.stack([cosines.sum(), cosines.square().sum()])

    anchors, negatives = u * (v - 1) * count, count - 1                                # anchors: over all couples
    return PairMoments(*(own / anchors), *((pairs - own) / (anchors * negatives)), negatives)


def auc_objective(moments: PairMoments, a, b, alpha, margin=1.0, negative_weight=1.0, margin_negative_weight=1.0,
                  score: str = "cosine") -> Tensor:
    """Equation (1) from the moments of the cosine; a 0-dim tensor. Weights are numbers or 0-dim tensors."""
    s, t = SCORES[score]
    h_positive, h_negative = s * moments.positive_mean + t, s * moments.negative_mean + t
    # E[(h - a)^2] with h - a = s cos + (t - a)
    positive_spread = s**2 * moments.positive_square + 2 * s * (t - a) * moments.positive_mean + (t - a)**2
    negative_spread = s**2 * moments.negative_square + 2 * s * (t - b) * moments.negative_mean + (t - b)**2
    violation = margin - h_positive + margin_negative_weight * h_negative
    return positive_spread + negative_weight * negative_spread + 2 * alpha * violation - alpha**2


@torch.no_grad()
def pair_auc(z0: Tensor, z1: Tensor, chunk: int = 256) -> float:
    """AUC of positive against negative cosines: the share of couples (positive pair, negative pair) in the right order.

    Exact over the n positive and 2n (2n - 2) negative pairs of two views [n, D], ties counted half; memory O(chunk n).
    """
    _check_views(z0, z1, 2)
    z = torch.cat([unit_rows(z0), unit_rows(z1)])
    n = len(z0)
    positives = (z[:n] * z[n:]).sum(1).sort().values
    ordered = 0                                                                        # twice the couples in order
    for start in range(0, 2 * n, chunk):
        cosines = z[start:start + chunk] @ z.T                                         # [chunk, 2n]
        image = torch.arange(start, start + len(cosines), device=z.device) % n
        negatives = cosines[image[:, None] != torch.arange(2 * n, device=z.device) % n]
        below = torch.searchsorted(positives, negatives, right=False) + torch.searchsorted(positives, negatives, right=True)
        ordered += 2 * n * negatives.numel() - below.sum().item()
    return ordered / (2 * n * 2 * n * (2 * n - 2))


class _UnitRows(torch.autograd.Function):
    """x -> x / |x| by rows, and |x|. The gradient, (g - z (z . g)) / |x|, takes four passes over memory where autograd takes a
    dozen. The norm, infinite for a zero row, is an output only so that second derivatives are right."""

    @staticmethod
    def forward(ctx, x):
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        norm = norm.masked_fill(norm < 1e-12, math.inf)
        z = x / norm
        ctx.save_for_backward(z, norm)
        return z, norm

    @staticmethod
    def backward(ctx, grad, grad_norm):
        z, norm = ctx.saved_tensors
        along = (z * grad).sum(-1, keepdim=True) / norm - grad_norm
        return torch.addcmul(grad / norm, z, along, value=-1)


class _Sums(torch.autograd.Function):
    """x [n, D] -> sum_i x_i [D] and X^T X [D, D]. The Gram matrix is symmetric, so its gradient is one product with x where
    autograd takes two, and the sum's gradient rides along in it."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sum(0), x.T @ x

    @staticmethod
    def backward(ctx, grad_sum, grad_gram):
        x, = ctx.saved_tensors
        return torch.addmm(grad_sum, x, grad_gram + grad_gram.T)


class _AllReduce(torch.autograd.Function):
    """The sum over ranks. Its gradient is a sum over ranks as well."""

    @staticmethod
    def forward(ctx, x):
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, grad):
        return _AllReduce.apply(grad)


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _world_size(gather: bool) -> int:
    return dist.get_world_size() if gather and dist.is_available() and dist.is_initialized() else 1


def _sum_over_ranks(*tensors: Tensor, gather: bool) -> list[Tensor]:
    """The tensors summed over ranks by one all-reduce. Its gradient is summed over ranks too: every rank holds the whole
    objective, so the mean over ranks that DDP takes of the network's gradients is the objective's own gradient."""
    if _world_size(gather) == 1:
        return list(tensors)
    flat = _AllReduce.apply(torch.cat([x.reshape(-1) for x in tensors]))
    return [part.view_as(x) for part, x in zip(flat.split([x.numel() for x in tensors]), tensors)]


def _mean_over_ranks(grad: Tensor) -> Tensor:
    mean, = _sum_over_ranks(grad, gather=True)
    return mean / _world_size(True)


def _check_views(first: Tensor, second: Tensor, dims: int, world: int = 1) -> None:
    names = "[n, D]" if dims == 2 else "[views, n, D]"
    for x in (first, second):
        if not x.is_floating_point():
            raise ValueError(f"embeddings must be floating point, got {x.dtype}")
        if x.dim() != dims:
            raise ValueError(f"embeddings must be {names}, got shape {list(x.shape)}")
    if first.shape[dims - 2:] != second.shape[dims - 2:]:
        raise ValueError(f"the branches' embeddings differ in shape: {list(first.shape)} and {list(second.shape)}")
    if first.shape[-2] * world < 2 or first.shape[-2] == 0:
        raise ValueError(f"negative pairs need at least two images, got {first.shape[-2]}")


# -------------------------------------------------------------------------------------------------------------- the module

class AUCCLLoss(nn.Module):
    """Equation (1) of this file as a module whose parameters are the primal weights a, b and the dual weight alpha.

    Args:
        a, b, alpha: initial values. a settles at the mean positive score, b at the mean negative one, alpha at the
            margin's violation m - a + kappa b.
        margin: m.
        negative_weight: nu, weight of the negatives' spread; a number, or "sum" for the number of negatives per anchor.
        margin_negative_weight: kappa, weight of the negatives in the margin term; likewise. Keep it at 1 for a student that
            faces a teacher: with kappa = nu > 1 and a learned, collapse to one negative cosine has loss 0.
        learn: which of a, b, alpha are learned; the others are held at their initial values.
        score: "cosine", h = cos, or "unit", h = (1 + cos) / 2.
        gather: negatives from all ranks when a process group is up; False keeps to this rank's.

    With nu and kappa independent of the batch, every minibatch gradient is an unbiased estimate of the population's, at any
    batch size: pair means are U-statistics. (Of a network in which an embedding depends on its own image alone; batch norm in
    training mode makes it depend on the batch, under every loss.) Embeddings are normalised inside; moments are float32 at
    least, also under autocast. ValueError for fewer than two images, mismatched shapes and non-floating input.
    """

    def __init__(self, a: float = 1.0, b: float = 0.0, alpha: float = 1.0, margin: float = 1.0,
                 negative_weight: float | str = 16.0, margin_negative_weight: float | str = 1.0,
                 learn: tuple[str, ...] = WEIGHTS, score: str = "cosine", gather: bool = True):
        super().__init__()
        if unknown := sorted(set(learn) - set(WEIGHTS)):
            raise ValueError(f"learn names {', '.join(unknown)}; it may hold {', '.join(WEIGHTS)}")
        if score not in SCORES:
            raise ValueError(f"unknown score {score!r}; choose from {', '.join(SCORES)}")
        for name, value in (("negative_weight", negative_weight), ("margin_negative_weight", margin_negative_weight)):
            if value != "sum" and (isinstance(value, str) or not 0 < value < math.inf):
                raise ValueError(f"{name} must be a positive number or 'sum', got {value!r}")
        if not all(map(math.isfinite, (a, b, alpha, margin))):
            raise ValueError(f"a, b, alpha and margin must be finite, got {a}, {b}, {alpha}, {margin}")
        for name, value in zip(WEIGHTS, (a, b, alpha)):
            setattr(self, name, nn.Parameter(torch.tensor(float(value)), requires_grad=name in learn))
            if name in learn and not gather:  # this rank's gradient: averaged, so that the weights stay equal on all ranks
                getattr(self, name).register_hook(_mean_over_ranks)
        self.margin, self.score, self.gather = float(margin), score, gather
        self.negative_weight, self.margin_negative_weight = negative_weight, margin_negative_weight
        self.means = None             # [2], detached: positive and negative mean score of the last call
        self._checked_equal = False   # a, b, alpha were compared over ranks

    @staticmethod
    def preset(name: str, **overrides) -> "AUCCLLoss":
        """The loss of a published setting: "paper", "released-cifar" or "released-imagenet"; ValueError for another name.

        `overrides` are arguments of the loss, e.g. `preset("paper", negative_weight=4)`.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; choose from {', '.join(PRESETS)}")
        return PRESETS[name](**overrides)

    def forward(self, z0: Tensor, z1: Tensor) -> Tensor:
        """Symmetric form. z0, z1: [n, D], two views of n images, gradient through both; returns a 0-dim tensor."""
        _check_views(z0, z1, 2, _world_size(self.gather))
        with torch.autocast(z0.device.type, enabled=False):
            return self._objective(symmetric_moments(unit_rows(z0), unit_rows(z1), self.gather))

    def teacher_student(self, teacher: Tensor, student: Tensor) -> Tensor:
        """Multi-crop form. teacher: [U, n, D] of the global views, without gradient; student: [V, n, D] of all views, of
        which the first U are the teacher's; returns a 0-dim tensor, the mean over couples of different views."""
        self._check_teacher_student(teacher, student)
        with torch.autocast(student.device.type, enabled=False):
            return self._objective(teacher_student_moments(unit_rows(teacher), unit_rows(student), self.gather))

    def param_groups(self, lr: float, adaptive: bool = False) -> list[dict]:
        """Optimiser groups of the learned weights: no weight decay, and `maximize=True` for alpha, which ascends.

        (1) has curvature 2 in a, 2 nu in b and -2 in alpha. A plain gradient step on b diverges above 1 / nu, so b's group
        gets lr / nu, and all three are stable for lr < 1, whatever nu. Pass `adaptive=True` for an optimiser whose step
        does not depend on the gradient's scale (Adam, LARS): b then keeps lr. With nu = "sum", known only with the batch,
        plain steps on b are refused (ValueError).
        """
        if not adaptive and self.b.requires_grad and self.negative_weight == "sum":
            raise ValueError("negative_weight='sum' has no fixed plain step for b: use Adam and param_groups(lr, adaptive=True), "
                             "or hold b")
        b_scale = 1.0 if adaptive or not self.b.requires_grad else 1.0 / max(1.0, self.negative_weight)
        steps = {"a": lr, "b": lr * b_scale, "alpha": lr}
        return [{"params": [weight], "lr": steps[name], "weight_decay": 0.0, "maximize": name == "alpha"}
                for name, weight in self.named_parameters() if weight.requires_grad]

    @property
    def stats(self) -> dict[str, float]:
        """Mean positive and negative score of the last call, and a, b, alpha as they stand; plain floats."""
        means = {} if self.means is None else dict(zip(("positive", "negative"), self.means.tolist()))
        return means | {name: getattr(self, name).item() for name in WEIGHTS}

    def extra_repr(self) -> str:
        learned = ", ".join(name for name in WEIGHTS if getattr(self, name).requires_grad)
        return (f"margin={self.margin}, negative_weight={self.negative_weight}, "
                f"margin_negative_weight={self.margin_negative_weight}, learn=({learned}), score={self.score}")

    def _objective(self, moments: PairMoments) -> Tensor:
        self._check_equal_over_ranks()
        self._remember(moments, *SCORES[self.score])
        nu, kappa = (moments.negatives if weight == "sum" else weight
                     for weight in (self.negative_weight, self.margin_negative_weight))
        return auc_objective(moments, self.a, self.b, self.alpha, self.margin, nu, kappa, self.score)

    def _remember(self, moments: PairMoments, s: float, t: float) -> None:
        self.means = s * torch.stack([moments.positive_mean, moments.negative_mean]).detach() + t

    def _check_teacher_student(self, teacher: Tensor, student: Tensor) -> None:
        _check_views(teacher, student, 3, _world_size(self.gather))
        if len(student) < max(2, len(teacher)) or len(teacher) == 0:
            raise ValueError(f"the student must see every teacher view and one more: got {len(teacher)} teacher views and "
                             f"{len(student)} student views")

    def _check_equal_over_ranks(self) -> None:
        """The gradients of a, b, alpha are global, so the weights stay equal on all ranks if they start equal."""
        if self._checked_equal or _world_size(True) == 1:
            return
        mine = torch.stack([getattr(self, name).detach() for name in WEIGHTS])
        low, high = mine.clone(), mine.clone()
        dist.all_reduce(low, dist.ReduceOp.MIN)
        dist.all_reduce(high, dist.ReduceOp.MAX)
        if not torch.equal(low, high):
            raise RuntimeError(f"a, b, alpha differ between ranks ({mine.tolist()} here): start them equal on all ranks")
        self._checked_equal = True


class ReleasedCIFARLoss(AUCCLLoss):
    """What the authors' released CIFAR code optimises, on 2n views z0, z1 with a = 10 and alpha = 1 held:

        mean over images ((p - a)^2 - 2 alpha p) + mean over anchors of sum_j ((h_j - b)^2 + 2 alpha h_j) - 2n

    with the positive score p = clamp(cos / 2, 0, 1), the negative score h = (1 + cos) / 2, and all other 2n - 1 views as an
    anchor's negatives, its positive among them. Symmetric form only. `b` is learned unless `learn=()`.
    """

    def __init__(self, a: float = 10.0, b: float = 0.0, alpha: float = 1.0, learn: tuple[str, ...] = ("b",),
                 gather: bool = True):
        if "alpha" in learn:
            raise ValueError("released-cifar is linear in alpha: it can only be held")
        super().__init__(a, b, alpha, negative_weight="sum", margin_negative_weight="sum", learn=learn, score="unit",
                         gather=gather)

    def forward(self, z0: Tensor, z1: Tensor) -> Tensor:
        _check_views(z0, z1, 2, _world_size(self.gather))
        with torch.autocast(z0.device.type, enabled=False):
            z0, z1 = unit_rows(z0), unit_rows(z1)
            moments = symmetric_moments(z0, z1, self.gather)
            self._check_equal_over_ranks()
            self._remember(moments, *SCORES["unit"])
            p = ((z0 * z1).sum(1) / 2).clamp(0, 1)                                     # [n]
            positive, = _sum_over_ranks(((p - self.a)**2 - 2 * self.alpha * p).sum(), gather=self.gather)
            images = (moments.negatives + 2) / 2                                       # over all ranks
            # sums over an anchor's other 2n - 1 views: its negatives and its positive
            cos_sum = moments.negatives * moments.negative_mean + moments.positive_mean
            square_sum = moments.negatives * moments.negative_square + moments.positive_square
            c = 0.5 - self.b                                                           # h - b = cos / 2 + c
            others = moments.negatives + 1
            spread = square_sum / 4 + c * cos_sum + others * c**2
            return positive / images + spread + self.alpha * (others + cos_sum) - 2 * images

    def teacher_student(self, teacher: Tensor, student: Tensor) -> Tensor:
        raise ValueError("released-cifar has no teacher/student form; use 'paper' or 'released-imagenet'")


class ReleasedImageNetLoss(AUCCLLoss):
    """What the authors' released ImageNet code optimises, with a = 10, b = 0, alpha = 1 held and no normalisation:

        mean_i ((h_ii - a)^2 - 2 alpha h_ii) + (32 / n) mean_i sum_{j != i} ((h_ij - b)^2 + 2 alpha h_ij) + 1

    per couple of a teacher view and another student view, then the mean over couples, on this rank's images alone. The
    score is h = (q . k + 1) / 2 with q = softmax((teacher - center) / teacher_temp), k = student / student_temp. Teacher
    /student form only. The center, an average of the teacher's output over batches and ranks that decays by 0.9 a call in
    training mode, is a buffer. `teacher_temp` is an attribute that a training loop may schedule.
    """

    def __init__(self, a: float = 10.0, b: float = 0.0, alpha: float = 1.0, learn: tuple[str, ...] = (),
                 teacher_temp: float = 0.04, student_temp: float = 0.1, center_momentum: float = 0.9):
        if "alpha" in learn:
            raise ValueError("released-imagenet is linear in alpha: it can only be held")
        super().__init__(a, b, alpha, negative_weight=32.0, learn=learn, score="unit", gather=False)
        self.teacher_temp, self.student_temp, self.center_momentum = teacher_temp, student_temp, center_momentum
        self.register_buffer("center", torch.zeros(1))  # [D] from the first call on

    def forward(self, z0: Tensor, z1: Tensor) -> Tensor:
        raise ValueError("released-imagenet has no symmetric form; use 'paper' or 'released-cifar'")

    def teacher_student(self, teacher: Tensor, student: Tensor) -> Tensor:
        self._check_teacher_student(teacher, student)
        with torch.autocast(student.device.type, enabled=False):
            teacher, student = _at_least_float32(teacher.detach()), _at_least_float32(student)
            q = ((teacher - self.center) / self.teacher_temp).softmax(-1)
            moments = teacher_student_moments(q, student / self.student_temp, gather=False)
            self._check_equal_over_ranks()
            self._remember(moments, *SCORES["unit"])
            if self.training:
                self._update_center(teacher)
            h_positive, h_negative = (moments.positive_mean + 1) / 2, (moments.negative_mean + 1) / 2
            h_positive_square = (moments.positive_square + 2 * moments.positive_mean + 1) / 4
            h_negative_square = (moments.negative_square + 2 * moments.negative_mean + 1) / 4
            positive = h_positive_square - 2 * (self.a + self.alpha) * h_positive + self.a**2
            negative = h_negative_square - 2 * (self.b - self.alpha) * h_negative + self.b**2
            n = teacher.shape[1]
            return positive + 32 * (n - 1) / n * negative + 1

    @torch.no_grad()
    def _update_center(self, teacher: Tensor) -> None:
        mean = _mean_over_ranks(teacher.mean((0, 1)))
        self.center = (self.center * self.center_momentum + mean * (1 - self.center_momentum)).to(self.center.dtype)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        if (saved := state_dict.get(prefix + "center")) is not None:
            self.center = self.center.new_zeros(saved.shape)  # its width is known only from the first batch or a checkpoint
        super()._load_from_state_dict(state_dict, prefix, *args)


PRESETS = {"paper": AUCCLLoss, "released-cifar": ReleasedCIFARLoss, "released-imagenet": ReleasedImageNetLoss}
