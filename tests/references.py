"""Slow, obvious references: every pair written out, in float64, one Python loop a sum of the formula."""
import itertools

import torch

SCORES = {"cosine": lambda cos: cos, "unit": lambda cos: (1 + cos) / 2}


def cosine(x, y):
    return (x @ y) / (x.norm() * y.norm())


def symmetric_pairs(*views):
    """Scores' cosines of all positive and of all (ordered) negative pairs of views [n, D]."""
    rows = [(i, row) for z in views for i, row in enumerate(z)]
    positive = [cosine(x, y) for z, w in itertools.combinations(views, 2) for x, y in zip(z, w)]
    negative = [cosine(x, y) for (i, x), (j, y) in itertools.permutations(rows, 2) if i != j]
    return torch.stack(positive), torch.stack(negative)


def teacher_student_pairs(teacher, student, product=cosine):
    """The same for every couple of a teacher view [U, n, D] and another student view [V, n, D]."""
    positive, negative = [], []
    for (u, t), (v, s) in itertools.product(enumerate(teacher), enumerate(student)):
        if u != v:
            for i, j in itertools.product(range(len(t)), range(len(s))):
                (positive if i == j else negative).append(product(t[i], s[j]))
    return torch.stack(positive), torch.stack(negative)


def auc_loss(positive, negative, a, b, alpha, margin, nu, kappa, score, temperature=None, u=None):
    """Equation (1) from the cosines of all pairs, or (2) for a temperature."""
    positive, negative = SCORES[score](positive), SCORES[score](negative)
    hardest = (negative.mean() if temperature is None else
               temperature * ((negative / temperature - u).exp().mean() + u - 1))
    return (((positive - a)**2).mean() + nu * ((negative - b)**2).mean()
            + 2 * alpha * (margin - positive.mean() + kappa * hardest) - alpha**2)


def surrogate(positive, negative, margin):
    """Mean of (m - h+ + h-)^2 over every couple of a positive and a negative score."""
    return (margin - positive[:, None] + negative[None, :]).square().mean()


def released_cifar(z0, z1, a, b, alpha):
    z, n = torch.cat([z0, z1]), len(z0)
    p = torch.stack([(cosine(x, y) / 2).clamp(0, 1) for x, y in zip(z0, z1)])
    sums = []
    for i in range(2 * n):
        h = torch.stack([(1 + cosine(z[i], z[j])) / 2 for j in range(2 * n) if j != i])
        sums.append(((h - b)**2 + 2 * alpha * h).sum())
    return ((p - a)**2 - 2 * alpha * p).mean() + torch.stack(sums).mean() - 2 * n


def released_imagenet(teacher, student, center, a=10.0, b=0.0, alpha=1.0, teacher_temp=0.04):
    q, k, n = ((teacher - center) / teacher_temp).softmax(-1), student / 0.1, teacher.shape[1]
    values = []
    for u, v in itertools.product(range(len(q)), range(len(k))):
        if u != v:
            h = (q[u] @ k[v].T + 1) / 2  # [n, n]
            positive = torch.stack([(h[i, i] - a)**2 - 2 * alpha * h[i, i] for i in range(n)]).mean()
            negative = torch.stack([sum((h[i, j] - b)**2 + 2 * alpha * h[i, j] for j in range(n) if j != i)
                                    for i in range(n)]).mean()
            values.append(positive + 32 / n * negative + 1)
    return torch.stack(values).mean()


def nt_xent(z0, z1, temperature=0.5):
    """SimCLR's loss (Chen et al. 2020, equation 1), the mean over all 2n anchors."""
    z, n = torch.nn.functional.normalize(torch.cat([z0, z1]), dim=1), len(z0)
    logits = (z @ z.T / temperature).masked_fill(torch.eye(2 * n, dtype=torch.bool), float("-inf"))
    return torch.nn.functional.cross_entropy(logits, (torch.arange(2 * n) + n) % (2 * n))


def dcl(z0, z1, temperature):
    """Decoupled contrastive learning (Yeh et al. 2022): a log-mean-exp for every anchor."""
    positive, negative = symmetric_pairs(z0, z1)
    return (negative.view(2 * len(z0), -1) / temperature).logsumexp(1).mean() - positive.mean() / temperature
