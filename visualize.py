"""Draws what a frozen backbone sees: one picture a call.

    python visualize.py attention --pretrained_weights checkpoint.pth --images a.jpg b.jpg     # attention.png
    python visualize.py patches --pretrained_weights checkpoint.pth --images *.jpg --resolution 448
    python visualize.py map --pretrained_weights checkpoint.pth --data_path LABELLED/val --method tsne
    python visualize.py map --pretrained_weights checkpoint.pth --dataset cifar10            # its test images

attention: of the class token in the last block of a ViT, head by head, and the mean over heads.
patches: the first three principal components of all images' patch tokens, as red, green and blue; of a
         network without tokens, of its last feature map.
map: features of class folders in two dimensions, coloured by class.
"""
import utils
from utils import UserError


def parse_args(argv=None):
    parser = utils.ArgumentParser(__doc__)
    add = parser.add_argument
    add("picture", choices=("attention", "patches", "map"), help="what to draw")
    add("--images", type=utils.path, nargs="+", help="images of attention and patches")
    add("--resolution", type=utils.positive_int, help="pixels a side of those images, a multiple of the "
        "patch size (default: --image_size)")
    add("--method", choices=("pca", "tsne"), help="projection of map (default: pca); tsne takes scikit-learn")
    add("--images_per_class", type=utils.positive_int, help="images of each class in map (default: 100)")
    add("--output", type=utils.path, help="PNG to write (default: PICTURE.png in the current folder)")
    utils.add_evaluation_flags(parser)
    args = parser.parse_args(argv)
    if args.picture == "map":
        utils.refuse(args, ("images", "resolution"), "with map")
        args.method, args.images_per_class = args.method or "pca", args.images_per_class or 100
    else:
        utils.refuse(args, ("method", "images_per_class", "data_path", "download"), f"with {args.picture}")
        if not args.images:
            raise UserError(f"--images is missing; name the images to draw the {args.picture} of")
    args.output = args.output or utils.Path(f"{args.picture}.png")
    return args


if __name__ == "__main__":
    utils.check_flags(parse_args)

import math  # noqa: E402
import textwrap  # noqa: E402

import matplotlib  # noqa: E402
import torch  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from timm.layers import to_2tuple  # noqa: E402

import data  # noqa: E402
import distributed  # noqa: E402
import pretrained  # noqa: E402
from vision_transformer import ResNet  # noqa: E402

NAMED = 40  # classes that a legend has place for


@torch.inference_mode()
def last_attention(backbone, images):
    """Attention of the last block's heads, images [B, 3, S, S] -> [B, heads, N, N] with rows that sum to 1.
    The class token is row and column 0; the last columns are the patches. UserError for other networks."""
    blocks, found = getattr(backbone, "blocks", None), []
    attention = getattr(blocks[-1], "attn", None) if blocks else None
    if hasattr(attention, "attn_drop") and getattr(backbone, "cls_token", None) is not None:
        hook = attention.attn_drop.register_forward_pre_hook(lambda module, inputs: found.append(inputs[0]))
        fused, attention.fused_attn = attention.fused_attn, False  # the fused product never holds the matrix
        try:
            backbone(images)
        finally:
            hook.remove()
            attention.fused_attn = fused
    if not found or math.isqrt(patches := found[0].shape[-1] - backbone.num_prefix_tokens) ** 2 != patches:
        raise UserError("this network has no attention of a class token over patches, which only ViTs have; "
                        "draw patches or map")
    return found[0]


@torch.inference_mode()
def patch_features(backbone, images):
    """Patch tokens of a ViT, or the last feature map: images [B, 3, S, S] -> [B, h, w, D]. UserError for a
    network that has neither."""
    if isinstance(backbone, ResNet):
        return torch.nn.Sequential(*list(backbone)[:-2])(images).movedim(1, -1)
    features = backbone.forward_features(images)
    if isinstance(features, torch.Tensor) and features.dim() == 4:
        return features if getattr(backbone, "output_fmt", "NCHW") == "NHWC" else features.movedim(1, -1)
    if isinstance(features, torch.Tensor) and features.dim() == 3:
        tokens = features[:, getattr(backbone, "num_prefix_tokens", 0):]  # [B, h * w, D]
        if (side := math.isqrt(tokens.shape[1])) ** 2 == tokens.shape[1]:
            return tokens.unflatten(1, (side, side))
    raise UserError("this network's features are no grid of patches; draw map")


def principal_components(rows, count):
    """Projections [N, count] of rows [N, D] on their first principal components, and each one's share of the
    variance [count]. The sign of a component makes its largest entry positive."""
    rows = rows.cpu().double()
    rows = rows - rows.mean(0)
    values, vectors = torch.linalg.eigh(rows.T @ rows)
    values, vectors = values.flip(0), vectors.flip(1)[:, :count]
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))  # [1, count]
    return rows @ (vectors * largest.sign()), values[:count] / values.sum().clamp_min(1e-30)


def image_grid(rows, title):
    """A figure of images [h, w, 3] or maps [h, w]; rows: lists, of equal length, of (image, label)."""
    figure = Figure((1.7 * len(rows[0]), 1.9 * len(rows) + 0.5), layout="compressed")
    for panels, row in zip(figure.subplots(len(rows), len(rows[0]), squeeze=False), rows):
        for panel, (image, label) in zip(panels, row):
            panel.imshow(image.numpy(), cmap="inferno", interpolation="nearest")
            panel.set_title(label, fontsize=8)
            panel.axis("off")
    figure.suptitle(textwrap.fill(title, max(40, 24 * len(rows[0]))), fontsize=10)
    return figure


def image_picture(args, backbone, description, device):
    """The figure of attention or patches."""
    size = args.resolution or description.image_size
    patch = to_2tuple(getattr(getattr(backbone, "patch_embed", None), "patch_size", 1))[0]
    if size % patch:
        raise UserError(f"--resolution {size} is no multiple of the patch size {patch}")
    transform = data.eval_transform(size, description.mean, description.std)
    images = torch.stack([transform(data.load_image(path)) for path in args.images])   # [B, 3, S, S]
    mean, std = (torch.tensor(values)[:, None, None] for values in (description.mean, description.std))
    seen = (images * std + mean).clamp(0, 1).movedim(1, -1)                         # [B, S, S, 3]
    names = [utils.caption(path.stem, 20) for path in args.images]
    compute = last_attention if args.picture == "attention" else patch_features
    found = torch.cat([compute(backbone, image[None].to(device)).cpu() for image in images])
    network = f"{description.arch}, images of {size} pixels"

    if args.picture == "attention":
        maps = 100 * found[:, :, 0, backbone.num_prefix_tokens:]                    # [B, heads, h * w]
        maps = torch.cat([maps.mean(1, keepdim=True), maps], 1)
        maps = maps.unflatten(2, (math.isqrt(maps.shape[2]), -1))                   # [B, 1 + heads, h, w]
        rows = [[(image, name)] + [
            (values, f"{f'head {head}' if head else 'mean'}: {values.min():.2g} to {values.max():.2g} %")
            for head, values in enumerate(row)] for image, name, row in zip(seen, names, maps)]
        return image_grid(rows, f"Attention of the class token to each patch, last block ({network})")
    points, shares = principal_components(found.flatten(0, 2), 3)
    low, high = points.quantile(torch.tensor([0.01, 0.99], dtype=points.dtype), dim=0)
    colours = ((points - low) / (high - low).clamp_min(1e-30)).clamp(0, 1).unflatten(0, found.shape[:3])
    return image_grid([[*zip(seen, names)], [(colour, "") for colour in colours]],
                      "Principal components 1, 2, 3 of all patches as red, green, blue: "
                      f"{100 * shares.sum():.0f} % of their variance ({network})")


def map_picture(args, backbone, description, device):
    """The figure of features in two dimensions."""
    transform = data.eval_transform(description.image_size, description.mean, description.std)
    if args.dataset != "folder":
        images = data.build_dataset(args.dataset, args.data_path, "test", transform, args.download)
    elif args.data_path:
        source = data.ClassFolders(args.data_path)
        images = data.LabelledImages(source, source.classes, source.targets, transform)
    else:
        raise UserError("--data_path is missing; name a folder of class folders, or --dataset")
    chosen, _ = data.split_by_class(
        torch.tensor(images.targets), lambda counts: counts.clamp_max(args.images_per_class),
        torch.Generator().manual_seed(args.seed))
    features, labels = pretrained.extract_features(
        backbone, images.subset(chosen.tolist(), transform), device, args.batch_size_per_gpu,
        args.num_workers, utils.select_amp(args.amp, device), keep_on=torch.device("cpu"))
    features = torch.nn.functional.normalize(features, dim=1)

    figure = Figure((9, 6.5), layout="constrained")
    axis = figure.subplots()
    if args.method == "tsne":
        try:
            from sklearn.manifold import TSNE
        except ImportError as error:
            raise UserError("--method tsne needs scikit-learn; install it, or take pca") from error
        tsne = TSNE(init="pca", perplexity=min(30, (len(features) - 1) / 3), random_state=args.seed % 2**32)
        points, title = tsne.fit_transform(features.numpy()), "t-SNE"
        axis.set(xticks=(), yticks=())
    else:
        points, shares = principal_components(features, 2)
        points, title = points.numpy(), "PCA"
        axis.set(xlabel=f"component 1 ({100 * shares[0]:.0f} % of the variance)",
                 ylabel=f"component 2 ({100 * shares[1]:.0f} %)")
    classes = images.classes or [f"class {label}" for label in range(max(images.targets) + 1)]
    few = len(classes) <= 20
    colours = matplotlib.colormaps["tab10" if len(classes) <= 10 else "tab20" if few else "hsv"]
    for label, name in enumerate(classes):
        colour = colours(label if few else label / len(classes))
        axis.scatter(*points[(labels == label).numpy()].T, s=16, color=colour, alpha=0.8, lw=0,
                     label=utils.caption(name, 30))
    axis.set_aspect("equal")
    axis.set_title(f"{title} of the features of {len(points):,} images of {len(classes)} classes "
                   f"({description.arch})")
    if len(classes) <= NAMED:
        figure.legend(loc="outside right center", ncols=1 if few else 2, frameon=False, markerscale=2)
    return figure


def main(argv=None):
    args = parse_args(argv)
    device = distributed.init_distributed(args.device, args.dist_url)
    utils.set_backends(device, deterministic=False, tf32=False)
    backbone, description = pretrained.load_from_flags(args)
    draw = map_picture if args.picture == "map" else image_picture
    figure = draw(args, backbone.to(device), description, device)
    if distributed.rank() == 0:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        utils.replace_file(args.output, lambda file: figure.savefig(
            file, format="png", dpi=120, bbox_inches="tight", pad_inches=0.1), "wb")
        print(f"{args.picture}: {args.output}", flush=True)
    distributed.leave()


if __name__ == "__main__":
    utils.run_script(main)
