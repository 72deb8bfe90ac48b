"""The objective over several processes (gloo) against one process on the concatenated batch."""
import copy
import pickle

import auccl_loss
import pytest
import torch
from auccl_loss import AUCCLLoss, log_mean_exp, mean_fourth_power, unit_rows
from conftest import run_ranks
from distributed import rank
from torch import nn
from torch.nn.parallel import DistributedDataParallel

N, WIDE = 24, 600  # images over all ranks; a D, above 512, for which ranks gather rows


def network(dim):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, dim))


def inputs(step):
    """Two views [N, 6] of a step's images."""
    generator = torch.Generator().manual_seed(step)
    image = torch.randn(N, 6, generator=generator)
    return [image + 0.3 * torch.randn(N, 6, generator=generator) for _ in range(2)]


def train(form, dim, preset, world, rows, steps):
    """The first step's loss, gradients and u on these rows of every batch; a, b, alpha, u after each step."""
    model, criterion = network(dim), AUCCLLoss.preset(preset, learn=("a", "b", "alpha"))
    if preset == "hard":
        criterion.u.fill_(3.0)
    wrapped = DistributedDataParallel(model) if world > 1 else model
    optimizer = torch.optim.SGD([*model.parameters(), *criterion.parameters()], lr=0.05)
    weights = []
    for step in range(steps):
        optimizer.zero_grad()
        z0, z1 = wrapped(torch.cat([view[rows] for view in inputs(step)])).chunk(2)
        loss = (criterion(z0, z1) if form == "symmetric" else
                criterion.teacher_student(torch.stack([z1, z0]), torch.stack([z0, z1, z0 + z1.flip(1)])))
        loss.backward()
        if step == 0:
            first = [loss.detach(), *(p.grad.clone() for p in (*model.parameters(), *criterion.parameters())),
                     *criterion.buffers()]
        optimizer.step()
        weights.append(torch.stack([*criterion.parameters(), *criterion.buffers()]).detach())
    return first, torch.stack(weights)


@pytest.mark.parametrize("form, views", [("symmetric", 2), ("teacher_student", 3)])
@pytest.mark.parametrize("dim, ends, preset", [
    (8, [12, N], "paper"), (8, [5, 12, N], "paper"), (WIDE, [12, N], "paper"), (WIDE, [5, 12, N], "paper"),
    (8, [12, N], "hard"), (8, [12, N], "quartic")])
def test_ranks_equal_one_process(monkeypatch, form, views, dim, ends, preset):
    """By Gram matrices and by gathered rows, with equal and unequal numbers of images. The exponentials of
    `hard` and the fourth moment see each rank's own images: one process takes them by blocks of as many."""
    def train_rank():
        return train(form, dim, preset, len(ends), slice([0, *ends][rank()], ends[rank()]), steps=8)
    ranks = run_ranks(train_rank, len(ends))
    monkeypatch.setattr(auccl_loss, "BLOCK", views * N // 2)
    alone, _ = train(form, dim, preset, 1, slice(0, N), steps=1)
    for first, weights in ranks:
        assert torch.equal(first[0], ranks[0][0][0]) and torch.equal(weights, ranks[0][1])  # bitwise
        for ours, reference in zip(first, alone, strict=True):
            torch.testing.assert_close(ours, reference, rtol=2e-6, atol=2e-6)
    assert not torch.equal(weights[0], weights[-1])


def copies(criterion):
    assigned = AUCCLLoss(gather=False)
    assigned.load_state_dict(copy.deepcopy(criterion.state_dict()), assign=True)
    return criterion, copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion)), assigned


def local_rank():
    views = [view[:10] if rank() == 0 else view[10:] for view in inputs(0)]
    losses, grads = [], []
    for criterion in (*copies(AUCCLLoss(gather=False)), AUCCLLoss.preset("released-cifar")):
        losses.append(criterion(*views))
        losses[-1].backward()
        grads.append(criterion.b.grad)
    released, hard = AUCCLLoss.preset("released-imagenet"), AUCCLLoss.preset("hard", gather=False)
    released.teacher_student(torch.stack(views), torch.stack(views))
    hard(*views)
    options = dict(gather=False, negative_weight=8.0)
    quartic = AUCCLLoss(fourth_moment=80.0, **options)(*views) - AUCCLLoss(**options)(*views)
    with pytest.raises(RuntimeError, match="differ between ranks"):
        AUCCLLoss(a=float(rank()))(*views)
    with pytest.raises(ValueError, match="two images"):
        AUCCLLoss.preset("hard")(views[0][:1], views[1][:1])
    return torch.stack(losses).detach(), torch.stack(grads), released.center, hard.u, quartic


def test_local_negatives_with_averaged_gradients_also_of_copies_and_equal_starts():
    ranks = run_ranks(local_rank, 2)
    grads, means, log_means, fourth = [], [], [], []
    for (losses, *_), rows in zip(ranks, (slice(0, 10), slice(10, N))):
        views = [view[rows] for view in inputs(0)]
        z = unit_rows(torch.stack(views))
        log_means.append(log_mean_exp(z, z, 0.1, same_view=True))
        fourth.append(mean_fourth_power(z, z, same_view=True))
        means.append(torch.stack(views).mean((0, 1)))
        criteria = *copies(AUCCLLoss()), AUCCLLoss.preset("released-cifar")
        alone = [criterion(*views) for criterion in criteria]
        grads.append(torch.stack([torch.autograd.grad(loss, criterion.b)[0]
                                  for loss, criterion in zip(alone, criteria)]))
        torch.testing.assert_close(losses, torch.stack(alone).detach())  # of this rank's images alone
    u = sum(log_means) / 2  # the start; then towards the ranks' mean
    u = (0.9 * u.exp() + 0.1 * torch.stack(log_means).exp().mean()).log()
    for _, b_grads, center, hard_u, quartic in ranks:
        torch.testing.assert_close(hard_u, u)
        torch.testing.assert_close(quartic, 80 * sum(fourth) / 2, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(b_grads, sum(grads) / 2)  # yet the weights move together
        torch.testing.assert_close(center, 0.1 * sum(means) / 2)


@pytest.mark.parametrize("dim, world, gram", [(512, 2, True), (513, 2, False), (1024, 63, False),
                                              (1024, 64, True), (65536, 64, False)])
def test_ranks_choose_gram_matrices_or_rows_alike(monkeypatch, dim, world, gram):
    monkeypatch.setattr(auccl_loss, "_world_size", lambda gather=True: world)
    assert {auccl_loss._takes_gram(rows, dim, True, None) for rows in (4, 10**6)} == {gram}
