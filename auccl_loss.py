"""The AUC-CL objective: contrastive learning as AUC maximisation (Sharma, Ji, Xu, Chen; ICLR 2024).

    from auccl_loss import AUCCLLoss
    criterion = AUCCLLoss()                                   # the weights a, b and alpha are its parameters
    optimizer = torch.optim.AdamW([{"params": model.parameters()}, *criterion.param_groups(lr=1e-3)], lr=1e-3)
    loss = criterion(model(view0), model(view1))              # [n, D], [n, D], ... -> scalar
    loss.backward(); optimizer.step()                         # model, a and b descend, alpha ascends

A score is an affine map of the cosine of two embeddings, h = s cos + t. Positive pairs are two views of one
image, negative pairs views of two images. E+ and E- are means over pairs, m is the margin, nu and kappa are
weights of the negatives:

    min over network, a, b   max over alpha
    L = E+[(h - a)^2] + nu E-[(h - b)^2] + 2 alpha (m - E+[h] + kappa E-[h]) - alpha^2                (1)

At the saddle a = E+[h], b = E-[h], alpha = m - a + kappa b. With nu = kappa = 1, (1) is there the mean of
(m - h+ + h-)^2 over all couples of a positive and a negative pair: the square surrogate of the AUC (Ying,
Wen, Lyu; NeurIPS 2016). (1) needs the first two moments of the cosine over pairs, which are sums over images:

    sum_ij  q_i . k_j     = (sum_i q_i) . (sum_j k_j)
    sum_ij (q_i . k_j)^2  = < Q^T Q , K^T K >_F

So the objective over all pairs costs O(n D^2) time and O(D^2) memory without an n x n matrix, and one
all-reduce over ranks. The matrix of cosines is taken instead where it is cheaper: in one process where D
exceeds the number of views; over R ranks, from embeddings gathered from all, where D exceeds max(512, 16 R).
Every rank computes the whole objective; the mean of gradients over ranks, as of DistributedDataParallel, is
its exact gradient.

With a temperature T, the margin term faces the hardest negatives (partial AUC) instead of their mean E-[h]:

    T log E-[exp(h / T)] = max over q of E_q[h] - T KL(q || negatives)
                         = min over u of T (E-[exp(h / T - u)] + u - 1)                               (2)

The last form stands in L, with u from earlier batches: it is a mean over pairs, so that minibatch gradients
stay unbiased; the log of a batch's mean is biased. T to infinity is (1).

Another way is to add a fourth moment, with a weight rho, which large cosines of either sign dominate. It too
is a mean over pairs, and it leaves the saddle of a, b and alpha where it is in (1):

    L + rho E-[cos^4]                                                                                 (3)

Both need the matrix of cosines, but any part of the pairs will do: those of this rank, and in large batches
those within blocks.
"""
import itertools
import math
import warnings
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from released_losses import released_cifar, released_imagenet

SCORES = {"cosine": (1.0, 0.0), "unit": (0.5, 0.5)}  # name -> (s, t) of the score h = s cos + t
WEIGHTS = ("a", "b", "alpha")
GRAM_WIDTH, GRAM_WIDTH_PER_RANK = 512, 16  # up to this D ranks exchange Gram matrices, beyond it rows
BLOCK = 1024      # views within which (2) and (3) take their pairs
DECAY = 0.9       # of the moving average u, per call
MAX_EXCESS = 10   # of a batch's log-mean-exp over u; beyond it u jumps, lest exp(h / T - u) overflow


class PairMoments(NamedTuple):
    """Moments of the cosine over positive and negative pairs; `negatives` counts those per anchor. `hardest`
    is (2) for the score; without it the margin term takes the negatives' mean. `fourth` is E-[cos^4],
    whatever the score."""

    positive_mean: Tensor
    positive_square: Tensor
    negative_mean: Tensor
    negative_square: Tensor
    negatives: int | Tensor
    hardest: Tensor | None = None
    fourth: Tensor | None = None

    def of_score(self, score: str) -> "PairMoments":
        """The moments of the score h = s cos + t."""
        s, t = SCORES[score]
        if (s, t) == (1, 0):
            return self
        means = s * self.positive_mean + t, s * self.negative_mean + t
        squares = [s**2 * square + 2 * s * t * mean + t**2 for mean, square in (self[:2], self[2:4])]
        return PairMoments(means[0], squares[0], means[1], squares[1], *self[4:])


@contextmanager
def exact_products():
    """float32 products without CUDA's TF32, which has 10 bits of mantissa and which training may have turned
    on: moments are small differences of large sums."""
    matmul, name, off = torch.backends.cuda.matmul, "fp32_precision", "ieee"
    if not hasattr(matmul, name):  # torch < 2.9
        name, off = "allow_tf32", False
    before = getattr(matmul, name)
    setattr(matmul, name, off)
    try:
        yield
    finally:
        setattr(matmul, name, before)


# -------------------------------------------------------------------------------------- functions of tensors

def unit_rows(z: Tensor) -> Tensor:
    """Rows scaled to length 1, in float32 at least, [..., D]. A zero row stays zero, without gradient."""
    return _UnitRows.apply(_at_least_float32(z))[0]


def symmetric_moments(*views: Tensor, gather: bool = True, gram: bool | None = None) -> PairMoments:
    """Moments over all pairs of V n views, gradient through all.

    Args:
        views: V >= 2 times unit rows [n, D]; row i of each comes from image i. An image has V (V - 1) / 2
            positives. Anchors are all V n views, an anchor's negatives the V (n - 1) views of other images.
        gather: take the pairs over the images of all ranks (when a process group is up), not of this one.
        gram: by D x D Gram matrices, or by matrices of cosines; None takes the cheaper, over ranks what is
            cheaper for most batches.
    """
    n, v, z = len(views[0]), len(views), torch.cat(views)  # z: [V n, D]
    positives = torch.cat([(x * y).sum(1) for x, y in itertools.combinations(views, 2)])
    positive_sums = torch.stack([positives.sum(), positives @ positives])  # [2]
    if _takes_gram(*z.shape, gather, gram):
        count, positive_sums, total, square = _sum_over_ranks(n, positive_sums, *_Sums.apply(z),
                                                              gather=gather)
        pairs = torch.stack([total @ total, square.flatten() @ square.flatten()])
        selves = square.detach().trace()  # sum of |z_i|^2
    else:
        cosines = _Products.apply(z, _gather_rows(z, gather))  # [V n, V count]
        pairs = torch.stack([cosines.sum(), cosines.square().sum()])
        selves = z.detach().square().sum()
        count, positive_sums, pairs, selves = _sum_over_ranks(n, positive_sums, pairs, selves, gather=gather)
    # Ordered pairs within one image: its positives twice, and each view with itself: 1, or 0 for a zero row.
    within = 2 * positive_sums + selves
    couples, negatives = count * (v * (v - 1) // 2), v * count - v
    return PairMoments(*(positive_sums / couples), *((pairs - within) / (v * count * negatives)), negatives)


def teacher_student_moments(teacher: Tensor, student: Tensor, gather: bool = True,
                            gram: bool | None = None) -> PairMoments:
    """Moments over every couple of a teacher view u and a student view v != u; no gradient into the teacher.

    Args:
        teacher: unit rows [U, n, D] of the U global views.
        student: unit rows [V, n, D], V >= U, V > 1; student view u < U is teacher view u. In a couple, anchor
            t_u[i] has the positive s_v[i] and the n - 1 negatives s_v[j], j != i. All couples weigh the same.
        gather, gram: as in `symmetric_moments`.
    """
    (u, n, dim), v = teacher.shape, len(student)
    teacher = teacher.detach()
    other = 1 - torch.eye(u, v, dtype=teacher.dtype, device=teacher.device)  # [U, V]: 0 for the same view
    positives = _Products.apply(teacher.transpose(0, 1), student.transpose(0, 1)) * other  # [n, U, V]
    positive_sums = torch.stack([positives.sum(), positives.square().sum()])  # [2]

    if _takes_gram(u * v / (u + v) * n, dim, gather, gram):
        # A teacher's view skips one global view, so these are summed one by one; all local views together.
        parts = *student[:u], student[u:].flatten(0, 1)
        sums, grams = map(torch.stack, zip(*(_Sums.apply(part) for part in parts)))
        # t_sums: [U, D], t_grams: [U, D, D]; s_sums, s_grams: U + 1 of each
        count, positive_sums, t_sums, t_grams, s_sums, s_grams = _sum_over_ranks(
            n, positive_sums, teacher.sum(1), teacher.mT @ teacher, sums, grams, gather=gather)
        other = torch.cat([other[:, :u], other.new_ones(u, 1)], 1)  # [U, U + 1]
        pairs = torch.stack([(other * _Products.apply(t_sums, s_sums)).sum(),
                             (other * _Products.apply(t_grams.flatten(1), s_grams.flatten(1))).sum()])
    else:
        cosines = _cosines(_gather_rows(teacher, gather), student) * other[:, :, None, None]
        pairs = torch.stack([cosines.sum(), cosines.square().sum()])
        count, positive_sums, pairs = _sum_over_ranks(n, positive_sums, pairs, gather=gather)

    anchors, negatives = u * (v - 1) * count, count - 1  # anchors: over all couples
    return PairMoments(*(positive_sums / anchors), *((pairs - positive_sums) / (anchors * negatives)),
                       negatives)


def negative_cosines(anchors, others, same_view: bool = False):
    """Yields this rank's pairs in parts: cosines [U, V, m, m], a mask of the negative pairs, their number.

    anchors, others: unit rows, U and V times [n, D]. same_view: whether view u < U of one image and view u
    of another are a pair. Images whose views exceed BLOCK are split, and pairs taken within each part alone.
    """
    anchors, others = torch.stack([*anchors]), torch.stack([*others])  # [U, n, D], [V, n, D]
    (u, n, _), v = anchors.shape, len(others)
    couples = ~torch.eye(u, v, dtype=torch.bool, device=anchors.device) | same_view  # [U, V]
    parts = max(1, min(-(-v * n // BLOCK), n // 2))
    for x, y in zip(anchors.tensor_split(parts, 1), others.tensor_split(parts, 1)):
        m = x.shape[1]
        negative = couples[..., None, None] & ~torch.eye(m, dtype=torch.bool, device=x.device)
        number = (u * v if same_view else u * (v - 1)) * m * (m - 1)
        yield _cosines(x, y), negative, number


def log_mean_exp(anchors, others, temperature: float, same_view: bool = False) -> Tensor:
    """log E-[exp(cos / temperature)] over the pairs of `negative_cosines`, a 0-dim tensor."""
    sums, count = [], 0
    for cosines, negative, number in negative_cosines(anchors, others, same_view):
        sums.append((cosines / temperature).masked_fill(~negative, -math.inf).logsumexp((0, 1, 2, 3)))
        count += number
    return torch.stack(sums).logsumexp(0) - math.log(count)


def mean_fourth_power(anchors, others, same_view: bool = False) -> Tensor:
    """E-[cos^4] over the pairs of `negative_cosines`, a 0-dim tensor."""
    total, count = 0, 0
    for cosines, negative, number in negative_cosines(anchors, others, same_view):
        total = total + (cosines.square().square() * negative).sum()
        count += number
    return total / count


def auc_objective(moments: PairMoments, a, b, alpha, margin=1.0, negative_weight=1.0,
                  margin_negative_weight=1.0) -> Tensor:
    """Equation (1) from the moments of the score; a 0-dim tensor. Weights are numbers or 0-dim tensors."""
    positive_mean, positive_square, negative_mean, negative_square, _, hardest, _ = moments
    hardest = negative_mean if hardest is None else hardest
    positive_spread = positive_square + a * (a - 2 * positive_mean)  # E+[(h - a)^2]
    negative_spread = negative_square + b * (b - 2 * negative_mean)
    violation = margin - positive_mean + margin_negative_weight * hardest
    return positive_spread + negative_weight * negative_spread + alpha * (2 * violation - alpha)


@torch.no_grad()
@exact_products()
def pair_auc(z0: Tensor, z1: Tensor) -> float:
    """AUC of positive against negative cosines: the share of couples (positive, negative) in the right order.

    Exact over the n positive and 2n (2n - 2) negative pairs of two views [n, D], by a 2n x 2n matrix; ties
    count half.
    """
    _check_views((z0, z1), 2)
    z, n = torch.cat([unit_rows(z0), unit_rows(z1)]), len(z0)
    same_image = torch.eye(n, dtype=torch.bool, device=z.device).repeat(2, 2)
    negatives = (z @ z.T)[~same_image].sort().values
    positives = (z[:n] * z[n:]).sum(1)
    below = sum(torch.searchsorted(negatives, positives, right=right).sum() for right in (False, True))
    return below.item() / (2 * n * len(negatives))


class _UnitRows(torch.autograd.Function):
    """x -> x / |x| by rows, and |x|. The gradient (g - z (z . g)) / |x| passes over memory four times,
    autograd's a dozen. |x|, infinite for a zero row, is an output so that second derivatives are right."""

    @staticmethod
    def forward(x):
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        norm = norm.masked_fill(norm < 1e-12, math.inf)
        return x / norm, norm

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*output)

    @staticmethod
    def backward(ctx, grad, grad_norm):
        z, norm = ctx.saved_tensors
        along = (z * grad).sum(-1, keepdim=True) / norm - grad_norm
        return torch.addcmul(grad / norm, z, along, value=-1)


class _Products(torch.autograd.Function):
    """Rows x [..., m, D] and y [..., n, D] -> x y^T [..., m, n]. Its backward pass runs after
    `exact_products` has ended elsewhere."""

    @staticmethod
    def forward(x, y):
        return x @ y.mT

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    @exact_products()
    def backward(ctx, grad):
        x, y = ctx.saved_tensors
        return (grad @ y if ctx.needs_input_grad[0] else None,
                grad.mT @ x if ctx.needs_input_grad[1] else None)


class _Sums(torch.autograd.Function):
    """Rows x [N, D] -> the sums of x_i, [D], and of x_i x_i^T, [D, D]. The gradient takes one product with x,
    autograd's two."""

    @staticmethod
    def forward(x):
        return x.sum(0), x.T @ x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    @exact_products()
    def backward(ctx, grad_sum, grad_gram):
        return torch.addmm(grad_sum, *ctx.saved_tensors, grad_gram + grad_gram.T)


def _cosines(x: Tensor, y: Tensor) -> Tensor:
    """Unit rows [U, m, D] and [V, n, D] -> their cosines [U, V, m, n]."""
    rows = _Products.apply(x.flatten(0, 1), y.flatten(0, 1))
    return rows.unflatten(0, x.shape[:2]).unflatten(2, y.shape[:2]).transpose(1, 2)


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _scale_gradient(x: Tensor, factor) -> Tensor:
    """x itself, with its gradient multiplied by the factor."""
    return torch.lerp(x.detach(), x, factor)  # x.detach() + factor (x - x.detach())


def _check_views(views, dims: int, world: int = 1) -> None:
    if len(views) < 2:
        raise ValueError(f"positive pairs need at least two views, got {len(views)}")
    first, second = views[:2]
    if not all(x.is_floating_point() and x.dim() == dims and x.shape[-2:] == first.shape[-2:] for x in views):
        shape, got = "[n, D]" if dims == 2 else "[views, n, D]", [(x.dtype, list(x.shape)) for x in views]
        raise ValueError(f"embeddings must be floating point {shape}, of one n and D, got {got}")
    if first.shape[-2] * world < 2 or first.shape[-2] == 0:
        raise ValueError(f"negative pairs need at least two images, got {first.shape[-2]}")
    if dims == 3 and not 0 < len(first) <= len(second) > 1:
        raise ValueError("the student must see every teacher view and one more: got "
                         f"{len(first)} teacher views and {len(second)} student views")


# ------------------------------------------------------------------------------------------------ over ranks

def _world_size(gather: bool = True) -> int:
    return dist.get_world_size() if gather and dist.is_available() and dist.is_initialized() else 1


class _SumOverRanks(torch.autograd.Function):
    """x -> its sum over ranks, the same on all; so is the gradient."""

    @staticmethod
    def forward(x):
        total = x.contiguous().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return _SumOverRanks.apply(grad)


def _mean_over_ranks(x: Tensor) -> Tensor:
    return x if _world_size() == 1 else _SumOverRanks.apply(x) / _world_size()


def _sum_over_ranks(count: int, *tensors: Tensor, gather: bool) -> list[int | Tensor]:
    """The count and the tensors summed over ranks, by one all-reduce."""
    if _world_size(gather) == 1:
        return [count, *tensors]
    tensors = [tensors[0].new_full((), count), *tensors]
    flat = _SumOverRanks.apply(torch.cat([x.reshape(-1) for x in tensors]))
    return [part.view_as(x) for part, x in zip(flat.split([x.numel() for x in tensors]), tensors)]


def _gather_rows(x: Tensor, gather: bool) -> Tensor:
    """The rows of all ranks, which may differ in n: [..., n, D] -> [..., all n, D]. An all-reduce of
    zero-padded rows; its gradient is a sum over ranks and a slice."""
    if _world_size(gather) == 1:
        return x
    counts = torch.zeros(_world_size(), dtype=torch.int64, device=x.device)
    counts[dist.get_rank()] = x.shape[-2]
    dist.all_reduce(counts)
    counts = counts.tolist()  # the host waits
    before, after = sum(counts[:dist.get_rank()]), sum(counts[dist.get_rank() + 1:])
    return _SumOverRanks.apply(nn.functional.pad(x, (0, 0, before, after)))


def _takes_gram(rows: float, dim: int, gather: bool, gram: bool | None) -> bool:
    """Whether to take Gram matrices: as asked for, or the cheaper; over ranks the same choice on all."""
    if gram is None:
        world = _world_size(gather)
        gram = rows > dim if world == 1 else dim <= max(GRAM_WIDTH, GRAM_WIDTH_PER_RANK * world)
    return gram


# ----------------------------------------------------------------------------------------------- the modules

class AUCCLLoss(nn.Module):
    """Equation (1), on request with (2), (3) or both. The primal a, b and the dual alpha are parameters.

    Any optimiser that descends does descent-ascent: alpha's gradient is reversed, and b's is divided by nu,
    so that plain steps on all three are stable below a learning rate of 1 (the curvature in b is 2 nu).

    Args:
        a, b, alpha: initial values.
        margin: m.
        negative_weight: nu, weight of the negatives' spread; "sum" is the number of negatives per anchor.
        margin_negative_weight: kappa, weight of the negatives in the margin term; likewise. Keep it at 1 for
            a student that faces a teacher: with kappa = nu > 1, collapse to one negative cosine has loss 0.
        temperature: T of (2); None is (1). The buffer u is the log of a moving average of E-[exp(h / T)] over
            earlier calls in training mode; E- is over pairs within each rank, then over ranks.
        fourth_moment: rho of (3); its E- is likewise, also without `gather`. 0 leaves it out.
        learn: which of a, b, alpha are learned; the others are held at their initial values.
        score: "cosine", h = cos, or "unit", h = (1 + cos) / 2.
        gather: negatives from all ranks when a process group is up; False keeps to this rank's, and averages
            the gradients of a, b, alpha over ranks.

    With nu and kappa independent of the batch, minibatch gradients are unbiased estimates of the population's
    at any batch size: pair means are U-statistics. (Batch norm in training mode breaks this.) Embeddings are
    normalised inside; moments are float32 at least, also under autocast. ValueError for fewer than two images
    (with (2) or (3), each rank needs two) or views, mismatched shapes and non-floating input.
    """

    def __init__(self, a: float = 1.0, b: float = 0.0, alpha: float = 1.0, margin: float = 1.0,
                 negative_weight: float | str = 16.0, margin_negative_weight: float | str = 1.0,
                 temperature: float | None = None, fourth_moment: float = 0.0,
                 learn: tuple[str, ...] = WEIGHTS, score: str = "cosine", gather: bool = True):
        super().__init__()
        if not {*learn} <= {*WEIGHTS} or score not in SCORES:
            raise ValueError(f"learn may hold {WEIGHTS}, score is one of {[*SCORES]}; got {learn}, {score!r}")
        for value in (negative_weight, margin_negative_weight, 1 if temperature is None else temperature):
            if value != "sum" and not 0 < float(value) < math.inf:
                raise ValueError(f"negatives' weights and the temperature must be positive, got {value}")
        if not 0 <= float(fourth_moment) < math.inf:
            raise ValueError(f"fourth_moment must be a finite number from 0 on, got {fourth_moment}")
        for name, value in zip(WEIGHTS, (a, b, alpha)):
            setattr(self, name, nn.Parameter(torch.tensor(float(value)), requires_grad=name in learn))
        self.margin, self.score, self.gather, self.temperature = float(margin), score, gather, temperature
        self.negative_weight, self.margin_negative_weight = negative_weight, margin_negative_weight
        self.fourth_moment = fourth_moment
        self._takes_local_pairs = temperature is not None or fourth_moment > 0
        if temperature is not None:
            self.register_buffer("u", torch.tensor(math.nan))  # until the first batch
        self.means = None  # [2], detached: positive and negative mean score of the last call
        self._checked_equal = False  # a, b, alpha were compared over ranks
        self._calls, self._warned = 0, False

    @staticmethod
    def preset(name: str, **overrides) -> "AUCCLLoss":
        """The loss named `name` in PRESETS; `overrides` are arguments of that loss, of a released one a, b,
        alpha and learn."""
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; choose from {', '.join(PRESETS)}")
        if name.startswith("released"):
            if "alpha" in overrides.get("learn", ()):
                raise ValueError(f"{name} is linear in alpha: it can only be held")
            if refused := {*overrides} - {*WEIGHTS, "learn"}:
                raise ValueError(f"{name} has no {', '.join(sorted(refused))}")
        return PRESETS[name](**overrides)

    @exact_products()
    def forward(self, *views: Tensor) -> Tensor:
        """Symmetric form. views: V >= 2 of n images, [n, D] each, gradient through all; a 0-dim tensor."""
        _check_views(views, 2, _world_size(self.gather and not self._takes_local_pairs))
        with torch.autocast(views[0].device.type, enabled=False):
            z = [unit_rows(view) for view in views]
            moments = symmetric_moments(*z, gather=self.gather)
            return self._objective(self._add_local_moments(moments, z, z, same_view=True))

    @exact_products()
    def teacher_student(self, teacher: Tensor, student: Tensor) -> Tensor:
        """Multi-crop form, the mean over couples of different views; a 0-dim tensor. teacher: [U, n, D] of
        the global views, without gradient; student: [V, n, D] of all views, the first U are the teacher's."""
        _check_views((teacher, student), 3, _world_size(self.gather and not self._takes_local_pairs))
        with torch.autocast(student.device.type, enabled=False):
            teacher, student = unit_rows(teacher.detach()), unit_rows(student)
            moments = teacher_student_moments(teacher, student, self.gather)
            return self._objective(self._add_local_moments(moments, teacher, student))

    def param_groups(self, lr: float) -> list[dict]:
        """Optimiser group of the learned weights, without weight decay; none if all are held."""
        learned = [weight for _, weight in self.named_parameters() if weight.requires_grad]
        return [{"params": learned, "lr": lr, "weight_decay": 0.0}] if learned else []

    @property
    def stats(self) -> dict[str, float]:
        """Mean positive and negative score of the last call; a, b, alpha and u as they stand; floats."""
        means = {} if self.means is None else dict(zip(("positive", "negative"), self.means.tolist()))
        return means | {name: getattr(self, name).item() for name in (*WEIGHTS, "u") if hasattr(self, name)}

    def _objective(self, moments: PairMoments) -> Tensor:
        moments = moments.of_score(self.score)
        self.means = torch.stack([moments.positive_mean.detach(), moments.negative_mean.detach()])
        nu, kappa = (moments.negatives if weight == "sum" else weight
                     for weight in (self.negative_weight, self.margin_negative_weight))
        a, b, alpha = self._weights(moments.positive_mean)
        self._check_range(alpha, kappa)
        b, alpha = _scale_gradient(b, 1 / nu), _scale_gradient(alpha, -1)
        loss = auc_objective(moments, a, b, alpha, self.margin, nu, kappa)
        return loss if moments.fourth is None else loss + self.fourth_moment * moments.fourth

    def _add_local_moments(self, moments: PairMoments, anchors, others, same_view=False) -> PairMoments:
        """The moments with those of (2) and (3), which are taken over pairs within each rank."""
        if self.temperature is not None:
            moments = moments._replace(hardest=self._hardest(anchors, others, same_view))
        if self.fourth_moment:
            fourth = mean_fourth_power(anchors, others, same_view)
            moments = moments._replace(fourth=_mean_over_ranks(fourth))
        return moments

    def _hardest(self, anchors, others, same_view: bool) -> Tensor:
        """T (E-[exp(h / T - u)] + u - 1), where E- is the mean over ranks of their means; then u moves."""
        (s, t), temperature = SCORES[self.score], self.temperature
        local = log_mean_exp(anchors, others, temperature / s, same_view) + t / temperature
        log_means = local.view(1)  # [ranks]
        if (world := _world_size()) > 1:
            log_means = _SumOverRanks.apply(local * torch.eye(world, device=local.device)[dist.get_rank()])
        now = log_means.detach()
        u = torch.where(self.u.isnan(), now.mean(), self.u.to(now)).maximum(now.max() - MAX_EXCESS)
        excess = (log_means - u).expm1().mean()  # E-[exp(h / T - u)] - 1
        if self.training:
            self.u = (u + torch.log1p((1 - DECAY) * excess.detach())).to(self.u)
        return temperature * (excess + u)

    def _weights(self, like: Tensor) -> list[Tensor]:
        """a, b, alpha, on the device and in the dtype of `like`."""
        weights = [getattr(self, name).to(like) for name in WEIGHTS]
        if _world_size() == 1:
            return weights
        weights = torch.stack(weights)
        if not self._checked_equal:  # gradients are equal on all ranks: weights that start equal stay so
            highest = torch.stack([weights, -weights]).detach()
            dist.all_reduce(highest, dist.ReduceOp.MAX)
            if not torch.equal(highest[0], -highest[1]):
                raise RuntimeError(f"a, b, alpha differ between ranks ({weights.tolist()}): start them equal")
            self._checked_equal = True
        if not self.gather and weights.requires_grad:
            weights.register_hook(_mean_over_ranks)
        return list(weights)

    def _check_range(self, alpha: Tensor, kappa) -> None:
        """Warns once of an alpha that no scores in [-1, 1] explain. On an accelerator, where reading it makes
        the host wait, every 100th call looks."""
        self._calls += 1
        if self._warned or not self.alpha.requires_grad or (alpha.device.type != "cpu" and self._calls % 100):
            return
        bound = abs(self.margin) + 1 + float(kappa)
        self._warned = abs(alpha.item()) > bound
        if self._warned:
            warnings.warn(f"alpha = {alpha.item():.3g} is out of its range, +-{bound:.3g}: the learning rate "
                          "is too large, or maximize=True reverses the gradient that is reversed inside")


class ReleasedCIFARLoss(AUCCLLoss):
    """`released_cifar` as a module: symmetric form only, this rank's images, `b` learned by plain descent."""

    @exact_products()
    def forward(self, z0: Tensor, z1: Tensor) -> Tensor:
        _check_views((z0, z1), 2)
        with torch.autocast(z0.device.type, enabled=False):
            z0, z1 = _at_least_float32(z0), _at_least_float32(z1)
            loss, *means = released_cifar(z0, z1, *self._weights(z0))
        self.means = torch.stack(means).detach()
        return loss

    def teacher_student(self, teacher: Tensor, student: Tensor) -> Tensor:
        raise ValueError("released-cifar has no teacher/student form; use 'paper' or 'released-imagenet'")


class ReleasedImageNetLoss(AUCCLLoss):
    """`released_imagenet` as a module: teacher/student form only, this rank's images, a, b and alpha held.

    The buffer `center` is an EMA of the teacher's mean output over ranks, updated in training mode. A
    training loop may schedule the attribute `teacher_temp`.
    """
    teacher_temp, student_temp, center_momentum = 0.04, 0.1, 0.9

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.register_buffer("center", torch.zeros(1))  # [D] from the first call on

    def forward(self, z0: Tensor, z1: Tensor) -> Tensor:
        raise ValueError("released-imagenet has no symmetric form; use 'paper' or 'released-cifar'")

    @exact_products()
    def teacher_student(self, teacher: Tensor, student: Tensor) -> Tensor:
        _check_views((teacher, student), 3)
        with torch.autocast(student.device.type, enabled=False):
            teacher, student = _at_least_float32(teacher.detach()), _at_least_float32(student)
            q = ((teacher - self.center.to(teacher)) / self.teacher_temp).softmax(-1)
            loss, *means = released_imagenet(q, student / self.student_temp, *self._weights(student))
            if self.training:
                self.center = torch.lerp(_mean_over_ranks(teacher.mean((0, 1))).to(self.center), self.center,
                                         self.center_momentum)
        self.means = torch.stack(means).detach()
        return loss

    def _load_from_state_dict(self, state_dict, prefix, *args):
        if (saved := state_dict.get(prefix + "center")) is not None:
            self.center = self.center.new_zeros(saved.shape)  # [1] in a new module
        super()._load_from_state_dict(state_dict, prefix, *args)


PRESETS = {
    "paper": AUCCLLoss,
    # (2); not from the paper. b is held at 0: one that follows E-[h] lets all embeddings share a direction.
    "hard": partial(AUCCLLoss, temperature=0.1, negative_weight=8.0, learn=("a", "alpha")),
    # (3); not from the paper either. A positive is pulled by 2 (a + alpha - h), and a + alpha goes from 2 to
    # m + b: the margin 2 keeps it, 1 would halve it in long training.
    "quartic": partial(AUCCLLoss, margin=2.0, negative_weight=8.0, fourth_moment=80.0),
    "poster": partial(AUCCLLoss, negative_weight="sum", margin_negative_weight="sum", learn=("b", "alpha")),
    "released-cifar": partial(ReleasedCIFARLoss, a=10.0, learn=("b",), gather=False),
    "released-imagenet": partial(ReleasedImageNetLoss, a=10.0, learn=(), gather=False),
}
