"""Exact search by cosine, chunk by chunk: nearest rows, and all pairs of rows that are alike.

    cos, index = nearest_rows(bank, queries, k=10)          # [N, D], [Q, D] -> [Q, k] each, nearest first
    cos, pairs = similar_pairs(features, threshold=0.95)    # [N, D] -> [P], [P, 2], nearest first

Rows may have any float dtype and need not be normalised; a zero row has cosine 0 with all. Products are in
float32. `bank` and `features` may lie on another device or in a memory-mapped file: they are read in chunks.
"""
import torch

import distributed
import utils
from auccl_loss import exact_products

QUERY_CHUNK = 256        # queries compared with the bank together
MAX_ELEMENTS = 2 ** 25   # numbers in each tensor held at once: 128 MB in float32
PAIR_BLOCK = 2048        # rows of each side compared together in the search for pairs
MAX_PAIRS = 10 ** 6      # pairs that a rank may find


@torch.no_grad()
@exact_products()
def nearest_rows(bank, queries, k):
    """Cosines (float32) and bank indices of each query's k <= N nearest rows, nearest first: [Q, k] each.
    The search runs on the device of the queries."""
    queries = _unit_rows(queries)
    cos = queries.new_full((len(queries), k), -2.0)
    index = torch.zeros_like(cos, dtype=torch.int64)
    size = max(1, MAX_ELEMENTS // max(QUERY_CHUNK, bank.shape[1]))
    with torch.autocast(queries.device.type, enabled=False):
        for start in range(0, len(bank), size):
            rows = _unit_rows(bank[start:start + size].to(queries.device))
            for chunk, best, nearest in zip(*(tensor.split(QUERY_CHUNK) for tensor in (queries, cos, index))):
                found, column = (chunk @ rows.T).topk(min(k, len(rows)))
                found, order = torch.cat([best, found], 1).topk(k)
                nearest.copy_(torch.cat([nearest, column + start], 1).gather(1, order))
                best.copy_(found)
    return cos, index


@torch.no_grad()
@exact_products()
def similar_pairs(features, threshold, device="cpu"):
    """Cosines [P] and indices [P, 2], i < j, of all pairs of rows of [N, D] with a cosine above the threshold
    (>= 0), by falling cosine. Ranks share the work and all have the result. UserError above MAX_PAIRS."""
    starts = range(0, len(features), PAIR_BLOCK)
    own = distributed.share(starts)
    cosines, pairs, count = [torch.empty(0)], [torch.empty(0, 2, dtype=torch.int64)], 0
    for i in utils.progress(own, 0, len(own), "pairs"):
        rows = _unit_rows(features[i:i + PAIR_BLOCK].to(device))
        for j in starts[i // PAIR_BLOCK:]:
            cos = rows @ _unit_rows(features[j:j + PAIR_BLOCK].to(device)).T                        # [n, m]
            cos = cos.triu_(1) if i == j else cos
            above = (cos > threshold).nonzero()                                                     # [p, 2]
            if (count := count + len(above)) > MAX_PAIRS:
                raise utils.UserError(f"more than {MAX_PAIRS:,} pairs have a cosine above {threshold:g}; "
                                      "ask for a higher one")
            cosines.append(cos[tuple(above.T)].cpu())
            pairs.append(above.cpu() + torch.tensor([i, j]))
    cosines, pairs = (distributed.gather_uneven(torch.cat(parts)) for parts in (cosines, pairs))
    order = (pairs[:, 0] * len(features) + pairs[:, 1]).argsort()  # ties do not depend on the number of ranks
    order = order[cosines[order].argsort(stable=True, descending=True)]
    return cosines[order], pairs[order]


def _unit_rows(features):
    """Rows of length one in float32; a zero row stays zero."""
    features = features.float()
    largest = torch.linalg.vector_norm(features, torch.inf, dim=1, keepdim=True)  # lest squares overflow
    return torch.nn.functional.normalize(features / largest.clamp_min(torch.finfo(torch.float32).tiny), dim=1)
