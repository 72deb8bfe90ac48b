"""Weighted k-nearest-neighbour classification of frozen features.

    accuracy = knn_accuracy(bank, bank_labels, queries, query_labels, ks=(10, 20, 100, 200))
    top1, top5 = accuracy[200]                                                             # percent

The classifier is that of Wu et al., "Unsupervised feature learning via non-parametric instance discrimination" (CVPR 2018), as
DINO uses it. The search is exact, in float32, and holds a few chunks in memory whatever the number of images, classes and
neighbours.
"""
from contextlib import contextmanager

import torch

QUERY_CHUNK, BANK_CHUNK = 256, 65536        # rows; their cosines are 64 MB
BANK_FEATURES = 2 ** 24                     # normalised features of the bank held at once; 64 MB
NEIGHBOURS = 2 ** 20                        # neighbours kept at once, over all queries; 8 MB of keys
SCORES = 2 ** 18                            # class scores held at once; 2 MB
BLOCK, PART = 32, 4                         # columns that the search discards together
LAST = torch.iinfo(torch.int64).min         # the key behind every neighbour's


@torch.no_grad()
def knn_accuracy(bank, bank_labels, queries, query_labels, ks=(10, 20, 100, 200), temperature=0.07, num_classes=None, vote="exp"):
    """Top-1 and top-5 accuracy, in percent, of `knn_classify`: a dict k -> (top1, top5).

    query_labels: [Q] integers, Q >= 1, below num_classes where that is given; a class beyond the bank's is otherwise a miss.
    Other arguments and errors as for `knn_classify`. With C < 5 classes top-5 is top-C.
    """
    _check_labels(queries, query_labels, num_classes, "query")
    accuracy = {}
    for k, classes in knn_classify(bank, bank_labels, queries, ks, temperature, num_classes, vote).items():
        hits = classes == query_labels.to(classes.device)[:, None]                                      # [Q, 5]
        accuracy[k] = tuple(100 * hit.double().mean().item() for hit in (hits[:, 0], hits.any(1)))
    return accuracy


@torch.no_grad()
def knn_classify(bank, bank_labels, queries, ks=(200,), temperature=0.07, num_classes=None, vote="exp"):
    """The five classes that each query's k nearest neighbours vote highest.

    bank: [N, D], bank_labels: [N] integers, queries: [Q, D]. Features of any float dtype, normalised here; a zero row has cosine
    0 with all.
    ks: numbers of neighbours, all served by one search; one above N takes the whole bank.
    num_classes: by default the largest label of the bank plus one.
    vote: what a neighbour adds to its class, "exp" exp(cos / temperature) or "linear" (cos + 1) / 2.

    Returns a dict k -> [Q, min(5, num_classes)] int64, the best class first.

    Of equal cosines the lower bank index is nearer; of equal scores the lower class is first, classes without a vote included.
    Cosines are float32 and scores float64 as computed: chunks of another size can move the last bit of a cosine, and CUDA adds
    votes in no fixed order.

    ValueError: shapes, lengths or labels that do not fit, an empty bank, features that are not finite, k < 1, temperature <= 0,
    an unknown vote.
    """
    _check_features(bank, queries)
    _check_labels(bank, bank_labels, num_classes, "bank")
    _check_vote(ks, temperature, vote)
    if num_classes is None:
        num_classes = int(bank_labels.max()) + 1
    bank_labels = bank_labels.to(bank.device, torch.int64)

    predictions = {k: [] for k in ks}
    deepest = min(max(ks), len(bank))
    rows = max(1, SCORES // num_classes)
    for block in queries.split(max(1, NEIGHBOURS // deepest)):
        for keys in _search(bank, block, deepest).split(rows):
            labels = bank_labels[_read_index(keys)]
            for k, classes in knn_vote(_read_cos(keys), labels, num_classes, ks, temperature, vote).items():
                predictions[k].append(classes)
    return {k: torch.cat(classes) for k, classes in predictions.items()}


@torch.no_grad()
def knn_search(bank, queries, k):
    """Cosines (float32) and bank indices (int64), [Q, k] each, of every query's k nearest rows of the bank, nearest first.

    bank: [N, D], queries: [Q, D], 1 <= k <= N; the results are on the bank's device. Ties and errors as for `knn_classify`.
    """
    _check_features(bank, queries)
    if not 1 <= k <= len(bank):
        raise ValueError(f"k must lie between 1 and the bank's {len(bank)} rows, got {k}")
    keys = _search(bank, queries, k)
    return _read_cos(keys), _read_index(keys)


@torch.no_grad()
def knn_vote(cos, labels, num_classes, ks=(200,), temperature=0.07, vote="exp"):
    """The vote of `knn_classify` among neighbours already found; for several temperatures, search once and vote for each.

    cos, labels: [Q, n], the neighbours' cosines, nearest first, and classes. Returns as `knn_classify`; holds [Q, num_classes].
    """
    _check_vote(ks, temperature, vote)
    cos = cos.double()                      # a wide range: at temperature 0.001 a neighbour 0.2 behind votes exp(-200)
    if vote == "exp":
        votes = ((cos - cos[:, :1]) / temperature).exp()                # relative to the nearest: same ranking, no overflow
    else:
        votes = ((cos + 1) / 2).clamp_min(0)                            # rounding may leave cos just below -1
    scores = votes.new_zeros(len(cos), num_classes)                     # [Q, C]
    predictions, counted = {}, 0
    for k in sorted(ks):
        scores.scatter_add_(1, labels[:, counted:k], votes[:, counted:k])
        predictions[k], counted = _highest(scores, min(5, num_classes)), k
    return predictions


def _search(bank, queries, k):
    """The neighbours of `knn_search` as `_keys`, [Q, k] int64: all k are real, since k <= N; sorting keys settles ties."""
    nearest = torch.full((len(queries), k), LAST, device=bank.device)
    step = max(1, min(len(bank), BANK_CHUNK, BANK_FEATURES // bank.shape[1]))
    # One buffer for all products: on a CPU, the first touch of fresh memory costs as much as selecting from it.
    buffer = torch.empty(min(QUERY_CHUNK, len(queries)) * _padded(step), device=bank.device)
    with _full_float32():
        for start in range(0, len(bank), step):
            rows = _unit_rows(bank[start:start + step])                                                     # [n, D]
            width = _padded(len(rows))
            for chunk, best in zip(queries.split(QUERY_CHUNK), nearest.split(QUERY_CHUNK)):
                cos = buffer[:len(chunk) * width].view(len(chunk), width)                                   # [q, n, padded]
                cos[:, len(rows):] = -torch.inf
                torch.mm(_unit_rows(chunk.to(bank.device)), rows.T, out=cos[:, :len(rows)])
                best.copy_(torch.cat([best, _candidates(cos, k) - start], 1).topk(k).values)
    return nearest


def _padded(columns):
    return -(-columns // BLOCK) * BLOCK


def _candidates(cos, k):
    """Keys of entries of cos [q, n], n a multiple of BLOCK, that include the k largest of each row: [q, min(PART * k, n)].

    The k largest lie in the k blocks of columns with the largest maxima: an entry of any other block is behind k of them. So blocks
    are discarded first, then parts of those left. Both rank by (maximum, lower column), which keeps the rule for ties.
    """
    queries, width = cos.shape
    first_entry = torch.arange(queries, device=cos.device)[:, None] * width
    entries, columns = cos, torch.zeros(queries, 1, dtype=torch.int64, device=cos.device)
    for part in (BLOCK, PART):
        columns = (columns[..., None] + torch.arange(0, width, part, device=cos.device)).flatten(1)         # [q, parts], where each begins
        maxima = _keys(entries.view(*columns.shape, part).amax(2), columns)
        columns, width = _read_index(maxima.topk(min(k, columns.shape[1]), sorted=False).values), part      # [q, <= k]
        entries = cos.view(-1, part).index_select(0, ((first_entry + columns) // part).flatten())           # [q * <= k, part]
    columns = (columns[..., None] + torch.arange(PART, device=cos.device)).flatten(1)
    return _keys(entries.view(columns.shape), columns)


def _keys(cos, index):
    """int64 keys in the order of (cos, lower index): the float's bits, as an integer of the same order, above those of -index."""
    bits = (cos + 0.0).view(torch.int32)                                # + 0.0: -0.0 equals 0.0
    return (_flip_negative(bits).long() << 32) - index


def _read_index(keys):
    return -keys & 0xFFFFFFFF


def _read_cos(keys):
    order = (keys + _read_index(keys)) >> 32
    return _flip_negative(order.int()).view(torch.float32)


def _flip_negative(bits):
    """Sign and magnitude, as floats have it, to two's complement order, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _unit_rows(features):
    """Rows of length one in float32; a zero row stays zero. Scaled by the largest entry first, lest squares overflow or vanish."""
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    largest = torch.linalg.vector_norm(features, torch.inf, dim=1, keepdim=True)
    if not largest.isfinite().all():
        raise ValueError("features must be finite")
    features = features / largest.clamp_min(torch.finfo(features.dtype).tiny)
    norm = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    return features.div_(norm.clamp_min(torch.finfo(features.dtype).tiny)).float()


def _highest(scores, count):
    """Columns of the `count` highest scores of each row; argmax, unlike topk and sort, takes the first of equals."""
    scores, columns = scores.clone(), []
    for _ in range(count):
        columns.append(scores.argmax(1, keepdim=True))
        scores.scatter_(1, columns[-1], -1.0)
    return torch.cat(columns, 1)


@contextmanager
def _full_float32():
    """Turns off the TF32 and bfloat16 products that training may have turned on for float32."""
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):           # torch >= 2.9
        backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
        before = [backend.fp32_precision for backend in backends]
        try:
            for backend in backends:
                backend.fp32_precision = "ieee"
            yield
        finally:
            for backend, precision in zip(backends, before):
                backend.fp32_precision = precision
    else:
        before = torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision("highest")
            yield
        finally:
            torch.set_float32_matmul_precision(before)


def _check_features(bank, queries):
    if bank.dim() != 2 or queries.dim() != 2 or bank.shape[1] != queries.shape[1] or bank.shape[1] == 0:
        raise ValueError(f"bank and queries must be [N, D] and [Q, D], got {list(bank.shape)} and {list(queries.shape)}")
    if not bank.is_floating_point() or not queries.is_floating_point():
        raise ValueError(f"features must be floating point, got {bank.dtype} and {queries.dtype}")


def _check_labels(features, labels, num_classes, side):
    if labels.shape != features.shape[:1] or labels.is_floating_point():
        raise ValueError(f"{side} labels must be {len(features)} integers, got {labels.dtype} {list(labels.shape)}")
    if len(labels) == 0:
        raise ValueError(f"there are no {side} images")
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or num_classes is not None and highest >= num_classes:
        raise ValueError(f"{side} labels must lie in [0, {num_classes or 'num_classes'}), got {lowest} to {highest}")


def _check_vote(ks, temperature, vote):
    if not ks or min(ks) < 1:
        raise ValueError(f"ks must be numbers of neighbours of at least 1, got {ks}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if vote not in ("exp", "linear"):
        raise ValueError(f'vote must be "exp" or "linear", got {vote!r}')
