"""Bytes, messages and time of a step's collectives by number of GPUs; memory of the objective and of ViTs.

    MALLOC_MMAP_THRESHOLD_=65536 OMP_NUM_THREADS=1 python benchmarks/scale.py    # two minutes of one core

Counts come from formulas, which are first held against the collectives of gloo ranks. Times come from a model
of NCCL on hosts of eight GPUs with published latencies and bandwidths (results/scale.md). The variable makes
freed memory go back to the system, so that peaks count.
"""
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import auccl_loss  # noqa: E402
import utils  # noqa: E402
from auccl_loss import AUCCLLoss  # noqa: E402
from benchmarks import measure  # noqa: E402
from vision_transformer import MultiCropNet, ProjectionHead, build_backbone  # noqa: E402

PASSES = {"all_reduce": 2, "all_gather": 1}  # how often a rank sends the tensor, times (W - 1) / W
IMAGES, TEACHER, STUDENT = 64, 2, 10  # per rank; views of the teacher and of the student
NVLINK, NETWORK = 450e9, 8 * 50e9     # bytes per second and direction: of a GPU; of a host's eight adapters
TREE, RING = (4.4e-6, 1.2e-6, 8.5e-6), (10.0e-6, 1.9e-6, 4.0e-6)  # NCCL's latencies: base, NVLink, network


# A collective is (kind, bytes of the tensor that every rank holds at its end).

def ours(world: int, dim: int, gram: bool) -> list[tuple[str, int]]:
    """The objective over teacher and student, forward and backward."""
    n, u = IMAGES, TEACHER
    sums = 4 * (3 + (2 * u + 1) * (dim + dim * dim))  # count, two positive moments; sums and Gram matrices
    if gram:
        return [("all_reduce", sums)] * 2
    return [("all_reduce", 8 * world), ("all_reduce", 4 * u * world * n * dim), *[("all_reduce", 20)] * 2]


def gathered(world: int, dim: int) -> list[tuple[str, int]]:
    """SimCLR's loss of two views as lightly has it: embeddings gathered, their gradients reduced."""
    return [(kind, 4 * world * IMAGES * dim) for kind in ("all_gather", "all_reduce") for _ in range(2)]


def queue(world: int, dim: int) -> list[tuple[str, int]]:
    """MoCo v2: keys gathered for the queue; no gradient. (Its shuffled batch norm gathers images as well.)"""
    return [("all_gather", 4 * world * IMAGES * dim)]


def seconds(collectives, world: int) -> float:
    """NCCL's model: trees for an all-reduce, rings for an all-gather, at full bandwidth."""
    hosts = max(1, world // 8)
    rate, total = NVLINK if hosts == 1 else NETWORK, 0.0
    for kind, size in collectives:
        if kind == "all_reduce":
            base, near, far = TREE
            latency = base + 2 * ((world // hosts - 1) * near + (hosts.bit_length() - 1) * far)
        else:
            base, near, far = RING
            latency = base + (world - hosts) * near + (hosts - 1) * far
        total += latency + PASSES[kind] * (world - 1) / world * size / rate
    return total


def record_collectives(call) -> list[tuple[str, int]]:
    """What `call()` sends by torch.distributed."""
    seen, originals = [], {kind: getattr(dist, kind) for kind in ("all_reduce", "all_gather")}

    def recorded(kind, tensor, *args, **kwargs):
        parts = tensor if isinstance(tensor, list) else [tensor]
        seen.append((kind, sum(part.numel() * part.element_size() for part in parts)))
        return originals[kind](tensor, *args, **kwargs)
    try:
        for kind in originals:
            setattr(dist, kind, partial(recorded, kind))
        call()
    finally:
        for kind, original in originals.items():
            setattr(dist, kind, original)
    return seen


def step(criterion, dim: int, n: int):
    """A call: the objective, forward and backward, on random embeddings."""
    teacher, student = torch.randn(TEACHER, n, dim), torch.randn(STUDENT, n, dim, requires_grad=True)
    return lambda: criterion.teacher_student(teacher, student).backward()


def measure_rank(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=world)
    rows = []
    for dim in (128, 256, 512, 1024, 2048):
        for gram in (True, False):
            auccl_loss.GRAM_WIDTH, auccl_loss.GRAM_WIDTH_PER_RANK = 2048 if gram else 0, 0
            call = step(AUCCLLoss(), dim, IMAGES)
            call()  # compares a, b, alpha over ranks once, and loads what torch loads on first use
            assert record_collectives(call) == ours(world, dim, gram), (record_collectives(call), dim, gram)
            call = step(AUCCLLoss(learn=()), dim, IMAGES)
            call()
            rows.append((dim, gram, measure.added_memory(call)))
    try:
        from lightly.loss import NTXentLoss
    except ImportError:
        NTXentLoss = None
    if NTXentLoss:
        views = torch.randn(2, IMAGES, 128, requires_grad=True)
        criterion = NTXentLoss(gather_distributed=True)
        found = record_collectives(lambda: criterion(*views).backward())
        assert found == gathered(world, 128), found
    if rank == 0:
        print(f"{world} ranks: the counts are right" + (", lightly's too" if NTXentLoss else ""))
        for dim, gram, megabytes in rows:
            print(f"  D = {dim:4}, {'Gram matrices' if gram else 'rows':13} {megabytes:6.1f} MB over inputs")
    dist.barrier()
    dist.destroy_process_group()


def print_traffic() -> None:
    methods = {**{f"Gram, D = {dim:,}": partial(ours, dim=dim, gram=True) for dim in (128, 512, 1024)},
               "rows, D = 1,024": partial(ours, dim=1024, gram=False),
               "SimCLR, D = 128": partial(gathered, dim=128), "MoCo v2, D = 128": partial(queue, dim=128),
               "gradients of ViT-S": lambda world: [("all_reduce", 4 * 27_000_000)]}
    print("\n| GPUs |", " | ".join(methods), "|\n" + "|---" * (1 + len(methods)) + "|")
    for world in (8, 64, 512, 4096):
        cells = []
        for method in methods.values():
            collectives = method(world)
            sent = sum(PASSES[kind] * (world - 1) / world * size for kind, size in collectives) / 1e6
            sent = f"{sent:,.0f}" if sent > 100 else f"{sent:.3g}"
            cells.append(f"{sent} MB, {len(collectives)}, {1e3 * seconds(collectives, world):.2g} ms")
        print(f"| {world:,} |", " | ".join(cells), "|")


def saved_for_backward(name: str, local: int, checkpointing: bool, images: int) -> tuple[int, int]:
    """Parameters of the backbone and head, and bytes that a bf16 forward pass keeps for the backward pass: 2
    views of 224 pixels and 8 of `local`. Nothing is computed: tensors are shapes alone."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    with torch.device("meta"):
        backbone = build_backbone(name, 16, 224)
        network = MultiCropNet(backbone, ProjectionHead(backbone.embed_dim, 1024))
    backbone.set_grad_checkpointing(checkpointing)
    kept = {}

    def keep(x):
        if not isinstance(x, torch.nn.Parameter):
            kept[x.untyped_storage()._cdata] = x  # x itself, so that no other takes its place
        return x
    with FakeTensorMode(allow_non_fake_inputs=True), torch.autocast("cpu", torch.bfloat16):
        network.to_empty(device="cpu")
        views = [torch.empty(images, 3, size, size) for size in [224] * 2 + [local] * 8]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            network(views)
    return (sum(parameter.numel() for parameter in network.parameters()),
            sum(x.untyped_storage().nbytes() for x in kept.values()))


def print_networks() -> None:
    local_sizes = {"vit_small": 96, "timm/vit_large_patch16_224": 96, "timm/vit_giant_patch14_224": 98}
    for name, local in local_sizes.items():
        for checkpointing in (False, True):
            (count, first), (_, second) = (saved_for_backward(name, local, checkpointing, n) for n in (1, 2))
            print(f"{name}, checkpointing {checkpointing}: {count / 1e6:,.0f} M parameters, "
                  f"{(second - first) / 1e6:,.0f} MB an image and {(2 * first - second) / 1e6:,.0f} MB")


if __name__ == "__main__":
    utils.ArgumentParser(__doc__).parse_args()  # --help
    for world in (2, 4):
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.start_processes(measure_rank, (world, folder), world, start_method="fork")
    print_traffic()
    print_networks()
