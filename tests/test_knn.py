"""The k-NN classifier against a slow reference: float64, one query at a time, plain loops."""
import math

import eval_knn
import pytest
import torch
from conftest import run_ranks
from eval_knn import knn_accuracy


def reference(bank, labels, queries, truth, k, temperature):
    """Top-1 and top-5 in percent."""
    def unit(row):
        norm = math.hypot(*row)
        return [x / norm for x in row] if norm else row

    bank, labels, hits = [unit(row) for row in bank.double().tolist()], labels.tolist(), [0, 0]
    for query, label in zip(map(unit, queries.double().tolist()), truth.tolist()):
        cos = [sum(x * y for x, y in zip(query, row)) for row in bank]
        scores = {}
        for i in sorted(range(len(bank)), key=lambda i: -cos[i])[:k]:
            scores[labels[i]] = scores.get(labels[i], 0) + math.exp((cos[i] - max(cos)) / temperature)
        ranking = sorted(scores, key=lambda c: -scores[c])
        hits[0] += label in ranking[:1]
        hits[1] += label in ranking[:5]
    return tuple(100 * hit / len(queries) for hit in hits)


def clusters(count, num_classes, seed, spread=2.0, dim=12):
    """Features around one centre per class, [count, dim], and labels."""
    centres = torch.randn(num_classes, dim, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (count,), generator=generator)
    return centres[labels] + spread * torch.randn(count, dim, generator=generator), labels


@pytest.mark.parametrize("queries, numbers", [(256, 2 ** 25), (3, 5000), (7, 150)])
@pytest.mark.parametrize("size, num_classes", [(30, 2), (99, 7), (200, 40), (300, 2000)])
def test_equals_brute_force_in_chunks_of_any_size(size, num_classes, queries, numbers, monkeypatch):
    monkeypatch.setattr(eval_knn, "QUERIES", queries)
    monkeypatch.setattr(eval_knn, "NUMBERS", numbers)
    problem = *clusters(size, num_classes, seed=1), *clusters(20, num_classes, seed=2)
    for temperature in (0.07, 0.5, 0.002):
        found = knn_accuracy(*problem, (200, 1, 5, 20, 5), temperature)    # 200 is above two of the sizes
        assert list(found) == [200, 1, 5, 20]
        for k, accuracy in found.items():
            assert accuracy == pytest.approx(reference(*problem, k, temperature)), (k, temperature)


@pytest.mark.parametrize("dtype, scale", [
    (torch.bfloat16, 1), (torch.float16, 1), (torch.float16, 1e3), (torch.float64, 1),
    (torch.float32, 1e-42), (torch.float32, 1e-30), (torch.float32, 1e30), (torch.float32, 1e37)])
def test_features_of_any_dtype_and_scale(dtype, scale):
    bank, labels = clusters(120, 7, seed=1)
    queries, truth = clusters(40, 7, seed=2)
    if scale == 1e-42:                                                 # few bits are left: signs alone
        bank, queries = bank.sign(), queries.sign() + 0.5
    bank[3], queries[4] = 0, 0                                         # zero rows have cosine 0 with all
    truth[4] = 99
    bank, queries = (bank * scale).to(dtype), (queries * scale).to(dtype)
    cos, index = eval_knn._search(bank, queries, 120)
    exact = torch.nn.functional.normalize(queries.double(), eps=1e-60) @ (
        torch.nn.functional.normalize(bank.double(), eps=1e-60).T)
    torch.testing.assert_close(cos.double(), exact.gather(1, index), rtol=0, atol=1e-6)
    torch.testing.assert_close(cos.double(), exact.sort(1, descending=True).values, rtol=0, atol=1e-6)
    if scale != 1e-42:
        assert knn_accuracy(bank, labels, queries, truth, (20,))[20] == reference(
            bank, labels, queries, truth, 20, 0.07)


def test_accuracy_in_percent():
    bank, labels = torch.eye(8), torch.arange(8)
    queries = torch.tensor([[8.0, 7, 6, 5, 4, 3, 2, 1]]).repeat(4, 1)  # classes 0 to 4 come first
    assert knn_accuracy(bank, labels, queries, torch.tensor([0, 1, 4, 5]), (8, 1)) == {
        8: (25, 75), 1: (25, 25)}
    assert knn_accuracy(bank, labels, queries, torch.tensor([0, 0, 0, 99]), (8,)) == {8: (75, 75)}
    assert knn_accuracy(bank[:3], labels[:3], queries, torch.tensor([0, 2, 3, 4]), (8,)) == {8: (25, 50)}


def test_top5_counts_only_classes_with_a_vote_under_any_names():
    bank, labels = clusters(60, 12, seed=1)
    queries, truth = clusters(40, 12, seed=2)
    nearest = eval_knn._search(bank, queries, 3)[1]
    for k in (1, 2, 3):
        voted = (labels[nearest[:, :k]] == truth[:, None]).any(1).double().mean().item() * 100
        for names in (torch.arange(12), torch.arange(12).flip(0), torch.arange(12) * 5 % 12):
            accuracy = knn_accuracy(bank, names[labels], queries, names[truth], (k,))
            assert accuracy[k][1] == pytest.approx(voted)


def test_a_vote_never_vanishes():
    bank, labels = torch.tensor([[1.0, 0], [0, 1], [-1, 0]]), torch.tensor([0, 3, 5])
    accuracy = knn_accuracy(bank, labels, bank[:1], torch.tensor([3]), (2,), temperature=1e-4)
    assert accuracy == {2: (0, 100)}


def test_several_ranks_share_the_queries_and_equal_one():
    bank, queries = clusters(101, 11, seed=1), clusters(17, 11, seed=2)

    def both():
        few = queries[0][:2], queries[1][:2]                           # a rank of three has none
        return knn_accuracy(*bank, *queries, (1, 10, 200)), knn_accuracy(*bank, *few, (1, 10, 200))
    assert run_ranks(both, 3) == [both()] * 3


def test_neither_autocast_nor_tf32_reach_the_product_and_both_are_restored(monkeypatch):
    bank, queries = clusters(2000, 10, seed=1, dim=64)[0], clusters(300, 10, seed=2, dim=64)[0]
    exact, inside, mm = eval_knn._search(bank, queries, 5), [], torch.mm

    def tf32():
        matmul = torch.backends.cuda.matmul
        return matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    monkeypatch.setattr(torch, "mm", lambda *args, **more: (inside.append(tf32()), mm(*args, **more)))
    torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            found = eval_knn._search(bank, queries, 5)
            assert torch.is_autocast_enabled("cpu")
        assert tf32() and inside == [False, False] and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert all(torch.equal(one, other) for one, other in zip(exact, found))


GOOD = dict(bank=torch.eye(6), bank_labels=torch.arange(6), queries=torch.eye(6),
            query_labels=torch.arange(6))


@pytest.mark.parametrize("bad, message", [
    (dict(bank=torch.ones(6)), "bank features must be"),
    (dict(queries=torch.ones(6, 5)), r"query features must be floating point \[6, 6\]"),
    (dict(bank=torch.eye(6).long()), "bank features must be floating point"),
    (dict(bank=torch.zeros(0, 6), bank_labels=torch.arange(0)), "bank features must be"),
    (dict(queries=torch.zeros(0, 6), query_labels=torch.arange(0)), "query features must be"),
    (dict(bank_labels=torch.arange(5)), r"bank features must be floating point \[5, 6\]"),
    (dict(query_labels=torch.arange(6)[:, None]), "query labels must be integers"),
    (dict(query_labels=torch.arange(6.0)), "query labels must be integers"),
    (dict(bank_labels=torch.arange(6) - 1), "bank labels must be integers >= 0"),
    (dict(bank=torch.eye(6) / 0), "bank features are not finite"),
    (dict(queries=torch.full((6, 6), torch.inf)), "query features are not finite"),
])
def test_bad_input_is_named(bad, message):
    with pytest.raises(ValueError, match=message) as error:
        knn_accuracy(**{**GOOD, **bad})
    assert "\n" not in str(error.value)
