"""The losses that the authors' released code computes, as functions of tensors with plain n x n matrices.

Like that code they see this rank's images alone. auccl_loss.py wraps them as the presets "released-cifar" and
"released-imagenet". Unlike equation (1) there, they are linear in alpha and sum over negatives; the released
code holds a and alpha. E_i is the mean over i. Each returns three 0-dim tensors: the loss, and the mean score
h of the positive pairs and of the pairs of different images.
"""
import torch
from torch import Tensor
from torch.nn.functional import normalize

NEGATIVES_WEIGHT = 32  # of released_imagenet


def released_cifar(z0: Tensor, z1: Tensor, a, b, alpha) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of two views z0, z1 [n, D] of n images, normalised inside. Released: a = 10, alpha = 1.

    With p_i = clamp(cos(z0_i, z1_i) / 2, 0, 1) and, between any two of all 2n views, h_ij = (1 + cos_ij) / 2:

        E_i[(p_i - a)^2 - 2 alpha p_i] + E_i[sum_{j != i} ((h_ij - b)^2 + 2 alpha h_ij)] - 2n

    The sum runs over all other 2n - 1 views: the positive of view i is among its negatives.
    """
    n = len(z0)
    z = normalize(torch.cat([z0, z1]), dim=1)  # [2n, D]
    cosines = z @ z.T  # [2n, 2n]
    p = (cosines.diagonal(n) / 2).clamp(0, 1)  # [n]
    h = (1 + cosines) / 2
    own, positives = h.diagonal(), h.diagonal(n)  # [2n]: a view with itself; [n]

    def negatives(h):
        return ((h - b)**2 + 2 * alpha * h).sum()

    loss = ((p - a)**2 - 2 * alpha * p).mean() + (negatives(h) - negatives(own)) / (2 * n) - 2 * n
    return loss, positives.mean(), (h.sum() - own.sum() - 2 * positives.sum()) / (2 * n * (2 * n - 2))


def released_imagenet(q: Tensor, k: Tensor, a, b, alpha) -> tuple[Tensor, Tensor, Tensor]:
    """The teacher/student loss, without normalisation. Released: a = 10, b = 0, alpha = 1.

    q [U, n, D] is softmax((teacher - center) / teacher_temp) of U teacher views, k [V, n, D] is student /
    student_temp of V student views; student view u < U is teacher view u. With h_ij = (1 + q_i . k_j) / 2,
    per couple of a teacher view u and a student view v != u:

        E_i[(h_ii - a)^2 - 2 alpha h_ii] + (32 / n) E_i[sum_{j != i} ((h_ij - b)^2 + 2 alpha h_ij)] + 1

    then the mean over couples.
    """
    (u, n, _), v = q.shape, len(k)
    h = (1 + torch.einsum("uid,vjd->uvij", q, k)) / 2  # [U, V, n, n]
    couples = (1 - torch.eye(u, v, dtype=h.dtype, device=h.device)) / (u * (v - 1))  # [U, V], sums to 1
    positives = h.diagonal(dim1=2, dim2=3)  # [U, V, n]
    off_diagonal = 1 - torch.eye(n, dtype=h.dtype, device=h.device)  # [n, n]

    def mean(x):  # [U, V] -> scalar
        return (couples * x).sum()

    def sum_of_others(x):  # [U, V, n, n] -> [U, V], j != i
        return (off_diagonal * x).sum((2, 3))

    positive = ((positives - a)**2 - 2 * alpha * positives).mean(2)  # [U, V]
    negative = sum_of_others((h - b)**2 + 2 * alpha * h) / n  # [U, V]
    loss = mean(positive + NEGATIVES_WEIGHT / n * negative) + 1
    return loss, mean(positives.mean(2)), mean(sum_of_others(h)) / (n * (n - 1))
