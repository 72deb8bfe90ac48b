"""Evaluates the features of a frozen backbone by weighted k-nearest neighbours.

    python eval_knn.py --pretrained_weights checkpoint.pth --data_path /path/to/imagenet
    torchrun --nproc_per_node=8 eval_knn.py --pretrained_weights checkpoint.pth --data_path /path/to/imagenet
    python eval_knn.py --pretrained_weights resnet50.safetensors --arch resnet50 --dataset cifar10 --download
    python eval_knn.py --random_weights --arch vit_small --data_path DIR           # the baseline of any table

DIR holds train/ and val/ (or test/), each with a folder of images for each class. As a function:

    accuracy = knn_accuracy(bank, bank_labels, queries, query_labels, ks=(10, 20, 100, 200))
    top1, top5 = accuracy[200]                                                      # percent

The classifier is that of Wu et al., "Unsupervised feature learning via non-parametric instance
discrimination" (CVPR 2018), as DINO uses it. The search is exact, in float32; ranks share the queries.
"""
import utils


def parse_args(argv=None):
    parser = utils.ArgumentParser(__doc__)
    add = parser.add_argument
    add("--nb_knn", type=utils.positive_int, nargs="+", default=[10, 20, 100, 200], help="voting neighbours")
    add("--temperature", type=utils.positive_float, default=0.07, help="T of the votes exp(cos / T)")
    add("--use_cuda", type=utils.boolean, default=True,
        help="features kept and searched on the GPU, if there is one; false: on the CPU")
    add("--dump_features", type=utils.path, help="folder to write features and labels to")
    add("--load_features", type=utils.path, help="folder to read them from, instead of computing them")
    add("--output_dir", type=utils.path, help="folder of knn.txt, which each result adds a line of JSON to")
    utils.add_evaluation_flags(parser)
    args = parser.parse_args(argv)
    if args.load_features:
        utils.refuse(args, ("pretrained_weights", "checkpoint_key", "random_weights", "arch", "patch_size",
                            "image_size", "data_path", "download", "dump_features"), "with --load_features")
    return args


if __name__ == "__main__":
    utils.check_flags(parse_args)

import torch  # noqa: E402

import data  # noqa: E402
import distributed  # noqa: E402
import pretrained  # noqa: E402
from neighbours import MAX_ELEMENTS, nearest_rows  # noqa: E402

DUMPS = "trainfeat.pth", "trainlabels.pth", "testfeat.pth", "testlabels.pth"


@torch.no_grad()
def knn_accuracy(bank, bank_labels, queries, query_labels, ks=(10, 20, 100, 200), temperature=0.07):
    """Top-1 and top-5 accuracy, in percent, by the votes of the k nearest neighbours: {k: (top1, top5)}.

    A neighbour adds exp(cos / temperature) to the score of its class; classes are ranked by score, and those
    without a vote are never predicted. A k above N takes the whole bank.

    bank: [N, D], queries: [Q, D], of any float dtype, normalised here; a zero row has cosine 0 with all.
    bank_labels: [N], query_labels: [Q], integers >= 0.
    Every rank gives the same arguments, classifies its share of the queries, and returns the same result.

    ValueError: shapes or labels that do not fit, no rows, features not finite.
    """
    _check("bank", bank, bank_labels, bank.shape[-1])
    _check("query", queries, query_labels, bank.shape[-1])
    device = torch.device("cpu") if bank.device.type == "mps" else bank.device  # MPS lacks float64
    bank_labels = bank_labels.to(device, torch.int64)
    num_classes, most = int(bank_labels.max()) + 1, min(max(ks), len(bank))
    size = max(1, MAX_ELEMENTS // (4 * max(most, num_classes)))
    hits = {k: torch.zeros(2, device=device) for k in ks}
    for block, truth in zip(*(distributed.share(rows).split(size) for rows in (queries, query_labels))):
        cos, nearest = nearest_rows(bank, block.to(device), most)                       # [q, most] each
        labels, truth = bank_labels[nearest], truth.to(device)[:, None]
        # relative to the nearest: the same ranking without overflow; and no vote vanishes
        votes = ((cos - cos[:, :1]).double() / temperature).exp().clamp_min(1e-300)
        scores, counted = votes.new_zeros(len(votes), num_classes), 0                   # [q, C]
        for k in sorted(hits):
            scores.scatter_add_(1, labels[:, counted:k], votes[:, counted:k])
            best, classes = scores.topk(min(5, num_classes))
            hit = (classes == truth) & (best > 0)
            hits[k] += torch.stack([hit[:, 0].sum(), hit.sum()])
            counted = k
    counts = distributed.sum_over_ranks(torch.stack(list(hits.values())))
    return dict(zip(hits, map(tuple, (100 * counts.cpu().double() / len(queries)).tolist())))


def _check(side, features, labels, width):
    if features.shape != (len(labels), width) or not features.is_floating_point() or not len(features):
        raise ValueError(f"{side} features must be floating point [{len(labels)}, {width}] to fit the "
                         f"labels and the bank, got {features.dtype} {list(features.shape)}")
    if not torch.stack(features.aminmax()).float().isfinite().all():
        raise ValueError(f"{side} features are not finite")
    if labels.dim() != 1 or labels.is_floating_point() or labels.min() < 0:
        raise ValueError(f"{side} labels must be integers >= 0 [N], got {labels.dtype} {list(labels.shape)}")


def read_features(folder):
    """Yields the features and labels that --dump_features, or DINO, wrote."""
    for path in (folder / name for name in DUMPS):
        try:
            tensor = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except OSError:
            raise
        except Exception:  # torch.load raises half a dozen types for damaged files
            tensor = None
        if not isinstance(tensor, torch.Tensor) or tensor.dim() == 0:
            raise utils.UserError(f"{path} is damaged or no tensor; write it again with --dump_features")
        yield tensor


def compute_features(args, device, keep_on):
    """Features and labels of the training and the test images, and the fields of a record."""
    backbone, description = pretrained.load_from_flags(args)
    transform = data.eval_transform(description.image_size, description.mean, description.std)
    splits = data.build_splits(args.dataset, args.data_path, transform, args.download)
    backbone.to(device)
    tensors = []
    for split, title in zip(splits, ("train features", "test features")):
        tensors += pretrained.extract_features(
            backbone, split, device, args.batch_size_per_gpu, args.num_workers,
            utils.select_amp(args.amp, device), title, keep_on=keep_on)
    return tensors, pretrained.describe_run(args, description)


def main(argv=None):
    args = parse_args(argv)
    device = distributed.init_distributed(args.device, args.dist_url)
    utils.set_backends(device, deterministic=False, tf32=False)
    for folder in filter(None, (args.output_dir, args.dump_features)):
        folder.mkdir(parents=True, exist_ok=True)
    keep_on = device if args.use_cuda and device.type == "cuda" else torch.device("cpu")
    if args.load_features:
        tensors = [tensor.to(keep_on) for tensor in read_features(args.load_features)]
        run = {"features": str(args.load_features)}
    else:
        tensors, run = compute_features(args, device, keep_on)
    if args.dump_features and distributed.rank() == 0:
        for name, tensor in zip(DUMPS, tensors):
            utils.save_checkpoint(tensor.cpu(), args.dump_features / name)

    bank, _, queries, _ = tensors
    if (above := [k for k in args.nb_knn if k > len(bank)]) and distributed.rank() == 0:
        print(f"note: k = {', '.join(map(str, above))}: the training set has {len(bank)} images; the "
              f"result is of k = {len(bank)}", flush=True)
    ks = sorted({min(k, len(bank)) for k in args.nb_knn})
    try:
        accuracy = knn_accuracy(*tensors, ks, args.temperature)
    except ValueError as error:  # files of --load_features that do not fit each other, say
        raise utils.UserError(f"{args.load_features or 'k-NN'}: {error}") from error
    run |= {"train_images": len(bank), "test_images": len(queries)}
    for k, (top1, top5) in accuracy.items():
        record = {**run, "k": k, "temperature": args.temperature, "top1": top1, "top5": top5}
        pretrained.write_record(record, args.output_dir and args.output_dir / "knn.txt")
    distributed.leave()


if __name__ == "__main__":
    utils.run_script(main)
