"""The objective over 2 and 4 processes (gloo) against one process on the concatenated batch."""
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from auccl_loss import AUCCLLoss
from torch import nn
from torch.nn.parallel import DistributedDataParallel

N, DIM, STEPS = 24, 8, 20  # images over all ranks


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, DIM))


def inputs(step):
    """Two views [N, 6] of a step's images."""
    generator = torch.Generator().manual_seed(step)
    image = torch.randn(N, 6, generator=generator)
    return [image + 0.3 * torch.randn(N, 6, generator=generator) for _ in range(2)]


def loss_of(form, criterion, model, view0, view1):
    z0, z1 = model(torch.cat([view0, view1])).chunk(2)
    if form == "symmetric":
        return criterion(z0, z1)
    return criterion.teacher_student(torch.stack([z1, z0]), torch.stack([z0, z1, z0 + z1.flip(1)]))


def train(form, preset, rank, world, rows, steps):
    """`steps` steps on this rank's rows of every batch; the first step's loss and gradients, and a, b, alpha at each step."""
    model = network()
    wrapped = DistributedDataParallel(model) if world > 1 else model
    criterion = AUCCLLoss.preset(preset)
    optimizer = torch.optim.SGD([{"params": model.parameters()}, *criterion.param_groups(lr=0.05, adaptive=True)], lr=0.05)
    weights = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(form, criterion, wrapped, *(view[rows] for view in inputs(step)))
        loss.backward()
        if step == 0:
            first = {"loss": loss.detach(), "grads": [p.grad.clone() for p in model.parameters()],
                     "weight_grads": [p.grad.clone() for p in criterion.parameters() if p.grad is not None]}
        optimizer.step()
        weights.append(torch.stack([criterion.a, criterion.b, criterion.alpha]).detach().clone())
    return {**first, "weights": torch.stack(weights)}


def worker(rank, world, folder, form, preset, split):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    ends = split or [N * (r + 1) // world for r in range(world)]
    start = 0 if rank == 0 else ends[rank - 1]
    torch.save(train(form, preset, rank, world, slice(start, ends[rank]), STEPS), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def run_ranks(function, world, *args):
    mp.start_processes(function, (world, *args), nprocs=world, start_method="fork")


@pytest.mark.parametrize("world, form, preset, split", [
    (2, "symmetric", "paper", None), (4, "symmetric", "paper", None), (2, "teacher_student", "paper", None),
    (4, "teacher_student", "paper", None), (2, "symmetric", "released-cifar", None),
    (2, "symmetric", "paper", [7, N]),  # ranks with unequal batches: the all-reduce counts images, not ranks
])
def test_ranks_equal_one_process(tmp_path, world, form, preset, split):
    run_ranks(worker, world, str(tmp_path), form, preset, split)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    alone = train(form, preset, 0, 1, slice(0, N), 1)
    for rank in ranks:
        assert torch.equal(rank["loss"], ranks[0]["loss"])
        assert torch.equal(rank["weights"], ranks[0]["weights"])                  # bitwise, at every step
        torch.testing.assert_close(rank["loss"], alone["loss"], rtol=1e-6, atol=1e-6)
        for name in ("grads", "weight_grads"):
            for ours, reference in zip(rank[name], alone[name], strict=True):
                scale = max(1.0, reference.abs().max().item())                    # the released sum over pairs is not of order 1
                torch.testing.assert_close(ours, reference, rtol=1e-6, atol=1e-6 * scale)
    assert not torch.equal(ranks[0]["weights"][0], ranks[0]["weights"][-1])


def local_worker(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    rows = slice(0, 10) if rank == 0 else slice(10, N)
    views = [view[rows] for view in inputs(0)]
    criterion = AUCCLLoss(gather=False)
    local = criterion(*views)
    local.backward()
    released = AUCCLLoss.preset("released-imagenet")
    released.teacher_student(torch.stack(views), torch.stack(views))
    try:
        AUCCLLoss(a=float(rank))(*views)
        complaint = ""
    except RuntimeError as error:
        complaint = str(error)
    torch.save({"local": local.detach(), "b_grad": criterion.b.grad, "center": released.center, "complaint": complaint}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_local_negatives_the_center_and_unequal_starts(tmp_path):
    run_ranks(local_worker, 2, str(tmp_path))
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    means, b_grads = [], []
    for rank, rows in enumerate((slice(0, 10), slice(10, N))):
        views = [view[rows] for view in inputs(0)]
        criterion = AUCCLLoss()
        loss = criterion(*views)
        loss.backward()
        assert torch.equal(ranks[rank]["local"], loss.detach())                   # gather=False: this rank's images alone
        b_grads.append(criterion.b.grad)
        means.append(torch.stack(views).mean((0, 1)))
        assert "differ between ranks" in ranks[rank]["complaint"]
    for rank in ranks:
        torch.testing.assert_close(rank["b_grad"], sum(b_grads) / 2)              # yet a, b, alpha move together on all ranks
        torch.testing.assert_close(rank["center"], 0.1 * (means[0] + means[1]) / 2)  # the released center averages ranks
