"""Time and memory of eval_knn.py's k-NN classifier against the dense one-hot vote.

    python benchmarks/knn.py                                          # 50,000 x 10,000 images, 1,000 classes
    python benchmarks/knn.py --bank 10000 --queries 2000 --runs 5     # seconds
    python benchmarks/knn.py --device cuda

The dense vote is the usual code: for a hundredth of the queries at a time, the neighbours' classes as a
one-hot tensor [q, k, C] times their weights, a sum over neighbours, a sort over classes. Runs alternate,
medians are printed. Memory is the peak of a fresh process, or of the GPU, above what it held before the call.
"""
import functools
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import utils  # noqa: E402
from benchmarks.measure import alternate, extra_memory, machine  # noqa: E402
from eval_knn import knn_accuracy  # noqa: E402


def ours(bank, bank_labels, queries, query_labels, k, num_classes):
    return knn_accuracy(bank, bank_labels, queries, query_labels, (k,))[k]


@torch.no_grad()
def dense(bank, bank_labels, queries, query_labels, k, num_classes, temperature=0.07):
    size, hits = max(1, len(queries) // 100), torch.zeros(2, device=bank.device)
    for chunk, truth in zip(queries.split(size), query_labels.split(size)):
        cos, index = (chunk @ bank.T).topk(k)                                           # [q, k]
        one_hot = F.one_hot(bank_labels[index], num_classes).float()                    # [q, k, C]
        scores = (one_hot * (cos / temperature).exp()[..., None]).sum(1)                # [q, C]
        hit = scores.sort(1, descending=True).indices[:, :5] == truth[:, None]
        hits += torch.stack([hit[:, 0].sum(), hit.sum()])
    return tuple((100 * hits / len(queries)).tolist())


METHODS = {"ours": ours, "dense": dense}


def problem(bank, queries, dim, num_classes, k, device):
    """Arguments of a method: features of length one around random class centres."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(num_classes, dim, generator=generator)
    labels = [torch.randint(num_classes, (count,), generator=generator) for count in (bank, queries)]
    features = [F.normalize(centres[classes] + 4 * torch.randn(len(classes), dim, generator=generator), dim=1)
                for classes in labels]
    tensors = (tensor.to(device) for pair in zip(features, labels) for tensor in pair)
    return *tensors, min(k, bank), num_classes


def make_call(name, sizes):
    """A call of a method, without arguments, for `extra_memory`."""
    METHODS[name](*problem(2000, 200, 64, 10, 10, sizes[-1]))  # loads what torch loads late
    return functools.partial(METHODS[name], *problem(*sizes))


def main(argv=None):
    parser = utils.ArgumentParser(__doc__)
    for name, default in (("bank", 50000), ("queries", 10000), ("dim", 512), ("classes", 1000), ("k", 200),
                          ("runs", 3), ("threads", torch.get_num_threads())):
        parser.add_argument(f"--{name}", type=utils.positive_int, default=default)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    print(f"{machine()}; {vars(args)}")
    sizes = args.bank, args.queries, args.dim, args.classes, args.k, args.device
    arguments = problem(*sizes)
    for name, method in METHODS.items():
        print("{}: top-1 {:.2f}, top-5 {:.2f}".format(name, *method(*arguments)), flush=True)
    calls = {name: functools.partial(method, *arguments) for name, method in METHODS.items()}
    for name, times in alternate(calls, args.runs, warmup=1 if args.device != "cpu" else 0).items():
        wall, cpu = map(statistics.median, times)
        memory = extra_memory(make_call, name, sizes, device=args.device)
        print(f"{name:5}  median {wall:7.2f} s  CPU {cpu:7.2f} s  extra memory {memory:6.0f} MB")


if __name__ == "__main__":
    utils.run_script(main)
