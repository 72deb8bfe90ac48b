"""The scripts' work on a GPU: a real one with TEST_GPU=0 (its index), else the stand-in of fake_cuda.py.

Everything on one device, the results of the CPU, and hardly a wait of the host for the device.
"""
import warnings
from types import SimpleNamespace

import auccl_loss
import eval_linear
import main
import neighbours
import pretrained
import pytest
import torch
import utils
from auccl_loss import AUCCLLoss
from cifar import main as cifar
from data import build_splits, eval_transform
from eval_knn import knn_accuracy
from fake_cuda import CudaTensor, DeviceError, FakeCuda
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
REAL = torch.cuda.is_available()
NO_SIGNAL = SimpleNamespace(signal=None)
SMALL = ["--arch", "timm/test_vit", "--global_crops_size", "32", "--local_crops_size", "16", "--amp", "none",
         "--out_dim", "32", "--num_workers", "0", "--batch_size_per_gpu", "10",
         "--warmup_epochs", "0", "--freeze_last_layer", "0", "--epochs", "1"]
TOLERANCE = 1e-2 if REAL else 1e-5  # TF32, and other kernels


class RealCuda(warnings.catch_warnings):
    """`waits` of a real GPU, of which torch warns."""

    def __init__(self):
        super().__init__(record=True)

    def __enter__(self):
        self.records = super().__enter__()
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        return self

    def __exit__(self, *error):
        torch.cuda.set_sync_debug_mode("default")
        super().__exit__(*error)

    @property
    def waits(self):
        return [f"{x.filename}:{x.lineno}" for x in self.records if "synchronizing" in str(x.message)]


@pytest.fixture
def gpu(monkeypatch):
    precision = torch.get_float32_matmul_precision()
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
    yield RealCuda() if REAL else FakeCuda(monkeypatch)
    torch.set_float32_matmul_precision(precision)
    torch.use_deterministic_algorithms(False)


def train(module, build, device, gpu=None):
    """A run of one epoch, and what made the host wait within it."""
    run = build(device)
    before = len(gpu.waits) if gpu else 0
    module.train_one_epoch(run, *[None] * (module is main), save=None, interruption=NO_SIGNAL)
    return run, gpu.waits[before:] if gpu else []


@pytest.mark.parametrize("flags", [
    [], ["--teacher", "none"], ["--preset", "released-imagenet"], ["--preset", "hard", "--optimizer", "lars"],
    ["--preset", "quartic", "--teacher", "none"],
    ["--accum_iter", "2", "--grad_checkpointing", "--batch_size_per_gpu", "5"]], ids=" ".join)
def test_pretraining(images, gpu, flags, one_thread):
    local = [] if "none" in flags else ["--local_crops_number", "1"]
    args = main.parse_args([*SMALL, *local, "--data_path", str(images / "train"), *flags])
    expected, _ = train(main, lambda device: main.Run(args, device), CPU)
    with gpu:
        run, waits = train(main, lambda device: main.Run(args, device), CUDA, gpu)
        assert {x.device.type for part in (run.student, run.criterion) for x in part.parameters()} == {"cuda"}
    assert len(waits) <= run.steps, waits  # a step's loss
    assert run.sums["train_loss"] == pytest.approx(expected.sums["train_loss"], rel=TOLERANCE)


def test_training_on_small_images(images, gpu, one_thread, tmp_path):
    flags = ["--dataset", "folder", "--data_path", str(images), "--arch", "tiny", "--projector", "16", "8",
             "--batch_size", "10", "--epochs", "1", "--amp", "none", "--output_dir", str(tmp_path),
             "--device"]
    expected, _ = train(cifar, lambda device: cifar.Run(cifar.parse_args([*flags, "cpu"])), CPU)
    features = cifar.features(expected, expected.data.test)
    with gpu:
        run, waits = train(cifar, lambda device: cifar.Run(cifar.parse_args([*flags, "cuda"])), CUDA, gpu)
        found = cifar.features(run, run.data.test)
        assert_close(found.cpu(), features, rtol=TOLERANCE, atol=1e-4)
        assert cifar.evaluate(run)["test_auc"] > 0
        assert_close(run.sums.cpu(), expected.sums, rtol=TOLERANCE, atol=TOLERANCE)
    assert not waits


def test_views_and_small_batches_reach_the_gpu_without_a_wait(gpu):
    images = torch.randint(256, (64, 3, 32, 32), dtype=torch.uint8)  # 196 KB
    expected = cifar.SimCLRAugmentation()(images, torch.Generator().manual_seed(0))
    with gpu:
        views = cifar.SimCLRAugmentation()(utils.send(images, CUDA), torch.Generator().manual_seed(0))
        assert not gpu.waits
        images.to(CUDA, non_blocking=True)
        assert REAL or len(gpu.waits) == 1  # torch sees no wait of a copy that CUDA defers
        assert_close([view.cpu() for view in views], [*expected], rtol=0, atol=1e-2 if REAL else 1e-5)


def test_evaluation(images, gpu, one_thread):
    splits = build_splits("folder", images, eval_transform(32, (0.5,) * 3, (0.25,) * 3))
    backbone, _ = pretrained.load_backbone(None, arch="timm/test_vit", random_weights=True)
    candidates = [eval_linear.Candidate(lr=0.1), eval_linear.Candidate(lr=0.01)]

    def evaluate(device):
        backbone.to(device)
        (bank, labels), (queries, truth) = (  # clones, because autograd saves nothing of inference mode
            [x.clone() for x in pretrained.extract_features(backbone, split, device, 8)] for split in splits)
        grid = eval_linear.HeadGrid([slice(0, bank.shape[1])] * 2, 3).to(device)
        optimizer, _ = eval_linear.make_sgd(grid, candidates, 8, 1)
        sums = eval_linear.sgd_epoch(grid, optimizer, [(bank[:8], labels[:8], 8), (bank[8:], labels[8:], 13)])
        loss = eval_linear.measure(grid, queries, truth)["loss"]
        eval_linear.fit_logistic(grid.heads[0], bank, labels, 1e-2)
        return {"knn": torch.tensor(knn_accuracy(bank, labels, queries, truth, ks=(3, 20))[3]), "loss": loss,
                "sums": sums, "fitted": eval_linear.measure(grid, queries, truth)["loss"][:1]}
    expected = evaluate(CPU)
    with gpu:
        found = evaluate(CUDA)
    assert_close(found, expected, rtol=1e-3, atol=1e-3)


def tf32():
    matmul = torch.backends.cuda.matmul
    return matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32


def test_the_objective_and_knn_are_exact_whatever_training_does(gpu, monkeypatch):
    seen = []
    views = torch.randn(2, 2, 300, 32, generator=torch.Generator().manual_seed(0)) + 3
    exact = AUCCLLoss()(*views[0].double())
    with gpu:
        utils.set_backends(CUDA, deterministic=False)
        assert tf32() and torch.backends.cudnn.benchmark
        for module, name in ((auccl_loss, "symmetric_moments"), (auccl_loss, "teacher_student_moments"),
                             (neighbours, "_unit_rows")):
            function = getattr(module, name)
            monkeypatch.setattr(module, name, lambda *args, function=function, **more: (
                seen.append(tf32()), function(*args, **more))[1])
        neighbours.nearest_rows(views[0, 0].to(CUDA), views[0, 1, :9].to(CUDA), k=3)
        for preset in ("paper", "hard", "quartic"):
            criterion = AUCCLLoss.preset(preset).to(CUDA)
            criterion(*views[0].to(CUDA)), criterion.teacher_student(*views.to(CUDA))
        assert seen == [False] * 8 and tf32()
        if REAL:
            assert AUCCLLoss().to(CUDA)(*views[0].to(CUDA)).item() == pytest.approx(exact.item(), rel=1e-5)
        utils.set_backends(CUDA, deterministic=True, tf32=False)
        assert not tf32() and torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
        assert torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("preset", ["paper", "hard", "quartic"])
@pytest.mark.parametrize("dim", [8, 128])  # of Gram matrices, of cosines
def test_the_objectives_products_are_exact_in_both_passes(preset, dim):
    seen, before = [], torch.get_float32_matmul_precision()

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            if operation.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm):
                seen.append(tf32())
            return operation(*args, **(kwargs or {}))
    criterion = AUCCLLoss.preset(preset)
    views = torch.randn(3, 24, dim, requires_grad=True)
    torch.set_float32_matmul_precision("high")
    try:
        with Products():
            for loss in criterion(*views), criterion.teacher_student(views[:2].detach(), views):
                forward = len(seen)
                loss.backward()
                assert len(seen) > forward > 0
        assert not any(seen) and tf32()
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_cpu_keeps_its_settings():
    before = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    for deterministic in (True, False):
        utils.set_backends(CPU, deterministic)
        assert before == (torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled())


def test_wide_networks_are_contiguous_in_float32_with_avx2_alone(monkeypatch):
    wide, narrow = torch.nn.Conv2d(3, 512, 1), torch.nn.Conv2d(3, 64, 1)
    settings = (wide, CPU, None), (narrow, CPU, None), (wide, CPU, torch.bfloat16), (wide, CUDA, None)
    for capability, first in (("AVX2", torch.contiguous_format), ("AVX512", torch.channels_last)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        assert [utils.memory_format(*s) for s in settings] == [first, *3 * [torch.channels_last]]


def test_the_stand_in_refuses_what_cuda_refuses(monkeypatch):
    here, numbers = torch.ones(2, 2), torch.arange(2)
    with FakeCuda(monkeypatch) as fake:
        there = torch.ones(2, 2, device="cuda")
        for mistake in (lambda: there + here, lambda: there @ here, lambda: here.add_(there),
                        lambda: here[there.long()], lambda: there.numpy(),
                        lambda: torch.rand(2, device="cuda", generator=torch.Generator())):
            with pytest.raises((DeviceError, RuntimeError)):
                mistake()
        assert not fake.waits and isinstance(there * torch.tensor(2.0), CudaTensor)
        for read in (lambda: there.sum().item(), lambda: there.tolist(), lambda: there[there > 0],
                     lambda: there[numbers], lambda: there.cpu(), lambda: here.to("cuda"),
                     lambda: torch.tensor([1.0], device="cuda")):
            before = len(fake.waits)
            read()
            assert len(fake.waits) > before
        assert all("test_device.py" in wait for wait in fake.waits)
