"""Writes the features of all images of a folder; finds images like given ones, and near-duplicates.

    python embed.py --pretrained_weights checkpoint.pth --data_path PHOTOS --output_dir OUT
    torchrun --nproc_per_node=8 embed.py ...                     # each process embeds its share
    python embed.py ... --query a.jpg b.jpg --neighbours 10      # neighbours.png, neighbours.csv
    python embed.py ... --duplicates 0.95                        # duplicates.csv: pairs with a higher cosine

PHOTOS may be flat or nested, labelled or not. OUT receives features.npy [N, D] (float32), files.txt with the
names in the same order, and features.json, which tells what made them. In Python:

    features = np.load("OUT/features.npy", mmap_mode="r")        # read where it is used: any size

Features that the same network made of the same files are not computed again. A file that changed under
the same name goes unnoticed: remove features.npy then.
"""
import utils

PICTURED = 50  # queries in neighbours.png


def parse_args(argv=None):
    parser = utils.ArgumentParser(__doc__)
    add = parser.add_argument
    add("--data_path", type=utils.path, required=True, help="folder of images, read with all its subfolders")
    add("--output_dir", type=utils.path, required=True, help="output folder")
    add("--query", type=utils.path, nargs="+", help="images to find the neighbours of; neighbours.png shows "
        f"the first {PICTURED}")
    add("--neighbours", type=utils.number(int, 1, 100), default=10, help="neighbours of each query")
    add("--duplicates", type=utils.probability, help="cosine above which pairs are listed, such as 0.95")
    add("--skip_bad_images", action="store_true", help="rows of zeros for undecodable images")
    utils.add_backbone_flags(parser)
    parser.set_defaults(dataset="folder")
    return parser.parse_args(argv)


if __name__ == "__main__":
    utils.check_flags(parse_args)

import csv  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
import zlib  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from PIL import ImageOps  # noqa: E402

import data  # noqa: E402
import distributed  # noqa: E402
import pretrained  # noqa: E402
from neighbours import nearest_rows, similar_pairs  # noqa: E402
from utils import UserError  # noqa: E402


class Images(torch.utils.data.Dataset):
    """(transformed image, True) of every file, or (zeros, False) and a note if it cannot be decoded."""

    def __init__(self, folder, files, description, skip_bad):
        self.folder, self.files, self.skip_bad, self.size = folder, files, skip_bad, description.image_size
        self.transform = data.eval_transform(self.size, description.mean, description.std)

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        try:
            return self.transform(data.load_image(self.folder / self.files[index])), True
        except UserError as error:
            if not self.skip_bad:
                raise UserError(f"{error}, or add --skip_bad_images") from error
            print(f"note: {error}; its features are zeros", file=sys.stderr, flush=True)
            return torch.zeros(3, self.size, self.size), False


def write_features(path, count, width, batches):
    """Writes a .npy file [count, width] of float32, under a temporary name until all rows are there.
    batches(rows): yields the features [b, width] of a range of images; each rank writes its own range."""
    rank, world = distributed.rank(), distributed.world_size()
    own = range(count * rank // world, count * (rank + 1) // world)

    def write_own(file):  # not through a memory map: a full disk would be a SIGBUS
        file.seek(-4 * width * (count - own.start), os.SEEK_END)
        for features in batches(own):
            file.write(features.cpu().numpy().astype("<f4").tobytes())
        file.flush()
        distributed.barrier()

    def write_all(file):
        np.lib.format.write_array_header_1_0(
            file, {"descr": "<f4", "fortran_order": False, "shape": (count, width)})
        file.truncate(file.tell() + 4 * width * count)
        distributed.barrier()  # now the others may open it
        write_own(file)

    if rank == 0:
        utils.replace_file(path, write_all, "wb")
    else:
        distributed.barrier()
        with open(path.with_name(path.name + ".partial"), "r+b") as file:  # replace_file's temporary name
            write_own(file)
    distributed.barrier()


def features_of_folder(args, files, backbone, description, batches):
    """The features [N, D] of the files, in a memory map; computed unless args.output_dir holds them."""
    path, record = args.output_dir / "features.npy", args.output_dir / "features.json"
    listing = b"".join(os.fsencode(name) + b"\n" for name in files)
    if listing.count(b"\n") > len(files):
        raise UserError(f"the name of a file in {args.data_path} has a line break; rename it")
    made_by = json.dumps({**pretrained.describe_run(args, description), "amp": args.amp, "images": len(files),
                          "files_crc32": zlib.crc32(listing),
                          "weights_crc32": pretrained.checksum(backbone)}, indent=1)
    same = path.exists() and record.exists() and record.read_text() == made_by
    distributed.barrier()  # all have read the record
    if same and distributed.rank() == 0:
        print(f"note: {path} is of this network and these files; remove it to compute it again", flush=True)
    if not same:
        record.unlink(missing_ok=True)
        write_features(path, len(files), backbone.embed_dim,
                       lambda rows: batches(args.data_path, files[rows.start:rows.stop]))
        if distributed.rank() == 0:
            utils.replace_file(path.with_name("files.txt"), lambda file: file.write(listing), "wb")
            utils.replace_file(record, lambda file: file.write(made_by))
            print(f"features {len(files)} x {backbone.embed_dim}: {path}", flush=True)
    return torch.from_numpy(np.load(path, mmap_mode="c"))  # "c", as torch warns of read-only arrays


def write_neighbours(args, files, features, queries):
    """Writes neighbours.csv and neighbours.png: the nearest images of every query, itself left out.
    features: [N, D] of the files. queries: [Q, D] of the images args.query."""
    found, rows = [], [("query", "rank", "file", "cosine")]
    cosines, indices = nearest_rows(features, queries, min(args.neighbours + 1, len(files)))
    for query, cos, index in zip(args.query, cosines.tolist(), indices.tolist()):
        near = [(files[i], c) for i, c in zip(index, cos)
                if c != 0 and not os.path.samefile(args.data_path / files[i], query)]  # 0: undecodable
        found.append(near[:args.neighbours])
        rows += [(query, rank, name, f"{c:.4f}") for rank, (name, c) in enumerate(found[-1], 1)]
    utils.replace_file(args.output_dir / "neighbours.csv", lambda file: csv.writer(file).writerows(rows))

    found = found[:PICTURED]
    columns = 1 + max(map(len, found))
    figure = Figure((1.3 * columns, 1.62 * len(found)), layout="constrained")
    for panels, query, near in zip(figure.subplots(len(found), columns, squeeze=False), args.query, found):
        shown = [(query, "query"), *((args.data_path / name, f"{c:.3f}") for name, c in near)]
        for panel, (path, title) in zip(panels, shown):
            panel.imshow(ImageOps.fit(data.load_image(path), (160, 160)))
            panel.set_title(title, fontsize=9, fontweight="bold" if title == "query" else None, pad=3)
            name = utils.caption(f"{path.parent.name}/{path.stem}", 26)
            panel.text(0.5, -0.03, name, fontsize=6, ha="center", va="top", transform=panel.transAxes)
        for panel in panels:
            panel.axis("off")
    path = args.output_dir / "neighbours.png"
    utils.replace_file(path, lambda file: figure.savefig(file, format="png", dpi=110), "wb")
    print(f"neighbours of {len(args.query)} images: {path}", flush=True)


def main(argv=None):
    args = parse_args(argv)
    device = distributed.init_distributed(args.device, args.dist_url)
    utils.set_backends(device, deterministic=False, tf32=False)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for query in args.query or ():
        data.load_image(query)  # a mistake is reported before all images are read
    files = data.image_files(args.data_path)
    backbone, description = pretrained.load_from_flags(args)
    backbone.to(device)

    def batches(folder, files):
        images = Images(folder, files, description, args.skip_bad_images)
        loader = data.make_loader(images, device, args.num_workers, batch_size=args.batch_size_per_gpu)
        loader = utils.progress(loader, 0, len(loader), "features", quiet=distributed.rank() > 0)
        for features, decoded in pretrained.feature_batches(backbone, loader, device,
                                                            utils.select_amp(args.amp, device)):
            yield features * decoded.to(device)[:, None]

    features = features_of_folder(args, files, backbone, description, batches)
    if args.query and distributed.rank() == 0:
        write_neighbours(args, files, features, torch.cat([*batches(utils.Path(), args.query)]))
    if args.duplicates is not None:
        cosines, pairs = similar_pairs(features, args.duplicates, device)
        if distributed.rank() == 0:
            path = args.output_dir / "duplicates.csv"
            rows = [("file", "other", "cosine"), *((files[i], files[j], f"{cos:.4f}")
                                                   for cos, (i, j) in zip(cosines.tolist(), pairs.tolist()))]
            utils.replace_file(path, lambda file: csv.writer(file).writerows(rows))
            print(f"{len(pairs)} pairs above {args.duplicates:g}: {path}", flush=True)
    distributed.leave()


if __name__ == "__main__":
    utils.run_script(main)
