"""Shapes: small images drawn by code, in ten classes told apart by shape alone, to pretrain on offline.

    images, labels = draw_shapes("train")        # uint8 [5000, 3, 32, 32], int64 [5000]

An image holds four drawings of one shape, one in each quadrant of a cloudy grey ground; the shape is the
class. Place, size and angle are drawn anew for every drawing, so two crops of one image agree on the shape
and on little else: that is what a contrastive method can find, and what neighbours in pixel space miss. All
drawings are light and without a tint, and all shapes cover the same area: colours, or dark and light, would
be easier to agree on than the shape. Every shape is its own mirror image, so a flip keeps the class.

The bits are meant to be the same on every machine: random numbers are PCG64's raw stream, which NumPy
promises not to change, and become pixels by + - * / sqrt, comparison and rounding, which IEEE 754 fixes to
the last bit; the sums are of integers. Hence rotations without sin and cos, and no normal deviates.
"""
import numpy as np
import torch

PER_CLASS = {"train": 500, "test": 100}
SIZE = 32                  # pixels a side
SIDE = (0.22, 0.30)        # of the square with a drawing's area, in image sides
JITTER = 0.05              # of a drawing's place about the middle of its quadrant, in image sides
LIGHT = (0.85, 1.0)        # grey of a drawing
CLOUDS = 0.06              # the ground is 0.5 +- CLOUDS at the knots of a grid, interpolated between them
CLOUD_CELLS = 4            # of that grid, a side
NOISE = 0.1                # of every channel of every pixel, uniform in +- NOISE

# A shape is a field over the plane: negative inside, zero on the outline, and growing by at most about 1 per
# unit of length, so that a field in pixels becomes coverage by a clip. x, y: float32 arrays, y upwards.


def _disc(x, y, radius=1.0):
    return np.sqrt(x * x + y * y) - radius


def _box(x, y, half_width, half_height):
    return np.maximum(np.abs(x) - half_width, np.abs(y) - half_height)


def _ring(x, y):
    return np.abs(_disc(x, y)) - 0.25


def _triangle(x, y):
    return np.maximum(0.8660254 * np.abs(x) + 0.5 * y, -y) - 0.5


def _square(x, y):
    return _box(x, y, 1.0, 1.0)


def _star(x, y):
    # Five lines make a pentagram. A point inside of four is in it: its second largest distance is negative.
    normals = ((0.0, 1.0), (0.9510565, 0.309017), (-0.9510565, 0.309017),
               (0.5877853, -0.809017), (-0.5877853, -0.809017))
    return np.sort([across * x + up * y for across, up in normals], axis=0)[-2] - 0.4


def _cross(x, y):
    return np.minimum(_box(x, y, 1.0, 0.33), _box(x, y, 0.33, 1.0))


def _crescent(x, y):
    return np.maximum(_disc(x, y), -_disc(x - 0.5, y, 0.75))


def _heart(x, y):
    # a square on its corner and a disc on each of its upper edges
    x = np.abs(x)
    along, across = 0.7071068 * (x + y), 0.7071068 * (y - x)
    return np.minimum(_box(along, across, 0.5, 0.5), _disc(along - 0.5, across, 0.5))


def _bar(x, y):
    return _box(x, y, 1.0, 0.3)


def _tee(x, y):
    return np.minimum(_box(x, y - 0.7, 1.0, 0.3), _box(x, y + 0.3, 0.3, 0.8))


FIELDS = {"disc": _disc, "ring": _ring, "triangle": _triangle, "square": _square, "star": _star,
          "cross": _cross, "crescent": _crescent, "heart": _heart, "bar": _bar, "tee": _tee}
CLASSES = tuple(FIELDS)


def draw_shapes(split):
    """The split "train" or "test", the same bits every time: images, uint8 [N, 3, SIZE, SIZE], and labels,
    int64 [N], indices into CLASSES in turn (0, ..., 9, 0, ...), so that the first images are balanced too."""
    bits = np.random.PCG64((0, list(PER_CLASS).index(split)))
    count = PER_CLASS[split] * len(CLASSES)
    labels = np.arange(count) % len(CLASSES)
    pixel = (np.arange(SIZE, dtype=np.float32) + 0.5) / SIZE                      # centres, in image sides

    side = _uniform(bits, *SIDE, count, 4)
    cos, sin = _directions(bits, count, 4)
    quadrant = np.float32([[[0.25, 0.75, 0.25, 0.75]], [[0.25, 0.25, 0.75, 0.75]]])
    left, top = quadrant + _uniform(bits, -JITTER, JITTER, 2, count, 4)
    grey = _uniform(bits, *LIGHT, count, 4)

    images = _clouds(bits, count, pixel)                                          # [N, SIZE, SIZE]
    for label, field in enumerate(FIELDS.values()):
        across, up, unit_side = _measure(field)
        for drawing in range(4):
            of = lambda values: values[label::len(CLASSES), drawing, None, None]  # [n, 1, 1]  # noqa: E731
            x, y = pixel - of(left), of(top) - pixel[:, None]
            unit = of(side) / unit_side                                           # in image sides
            distance = field((of(cos) * x + of(sin) * y) / unit + across,
                             (of(cos) * y - of(sin) * x) / unit + up)             # [n, SIZE, SIZE]
            coverage = np.clip(0.5 - distance * unit * SIZE, 0, 1)
            ground = images[label::len(CLASSES)]
            ground += coverage * (of(grey) - ground)
    images = images[:, None] + NOISE * _noise(bits, (count, 3, SIZE, SIZE))        # [N, 3, SIZE, SIZE]
    images = np.rint(np.clip(images, 0, 1) * 255).astype(np.uint8)
    return torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))


def _uniform(bits, low, high, *shape):
    """float32 in [low, high); 24 random bits fill its mantissa, so the conversion is exact."""
    raw = bits.random_raw(int(np.prod(shape))).reshape(shape)
    return low + (high - low) * ((raw >> np.uint64(40)).astype(np.float32) / 2**24)


def _directions(bits, *shape):
    """Cosines and sines of random angles; the diagonals of their square are up to twice as likely."""
    x, y = _uniform(bits, -1, 1, 2, *shape)
    length = np.sqrt(x * x + y * y) + 1e-9
    return x / length, y / length


def _clouds(bits, count, pixel):
    """Bilinear interpolation of random greys: [count, size, size]."""
    knots = _uniform(bits, 0.5 - CLOUDS, 0.5 + CLOUDS, count, CLOUD_CELLS + 1, CLOUD_CELLS + 1)
    cell = (pixel * CLOUD_CELLS).astype(np.int64)
    part = pixel * CLOUD_CELLS - cell.astype(np.float32)
    rows = knots[:, cell] + part[:, None] * (knots[:, cell + 1] - knots[:, cell])
    return rows[..., cell] + part * (rows[..., cell + 1] - rows[..., cell])


def _noise(bits, shape):
    """float32 in [-1, 1] by single bytes, an eighth of the random numbers that `_uniform` would take."""
    count = int(np.prod(shape))
    raw = bits.random_raw(-(-count // 8)).astype("<u8").view(np.uint8)[:count]
    return raw.reshape(shape).astype(np.float32) / 127.5 - 1


def _measure(field):
    """Centroid (x, y) of a shape and the side of the square of its area, by counting cells of a fine grid."""
    cells = 150                                                                   # per unit of length
    axis = (np.arange(-2 * cells, 2 * cells, dtype=np.float32) + 0.5) / cells
    row, column = np.nonzero(field(axis, axis[:, None]) < 0)
    centroid = [np.float32((int(index.sum()) / len(index) + 0.5) / cells - 2) for index in (column, row)]
    return *centroid, np.float32(np.sqrt(len(row)) / cells)
