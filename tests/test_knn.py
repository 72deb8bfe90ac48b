"""The k-NN classifier against a slow reference: float64, one query at a time, plain loops."""
import math

import eval_knn
import pytest
import torch
from eval_knn import knn_accuracy, knn_classify, knn_search, knn_vote


def reference(bank, labels, queries, k, temperature, num_classes, vote):
    """Predictions of every query, best first, and its neighbours."""
    def unit(row):
        norm = math.hypot(*row)
        return [x / norm for x in row] if norm else row

    bank, labels = [unit(row) for row in bank.double().tolist()], labels.tolist()
    predictions, neighbours = [], []
    for query in map(unit, queries.double().tolist()):
        cos = [sum(x * y for x, y in zip(query, row)) for row in bank]
        nearest = sorted(range(len(bank)), key=lambda i: (-cos[i], i))[:k]
        scores = [0.0] * num_classes
        for i in nearest:
            scores[labels[i]] += math.exp((cos[i] - cos[nearest[0]]) / temperature) if vote == "exp" else (cos[i] + 1) / 2
        predictions.append(sorted(range(num_classes), key=lambda c: (-scores[c], c))[:5])
        neighbours.append(nearest)
    return predictions, neighbours


def clusters(count, dim, num_classes, seed, spread=1.0):
    """Features around one centre per class, [count, dim], and labels."""
    centres = torch.randn(num_classes, dim, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (count,), generator=generator)
    return centres[labels] + spread * torch.randn(count, dim, generator=generator), labels


def signs(count, dim, seed):
    """Features of +-1. With dim a power of 4 their cosines are exact in float32, take dim + 1 values only, and so tie everywhere."""
    return torch.randint(2, (count, dim), generator=torch.Generator().manual_seed(seed)).float() * 2 - 1


@pytest.fixture(params=[None, (3, 64, 40, 10), (7, 50, 1, 1)], ids=["chunks as set", "small chunks", "odd chunks"])
def chunks(request, monkeypatch):
    if request.param:
        for name, size in zip(("QUERY_CHUNK", "BANK_CHUNK", "NEIGHBOURS", "SCORES"), request.param):
            monkeypatch.setattr(eval_knn, name, size)


@pytest.mark.parametrize("vote, temperature", [("exp", 0.07), ("exp", 0.5), ("exp", 0.001), ("linear", 0.07)])
@pytest.mark.parametrize("size, num_classes", [(30, 2), (99, 7), (333, 40)])
def test_equals_the_reference(chunks, size, num_classes, vote, temperature):
    bank, labels = clusters(size, 12, num_classes, seed=1, spread=2.0)
    queries, _ = clusters(10, 12, num_classes, seed=2, spread=2.0)
    ks = (200, 1, 5, 20)                                                        # in no order, 200 above two of the sizes
    predictions = knn_classify(bank, labels, queries, ks, temperature, num_classes, vote)
    assert tuple(predictions) == ks
    for k in ks:
        assert predictions[k].tolist() == reference(bank, labels, queries, k, temperature, num_classes, vote)[0]


@pytest.mark.parametrize("k", [1, 10, 70, 300])
def test_ties_take_the_lower_index_and_the_lower_class(chunks, k):
    bank, queries = signs(300, 16, seed=1), signs(8, 16, seed=2)
    bank[150:] = bank[:150]
    bank[[3, 40, 290]] = 0.0
    queries[[0, 7]] = 0.0                                                      # cosine 0 with the whole bank
    labels = torch.arange(300) * 7 % 11
    predictions, neighbours = reference(bank, labels, queries, k, 0.25, 11, "linear")
    cos, index = knn_search(bank, queries, k)
    assert index.tolist() == neighbours
    exact = (queries.double() @ bank.double().T / 16).gather(1, index)
    assert cos.dtype == torch.float32 and torch.equal(cos.double(), exact)
    assert knn_classify(bank, labels, queries, (k,), vote="linear")[k].tolist() == predictions


def test_minus_zero_ties_with_zero():
    keys = eval_knn._keys(torch.tensor([0.0, -0.0, 1e-30, -1e-30, -torch.inf, -0.5, 1.0]), torch.tensor([6, 2, 0, 1, 3, 2 ** 32 - 1, 5]))
    keys = keys.sort(descending=True).values
    assert eval_knn._read_index(keys).tolist() == [5, 0, 2, 6, 1, 2 ** 32 - 1, 3]
    assert torch.equal(eval_knn._read_cos(keys), torch.tensor([1.0, 1e-30, 0.0, 0.0, -1e-30, -0.5, -torch.inf]))


def test_large_bank_and_all_neighbours_in_one_block(chunks):
    """The search discards blocks of columns by their maxima: neighbours crowded into one, spread out, or sorted must all be found."""
    angle = torch.linspace(0, 3, 1000)
    bank = torch.stack([angle.cos(), angle.sin()], 1)
    for order in (torch.arange(1000), torch.arange(1000).flip(0), torch.arange(1000) * 37 % 1000):
        index = knn_search(bank[order], torch.tensor([[1.0, 0.0]]), 64)[1]
        assert order[index[0]].tolist() == list(range(64))


def test_many_classes():
    bank, labels = clusters(600, 16, 5000, seed=1)
    queries, _ = clusters(8, 16, 5000, seed=1)                                  # the bank's first eight labels and so its centres
    for k, classes in knn_classify(bank, labels, queries, (3, 50), num_classes=5000).items():
        assert classes.tolist() == reference(bank, labels, queries, k, 0.07, 5000, "exp")[0]


def test_a_cosine_rounded_below_minus_one_costs_its_class_nothing():
    cos = torch.tensor([[0.5, -1.0000001]])
    assert knn_vote(cos, torch.tensor([[2, 0]]), 3, (2,), vote="linear")[2].tolist() == [[2, 0, 1]]


def test_accuracy_in_percent():
    bank = torch.eye(8)
    labels = torch.arange(8)
    queries = torch.tensor([[8.0, 7, 6, 5, 4, 3, 2, 1]]).repeat(4, 1)           # classes 0 to 4 come first
    assert knn_accuracy(bank, labels, queries, torch.tensor([0, 1, 4, 5]), ks=(8, 1)) == {8: (25.0, 75.0), 1: (25.0, 75.0)}
    assert knn_accuracy(bank, labels, queries, torch.tensor([0, 0, 0, 99]), ks=(8,)) == {8: (75.0, 75.0)}       # 99: not in the bank
    assert knn_accuracy(bank[:3], labels[:3], queries, torch.tensor([0, 2, 3, 4]), ks=(8,)) == {8: (25.0, 50.0)}    # nor 3 and 4


def test_two_classes_cap_top5():
    bank, labels = clusters(50, 4, 2, seed=1)
    assert knn_classify(bank, labels, bank)[200].shape == (50, 2)
    top1, top5 = knn_accuracy(bank, labels, bank, labels, ks=(50,))[50]
    assert top1 < 100 and top5 == 100


def test_one_search_serves_several_temperatures():
    bank, labels = clusters(99, 12, 7, seed=1, spread=3.0)
    queries, _ = clusters(20, 12, 7, seed=2, spread=3.0)
    cos, index = knn_search(bank, queries, 30)
    seen = set()
    for temperature in (0.02, 0.07, 1.0):
        classes = knn_vote(cos, labels[index], 7, (30,), temperature)[30]
        assert classes.tolist() == reference(bank, labels, queries, 30, temperature, 7, "exp")[0]
        seen.add(str(classes.tolist()))
    assert len(seen) == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_compared_in_float32(dtype):
    bank, labels = clusters(120, 12, 7, seed=1)
    queries, _ = clusters(20, 12, 7, seed=2)
    bank, queries = bank.to(dtype), queries.to(dtype)
    assert knn_classify(bank, labels, queries, (20,))[20].tolist() == reference(bank, labels, queries, 20, 0.07, 7, "exp")[0]
    torch.testing.assert_close(knn_search(bank, queries, 20)[0], knn_search(bank.float(), queries.float(), 20)[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e30, 1e38])
def test_the_scale_of_features_is_immaterial(scale):
    bank, queries = signs(100, 16, seed=1), signs(10, 16, seed=2)
    cos, index = knn_search(bank, queries, 10)
    for scaled in (knn_search(bank * scale, queries, 10), knn_search(bank, queries * scale, 10)):
        assert torch.equal(scaled[1], index)
        torch.testing.assert_close(scaled[0], cos, rtol=0, atol=1e-6)


def test_neither_autocast_nor_low_precision_products_reach_the_cosines():
    bank, queries = clusters(2000, 64, 10, seed=1)[0], clusters(300, 64, 10, seed=2)[0]
    before = torch.get_float32_matmul_precision()
    exact = knn_search(bank, queries, 5)

    def settings():
        backends = torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)
        return torch.get_float32_matmul_precision(), [backend.fp32_precision for backend in backends if hasattr(backend, "fp32_precision")]

    torch.set_float32_matmul_precision("medium")
    try:
        chosen = settings()
        with torch.autocast("cpu", torch.bfloat16):
            found = knn_search(bank.requires_grad_(), queries, 5)
        assert settings() == chosen
    finally:
        torch.set_float32_matmul_precision(before)
    assert not found[0].requires_grad
    assert all(torch.equal(one, other) for one, other in zip(exact, found))


def test_no_queries():
    assert knn_classify(torch.eye(6), torch.arange(6), torch.zeros(0, 6), (3,))[3].shape == (0, 5)


GOOD = dict(bank=torch.eye(6), bank_labels=torch.arange(6), queries=torch.eye(6), query_labels=torch.arange(6))


@pytest.mark.parametrize("bad, message", [
    (dict(bank=torch.ones(6)), "bank and queries must be"),
    (dict(queries=torch.ones(6, 5)), "bank and queries must be"),
    (dict(bank=torch.eye(6).long()), "floating point"),
    (dict(bank=torch.zeros(0, 6), bank_labels=torch.arange(0)), "no bank images"),
    (dict(queries=torch.zeros(0, 6), query_labels=torch.arange(0)), "no query images"),
    (dict(bank_labels=torch.arange(5)), "bank labels must be 6 integers"),
    (dict(bank_labels=torch.arange(6)[:, None]), "bank labels must be 6 integers"),
    (dict(query_labels=torch.arange(7)), "query labels must be 6 integers"),
    (dict(query_labels=torch.arange(6.0)), "query labels must be 6 integers"),
    (dict(bank_labels=torch.arange(6) - 1), "bank labels must lie in"),
    (dict(num_classes=5, query_labels=torch.arange(6) % 5), r"bank labels must lie in \[0, 5\), got 0 to 5"),
    (dict(num_classes=6, query_labels=torch.arange(6) + 1), "query labels must lie in"),
    (dict(bank=torch.eye(6) / 0), "finite"),
    (dict(queries=torch.full((6, 6), torch.inf)), "finite"),
    (dict(ks=()), "ks must be"),
    (dict(ks=(10, 0)), "ks must be"),
    (dict(temperature=0.0), "temperature"),
    (dict(temperature=math.nan), "temperature"),
    (dict(vote="uniform"), "vote"),
])
def test_bad_input_is_named(bad, message):
    assert knn_accuracy(**GOOD)[10][0] == 100
    with pytest.raises(ValueError, match=message) as error:
        knn_accuracy(**{**GOOD, **bad})
    assert "\n" not in str(error.value)


def test_search_needs_as_many_rows_as_neighbours():
    for k in (0, 7):
        with pytest.raises(ValueError, match="between 1 and the bank's 6 rows"):
            knn_search(torch.eye(6), torch.eye(6), k)
    with pytest.raises(ValueError, match="no bank images"):
        knn_classify(torch.zeros(0, 6), torch.arange(0), torch.eye(6))
