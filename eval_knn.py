"""Evaluates the features of a frozen backbone by weighted k-nearest neighbours.

    python eval_knn.py --pretrained_weights checkpoint.pth --data_path /path/to/imagenet
    torchrun --nproc_per_node=8 eval_knn.py --pretrained_weights checkpoint.pth --data_path /path/to/imagenet
    python eval_knn.py --pretrained_weights resnet50.safetensors --arch resnet50 --dataset cifar10 --download
    python eval_knn.py --random_weights --arch vit_small --data_path DIR                # the baseline of any table

DIR holds train/ and val/ (or test/), each with a folder of images for each class. As a function:

    accuracy = knn_accuracy(bank, bank_labels, queries, query_labels, ks=(10, 20, 100, 200))
    top1, top5 = accuracy[200]                                                          # percent

The classifier is that of Wu et al., "Unsupervised feature learning via non-parametric instance discrimination" (CVPR
2018), as DINO uses it. The search is exact and in float32; several ranks share the queries.
"""
import utils


def parse_args(argv=None):
    parser = utils.ArgumentParser(__doc__)
    add = parser.add_argument
    add("--nb_knn", type=utils.positive_int, nargs="+", default=[10, 20, 100, 200], help="numbers of neighbours that vote")
    add("--temperature", type=utils.positive_float, nargs="+", default=[0.07], help="temperatures T of the votes exp(cos / T)")
    add("--use_cuda", type=utils.boolean, default=True,
        help="on a GPU, keep the features and search there; false: on the CPU, which may have more memory")
    add("--dump_features", type=utils.path, help="folder to write features and labels to")
    add("--load_features", type=utils.path, help="folder to read them from, instead of computing them")
    add("--output_dir", type=utils.path, help="folder of knn.txt, to which results are appended, one JSON object a line")
    utils.add_evaluation_flags(parser)
    args = parser.parse_args(argv)
    if args.load_features:
        utils.refuse(args, ("pretrained_weights", "checkpoint_key", "random_weights", "arch", "patch_size", "image_size",
                            "data_path", "download", "dump_features"), "with --load_features")
    if args.random_weights:
        utils.refuse(args, ("pretrained_weights", "checkpoint_key"), "with --random_weights")
    if args.dataset == "folder":
        utils.refuse(args, ("download",), "with --dataset folder")
    return args


if __name__ == "__main__":
    utils.check_flags(parse_args)

from contextlib import contextmanager  # noqa: E402

import torch  # noqa: E402

import data  # noqa: E402
import distributed  # noqa: E402
import pretrained  # noqa: E402

DUMPS = "trainfeat.pth", "trainlabels.pth", "testfeat.pth", "testlabels.pth"
QUERIES = 256       # queries compared together
NUMBERS = 2 ** 25   # numbers in each tensor held at once: 128 MB in float32


def knn_accuracy(bank, bank_labels, queries, query_labels, ks=(10, 20, 100, 200), temperature=0.07, num_classes=None):
    """Top-1 and top-5 accuracy, in percent, of the votes of each query's k nearest neighbours: {k: (top1, top5)}.

    A neighbour adds exp(cos / temperature) to the score of its class. Only classes that got a vote are predicted, so
    that with k < 5 neighbours there are at most k predictions. A k above N takes the whole bank.

    bank: [N, D], queries: [Q, D], of any float dtype, normalised here; a zero row has cosine 0 with all.
    bank_labels: [N], query_labels: [Q], integers. num_classes: by default the bank's largest label plus one; queries
        of other classes are misses.
    Every rank calls this with the same arguments, classifies its share of the queries, and returns the same result.

    ValueError: shapes or labels that do not fit, no rows, features that are not finite, k < 1, temperature <= 0.
    """
    accuracy = knn_sweep(bank, bank_labels, queries, query_labels, ks, (temperature,), num_classes)
    return {k: accuracy[k, temperature] for k in ks}


@torch.no_grad()
def knn_sweep(bank, bank_labels, queries, query_labels, ks, temperatures, num_classes=None):
    """`knn_accuracy` of several temperatures by one search: {(k, temperature): (top1, top5)}."""
    _check_features(bank, bank_labels, queries, query_labels)
    if min(ks, default=0) < 1 or not min(temperatures, default=0) > 0:
        raise ValueError(f"k must be at least 1 and temperatures positive, got {ks} and {temperatures}")
    num_classes = num_classes or int(bank_labels.max()) + 1
    if bank_labels.min() < 0 or bank_labels.max() >= num_classes:
        raise ValueError(f"bank labels must lie in [0, {num_classes}), got {int(bank_labels.min())} to "
                         f"{int(bank_labels.max())}")
    device = torch.device("cpu") if bank.device.type == "mps" else bank.device  # MPS lacks float64
    bank_labels = bank_labels.to(device, torch.int64)
    most = min(max(ks), len(bank))
    size = max(1, NUMBERS // (4 * max(most, num_classes)))
    hits = {(k, temperature): torch.zeros(2, dtype=torch.int64, device=device) for k in ks for temperature in temperatures}
    for block, truth in zip(distributed.share(queries).split(size), distributed.share(query_labels).split(size)):
        cos, nearest = _search(bank, block.to(device), most)                            # [q, most] each
        labels, truth = bank_labels[nearest], truth.to(device)[:, None]
        for temperature in temperatures:
            # Relative to the nearest: the same ranking without overflow. A vote never vanishes.
            votes = ((cos - cos[:, :1]).double() / temperature).exp().clamp_min(1e-300)
            scores, counted = votes.new_zeros(len(votes), num_classes), 0               # [q, C]
            for k in sorted(set(ks)):
                scores.scatter_add_(1, labels[:, counted:k], votes[:, counted:k])
                counted = k
                best, classes = scores.topk(min(5, num_classes))
                hit = (classes == truth) & (best > 0)
                hits[k, temperature] += torch.stack([hit[:, 0].sum(), hit.sum()])
    counts = distributed.sum_over_ranks(torch.stack(list(hits.values()))).double()
    return dict(zip(hits, map(tuple, (100 * counts / len(queries)).tolist())))


def _search(bank, queries, k):
    """Cosines (float32) and bank indices of each query's k <= N nearest rows of the bank, nearest first: [Q, k] each."""
    queries = _unit_rows(queries)
    cos = queries.new_full((len(queries), k), -2.0)
    index = torch.zeros_like(cos, dtype=torch.int64)
    size = max(1, NUMBERS // max(QUERIES, bank.shape[1]))
    product = queries.new_empty(min(QUERIES, len(queries)), min(size, len(bank)))       # fresh memory is slow on a CPU
    with _full_float32(queries.device.type):
        for start in range(0, len(bank), size):
            rows = _unit_rows(bank[start:start + size].to(queries.device))
            for chunk, best, nearest in zip(queries.split(QUERIES), cos.split(QUERIES), index.split(QUERIES)):
                all_cos = torch.mm(chunk, rows.T, out=product[:len(chunk), :len(rows)])             # [q, n]
                found, column = all_cos.topk(min(k, len(rows)))
                found, order = torch.cat([best, found], 1).topk(k)
                nearest.copy_(torch.cat([nearest, column + start], 1).gather(1, order))
                best.copy_(found)
    return cos, index


def _unit_rows(features):
    """Rows of length one in float32; a zero row stays zero. Divided by its largest entry first, lest squares overflow."""
    features = features.float()
    largest = torch.linalg.vector_norm(features, torch.inf, dim=1, keepdim=True)
    return torch.nn.functional.normalize(features / largest.clamp_min(torch.finfo(torch.float32).tiny), dim=1)


@contextmanager
def _full_float32(device_type):
    """Turns off autocast, and the TF32 and bfloat16 products that training may have turned on for float32."""
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before):
            backend.fp32_precision = precision


def _check_features(bank, bank_labels, queries, query_labels):
    if bank.dim() != 2 or queries.dim() != 2 or bank.shape[1] != queries.shape[1]:
        raise ValueError(f"bank and queries must be [N, D] and [Q, D], got {list(bank.shape)} and {list(queries.shape)}")
    for side, features, labels in (("bank", bank, bank_labels), ("query", queries, query_labels)):
        if labels.shape != (len(features),) or labels.is_floating_point():
            raise ValueError(f"{side} labels must be {len(features)} integers, got {labels.dtype} {list(labels.shape)}")
        if features.numel() == 0 or not features.is_floating_point():
            raise ValueError(f"{side} features must be floating point and not empty, got {features.dtype} {list(features.shape)}")
        if not torch.stack(features.aminmax()).isfinite().all():
            raise ValueError(f"{side} features are not finite")
