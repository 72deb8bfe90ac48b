"""Time and memory of the k-NN classifier in eval_knn.py against the dense one-hot vote.

    python benchmarks/knn.py                                            # 50,000 x 10,000 images, 1,000 classes; minutes
    python benchmarks/knn.py --bank 10000 --queries 2000 --runs 5       # seconds

The peer is the usual code: for a hundredth of the queries at a time, one product with the whole bank, topk, the neighbours'
classes as a one-hot tensor [q, k, C] times their weights, a sum over neighbours, a sort over classes. Both are given float32
features of length one and return top-1 and top-5. Runs alternate and medians are compared; where others use the machine too, CPU
time is the steadier figure. Memory is the peak of a fresh process above what it held before the call.
"""
import argparse
import functools
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measure import alternate, extra_memory, machine  # noqa: E402
from eval_knn import knn_accuracy  # noqa: E402


def ours(bank, bank_labels, queries, query_labels, k, num_classes):
    return knn_accuracy(bank, bank_labels, queries, query_labels, (k,), num_classes=num_classes)[k]


@torch.no_grad()
def dense(bank, bank_labels, queries, query_labels, k, num_classes, temperature=0.07):
    rows = max(1, len(queries) // 100)
    one_hot = torch.empty(rows, k, num_classes)                                         # reused by every chunk
    hits = torch.zeros(2)
    for chunk, truth in zip(queries.split(rows), query_labels.split(rows)):
        cos, index = (chunk @ bank.T).topk(k)                                           # [q, k]
        ballots = one_hot[:len(chunk)].zero_().scatter_(2, bank_labels[index][..., None], 1.0)
        scores = (ballots * (cos / temperature).exp()[..., None]).sum(1)                # [q, k, C] -> [q, C]
        hit = scores.sort(1, descending=True).indices[:, :5] == truth[:, None]
        hits += torch.stack([hit[:, 0].sum(), hit.sum()])
    return tuple((100 * hits / len(queries)).tolist())


METHODS = {"ours": ours, "dense": dense}


def problem(bank, queries, dim, num_classes, k, spread=4.0):
    """Arguments of a method: features of length one around random class centres, made in place so that memory peaks later."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(num_classes, dim, generator=generator)
    arguments = []
    for count in (bank, queries):
        labels = torch.randint(num_classes, (count,), generator=generator)
        features = torch.empty(count, dim)
        for rows, classes in zip(features.split(1000), labels.split(1000)):
            rows.normal_(0, spread, generator=generator).add_(centres[classes])
            rows /= rows.norm(dim=1, keepdim=True)
        arguments += [features, labels]
    return *arguments, min(k, bank), num_classes


def make_call(name, sizes):
    """A call without arguments of a method, for `extra_memory`."""
    METHODS[name](*problem(2000, 200, 64, 10, 10))                                      # loads what torch loads on first use
    arguments = problem(*sizes)
    return lambda: METHODS[name](*arguments)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bank", type=int, default=50000, help="images in the bank")
    parser.add_argument("--queries", type=int, default=10000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--k", type=int, default=200)
    parser.add_argument("--runs", type=int, default=3, help="timed runs of each method, after one that warms up")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{machine()}; {vars(args)}")

    sizes = args.bank, args.queries, args.dim, args.classes, args.k
    memory = {name: extra_memory(make_call, name, sizes) for name in METHODS}
    arguments = problem(*sizes)
    for name, method in METHODS.items():
        print("{}: top-1 {:.2f}, top-5 {:.2f}".format(name, *method(*arguments)), flush=True)      # warms up, and shows that they agree
    times = alternate({name: functools.partial(method, *arguments) for name, method in METHODS.items()}, args.runs, warmup=0)
    figures = {name: (*map(statistics.median, times[name]), memory[name]) for name in METHODS}
    for name, (seconds, cpu_seconds, megabytes) in figures.items():
        print(f"{name:5}  median {seconds:7.2f} s  CPU {cpu_seconds:7.2f} s  extra memory {megabytes:6.0f} MB")
    print("dense / ours: time {:.2f}, CPU time {:.2f}, memory {:.2f}".format(*(d / o for d, o in zip(figures["dense"], figures["ours"]))))


if __name__ == "__main__":
    main()
