"""The objective against brute force over explicit pairs in float64, its saddle point, its unbiasedness, its edges."""
import itertools
import math

import pytest
import references as ref
import torch
from auccl_loss import (AUCCLLoss, auc_objective, pair_auc, symmetric_moments, teacher_student_moments, unit_rows)

FORMS = ("symmetric", "teacher_student")
PRESET_FORMS = [("paper", "symmetric"), ("paper", "teacher_student"), ("released-cifar", "symmetric"),
                ("released-imagenet", "teacher_student")]


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def embeddings(form, n, dim, seed=0):
    """Two branches whose positives agree more than chance: [n, D] twice, or teacher [2, n, D] and student [5, n, D]."""
    image = normal(n, dim, seed=seed)
    if form == "symmetric":
        return [(image + normal(n, dim, seed=seed + k)).requires_grad_() for k in (1, 2)]
    return [image + normal(2, n, dim, seed=seed + 1), (image + normal(5, n, dim, seed=seed + 2)).requires_grad_()]


def pairs(form, x, y):
    return ref.symmetric_pairs(x, y) if form == "symmetric" else ref.teacher_student_pairs(x, y)


def call(criterion, form, x, y):
    return criterion(x, y) if form == "symmetric" else criterion.teacher_student(x, y)


def gradients(loss, tensors):
    return torch.autograd.grad(loss, [t for t in tensors if t.requires_grad], retain_graph=True)


def assert_close(ours, reference, tolerance=1e-10):
    torch.testing.assert_close(ours, reference, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------------------ equality with brute force

@pytest.mark.parametrize("n, dim", [(2, 7), (5, 12), (9, 6)])  # 2n below, n below, and n above D
@pytest.mark.parametrize("gram", [True, False, None])
@pytest.mark.parametrize("form", FORMS)
def test_moments_equal_brute_force(form, gram, n, dim):
    x, y = embeddings(form, n, dim)
    function = symmetric_moments if form == "symmetric" else teacher_student_moments
    moments = function(unit_rows(x), unit_rows(y), gram=gram)
    positive, negative = pairs(form, x, y)
    expected = (positive.mean(), positive.square().mean(), negative.mean(), negative.square().mean())
    for index, (ours, reference) in enumerate(zip(moments, expected)):
        assert_close(ours, reference)
        for mine, theirs in zip(gradients(ours, (x, y)), gradients(reference, (x, y))):
            assert_close(mine, theirs)
    assert moments.negatives == (2 * n - 2 if form == "symmetric" else n - 1)


def test_a_student_of_global_views_alone():
    teacher, student = normal(2, 4, 3), normal(2, 4, 3, seed=1)
    for gram in (True, False):
        moments = teacher_student_moments(unit_rows(teacher), unit_rows(student), gram=gram)
        positive, negative = ref.teacher_student_pairs(teacher, student)
        assert_close(moments.positive_mean, positive.mean())
        assert_close(moments.negative_square, negative.square().mean())


@pytest.mark.parametrize("nu, kappa", [(1.0, 1.0), (16.0, 1.0), (4.0, 4.0), ("sum", "sum")])
@pytest.mark.parametrize("score", ["cosine", "unit"])
@pytest.mark.parametrize("n, dim", [(4, 12), (7, 5)])
@pytest.mark.parametrize("form", FORMS)
def test_loss_equals_brute_force(form, n, dim, score, nu, kappa):
    criterion = AUCCLLoss(a=0.7, b=0.1, alpha=0.4, margin=0.9, negative_weight=nu, margin_negative_weight=kappa,
                          score=score).double()
    x, y = embeddings(form, n, dim)
    positive, negative = pairs(form, x, y)
    number = 2 * n - 2 if form == "symmetric" else n - 1
    reference = ref.auc_loss(positive, negative, criterion.a, criterion.b, criterion.alpha, 0.9,
                             number if nu == "sum" else nu, number if kappa == "sum" else kappa, score)
    loss = call(criterion, form, x, y)
    assert_close(loss, reference)
    variables = (x, y, criterion.a, criterion.b, criterion.alpha)
    for mine, theirs in zip(gradients(loss, variables), gradients(reference, variables), strict=True):
        assert_close(mine, theirs)
    assert criterion.stats["positive"] == pytest.approx(ref.SCORES[score](positive).mean().item(), abs=1e-12)
    assert criterion.stats["negative"] == pytest.approx(ref.SCORES[score](negative).mean().item(), abs=1e-12)


@pytest.mark.parametrize("n, dim", [(4, 12), (7, 5)])
def test_released_cifar_equals_its_formula(n, dim):
    criterion = AUCCLLoss.preset("released-cifar", b=0.3).double()
    assert (criterion.a.item(), criterion.alpha.item()) == (10, 1)
    z0, z1 = embeddings("symmetric", n, dim)
    loss, reference = criterion(z0, z1), ref.released_cifar(z0, z1, 10.0, criterion.b, 1.0)
    assert_close(loss, reference)
    for mine, theirs in zip(gradients(loss, (z0, z1, criterion.b)), gradients(reference, (z0, z1, criterion.b)), strict=True):
        assert_close(mine, theirs)


def test_released_cifar_clamps_negative_positives():
    z0 = normal(3, 4).requires_grad_()
    z1 = -z0.detach()
    criterion = AUCCLLoss.preset("released-cifar").double()
    assert_close(criterion(z0, z1), ref.released_cifar(z0, z1, 10.0, 0.0, 1.0))


@pytest.mark.parametrize("n, dim", [(4, 12), (12, 4)])
def test_released_imagenet_equals_its_formula(n, dim):
    criterion = AUCCLLoss.preset("released-imagenet").double()
    center = torch.zeros(dim, dtype=torch.float64)
    for seed in range(3):  # the center moves between calls
        teacher, student = embeddings("teacher_student", n, dim, seed=10 * seed)
        loss, reference = criterion.teacher_student(teacher, student), ref.released_imagenet(teacher, student, center)
        assert_close(loss, reference)
        assert_close(gradients(loss, (student,))[0], gradients(reference, (student,))[0])
        center = 0.9 * center + 0.1 * teacher.mean((0, 1))
        assert_close(criterion.center, center)
    criterion.eval().teacher_student(teacher, student)
    assert_close(criterion.center, center)  # only training moves it


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dim", [3, 20])
def test_gradcheck(form, dim):
    criterion = AUCCLLoss(a=0.7, b=0.1, alpha=0.4).double()
    x, y = embeddings(form, 4, dim)
    assert torch.autograd.gradcheck(lambda *inputs: call(criterion, form, *inputs[:2]),
                                    (x, y, criterion.a, criterion.b, criterion.alpha))


def test_second_derivatives():
    criterion = AUCCLLoss(alpha=0.4).double()
    assert torch.autograd.gradgradcheck(criterion, tuple(embeddings("symmetric", 4, 3)))


def test_the_teacher_gets_no_gradient():
    teacher, student = embeddings("teacher_student", 5, 4)
    teacher.requires_grad_()
    AUCCLLoss().double().teacher_student(teacher, student).backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0


def test_pair_auc_counts_couples():
    z0, z1 = embeddings("symmetric", 6, 3)
    positive, negative = ref.symmetric_pairs(z0, z1)
    couples = [(p > q).double() + 0.5 * (p == q).double() for p in positive for q in negative]
    assert pair_auc(z0, z1, chunk=5) == pytest.approx(torch.stack(couples).mean().item(), abs=1e-12)
    same = torch.ones(4, 2)
    assert pair_auc(same, same) == 0.5  # all tied


# ------------------------------------------------------------------------------------------------------- the saddle point

@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("score", ["cosine", "unit"])
@pytest.mark.parametrize("nu, kappa", [(1.0, 1.0), (16.0, 1.0), (64.0, 1.0), (4.0, 4.0)])
def test_descent_ascent_reaches_the_saddle(form, score, nu, kappa):
    """At fixed embeddings, plain SGD at one step size for every nu; with nu = kappa = 1 the loss is then the AUC surrogate."""
    criterion = AUCCLLoss(negative_weight=nu, margin_negative_weight=kappa, score=score).double()
    x, y = (z.detach() for z in embeddings(form, 6, 4))
    optimizer = torch.optim.SGD(criterion.param_groups(lr=0.4), lr=0.4)
    for _ in range(60):
        optimizer.zero_grad()
        call(criterion, form, x, y).backward()
        optimizer.step()
    positive, negative = (ref.SCORES[score](cosines) for cosines in pairs(form, x, y))
    assert_close(criterion.a.detach(), positive.mean(), 1e-8)
    assert_close(criterion.b.detach(), negative.mean(), 1e-8)
    assert_close(criterion.alpha.detach(), 1 - positive.mean() + kappa * negative.mean(), 1e-8)
    if kappa == 1:
        expected = ref.surrogate(positive, negative, 1.0) + (nu - 1) * negative.var(correction=0)
        assert_close(call(criterion, form, x, y).detach(), expected, 1e-8)


def test_plain_steps_on_the_released_imagenet_weights_are_stable():
    criterion = AUCCLLoss.preset("released-imagenet", learn=("a", "b")).double()
    teacher, student = (x.detach() for x in embeddings("teacher_student", 40, 4))
    optimizer = torch.optim.SGD(criterion.param_groups(lr=0.4), lr=0.4)
    for _ in range(60):
        optimizer.zero_grad()
        criterion.eval().teacher_student(teacher, student).backward()
        optimizer.step()
    assert criterion.a.grad.abs() < 1e-6 and criterion.b.grad.abs() < 1e-6 and criterion.b.abs() < 100


def test_a_plain_step_on_b_above_its_curvature_diverges():
    """The reason why param_groups scales b's step: without it nu = 16 diverges at the step size of the test above."""
    criterion = AUCCLLoss(negative_weight=16.0).double()
    x, y = embeddings("symmetric", 6, 4)
    optimizer = torch.optim.SGD(criterion.param_groups(lr=0.4, adaptive=True), lr=0.4)
    for _ in range(60):
        optimizer.zero_grad()
        criterion(x.detach(), y.detach()).backward()
        optimizer.step()
    assert not abs(criterion.b.item()) < 1e6


def test_alpha_ascends_while_a_b_and_the_network_descend():
    """One step of one optimiser moves every weight along its gradient's side of the min-max."""
    network = torch.nn.Linear(4, 3).double()
    criterion = AUCCLLoss(a=0.2, b=0.3, alpha=0.1).double()
    optimizer = torch.optim.SGD([{"params": network.parameters()}, *criterion.param_groups(lr=1e-3)], lr=1e-3)
    x0, x1 = (x.detach() for x in embeddings("symmetric", 6, 4))
    variables = [*network.parameters(), criterion.a, criterion.b, criterion.alpha]
    before = [v.detach().clone() for v in variables]
    criterion(network(x0), network(x1)).backward()
    optimizer.step()
    for variable, start in zip(variables, before):
        moved = ((variable.detach() - start) * variable.grad).sum()
        assert moved > 0 if variable is criterion.alpha else moved < 0


def test_held_weights_have_no_group_and_no_gradient():
    criterion = AUCCLLoss(learn=("b",))
    assert [group["params"][0] is criterion.b for group in criterion.param_groups(lr=0.1)] == [True]
    criterion(torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)).backward()
    assert criterion.a.grad is None and criterion.alpha.grad is None and criterion.b.grad is not None


def test_collapse_is_no_minimum_of_the_defaults():
    """A student facing a fixed teacher can reach any mean cosine c; with kappa = nu > 1 the collapsed a = b = c = -m/(nu - 1)
    has loss 0, with the default kappa = 1 every collapsed network pays m^2."""
    teacher = torch.zeros(1, 6, 2, dtype=torch.float64)
    teacher[..., 0] = 1

    def collapsed_loss(kappa, nu, c):
        student = torch.tensor([c, math.sqrt(1 - c * c)], dtype=torch.float64).expand(2, 6, 2)
        criterion = AUCCLLoss(a=c, b=c, alpha=1 - c + kappa * c, negative_weight=nu, margin_negative_weight=kappa).double()
        return criterion.teacher_student(teacher, student).item()
    assert collapsed_loss(kappa=4.0, nu=4.0, c=-1 / 3) == pytest.approx(0, abs=1e-12)
    for c in (-0.9, -1 / 3, 0.0, 0.5, 1.0):
        assert collapsed_loss(kappa=AUCCLLoss().margin_negative_weight, nu=4.0, c=c) == pytest.approx(1, abs=1e-12)


# ----------------------------------------------------------------------------------------------------------- unbiasedness

def batch_gradients(loss, network, views, variables, size):
    """The mean over ALL batches of `size` of the population's images of the gradients of the variables, flat."""
    batches = [list(batch) for batch in itertools.combinations(range(len(views[0])), size)]
    grads = [torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss(*(network(v[batch]) for v in views)), variables)])
             for batch in batches]
    return torch.stack(grads).mean(0)


@pytest.mark.parametrize("size", range(2, 7))
@pytest.mark.parametrize("nu, kappa", [(16.0, 1.0), (1.0, 1.0), (4.0, 4.0)])
def test_every_batch_size_is_unbiased(size, nu, kappa):
    network = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3)).double()
    for index, p in enumerate(network.parameters()):
        p.data = normal(*p.shape, seed=index)
    views = [normal(6, 4, seed=1), normal(6, 4, seed=2)]
    criterion = AUCCLLoss(a=0.3, b=0.1, alpha=0.6, negative_weight=nu, margin_negative_weight=kappa).double()
    variables = [*network.parameters(), criterion.a, criterion.b, criterion.alpha]
    population = batch_gradients(criterion, network, views, variables, 6)
    assert_close(batch_gradients(criterion, network, views, variables, size), population)

    variables = list(network.parameters())
    population = batch_gradients(ref.nt_xent, network, views, variables, 6)
    bias = (batch_gradients(ref.nt_xent, network, views, variables, size) - population).norm() / population.norm()
    assert bias > 0.02 if size < 6 else bias == 0  # the same enumeration sees NT-Xent's bias


@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_teacher_student_form_is_unbiased(size):
    teacher, student = (x.detach() for x in embeddings("teacher_student", 5, 3))
    weight = normal(3, 3, seed=9).requires_grad_()
    criterion = AUCCLLoss(a=0.3, b=0.1, alpha=0.6).double()

    def mean_gradient(n):
        grads = [torch.autograd.grad(criterion.teacher_student(teacher[:, list(batch)], student[:, list(batch)] @ weight),
                                     (weight, criterion.a, criterion.b, criterion.alpha))
                 for batch in itertools.combinations(range(5), n)]
        return [torch.stack(g).mean(0) for g in zip(*grads)]
    for mine, population in zip(mean_gradient(size), mean_gradient(5)):
        assert_close(mine, population)


# ------------------------------------------------------------------------------------------------------------------ edges

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("preset, form", PRESET_FORMS)
def test_low_precision_inputs_and_autocast(preset, form, dtype):
    """Moments are taken in float32: the loss is that of the rounded embeddings, inside autocast or not."""
    x, y = (z.detach().to(dtype) for z in embeddings(form, 40, 8))
    x, y = x.requires_grad_(form == "symmetric"), y.requires_grad_()
    expected = call(AUCCLLoss.preset(preset).double(), form, x.detach().double(), y.detach().double())
    with torch.autocast("cpu", torch.bfloat16):
        loss = call(AUCCLLoss.preset(preset), form, x, y)
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    assert y.grad.dtype == dtype and y.grad.isfinite().all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n", [2, 30])
@pytest.mark.parametrize("kind", ["equal", "zero", "one zero", "large"])
def test_degenerate_embeddings_stay_finite(form, n, kind):
    x, y = (z.detach().float() for z in embeddings(form, n, 8))
    if kind == "equal":
        x[:], y[:] = 1.0, 1.0
    elif kind == "zero":
        x[:], y[:] = 0.0, 0.0
    elif kind == "one zero":
        x[..., 0, :], y[..., 0, :] = 0.0, 0.0
    else:
        x, y = x * 1e15, y * 1e15
    x, y = x.requires_grad_(), y.requires_grad_()
    criterion = AUCCLLoss()
    loss = call(criterion, form, x, y)
    loss.backward()
    assert loss.isfinite() and y.grad.isfinite().all() and criterion.b.grad.isfinite()
    if kind == "one zero":
        assert (y.grad[..., 0, :] == 0).all()  # a zero row has no direction to improve
    if kind == "equal":
        assert loss.item() == pytest.approx(16 + 2 - 1, rel=1e-5)  # nu (1 - b)^2 + 2 alpha m - alpha^2 at the initial weights


@pytest.mark.parametrize("x, y, message", [
    (torch.zeros(1, 4), torch.zeros(1, 4), "at least two images"),
    (torch.zeros(0, 4), torch.zeros(0, 4), "at least two images"),
    (torch.zeros(3, 4), torch.zeros(3, 5), "differ in shape"),
    (torch.zeros(3, 4), torch.zeros(2, 4), "differ in shape"),
    (torch.zeros(3, 4, dtype=torch.int64), torch.zeros(3, 4), "floating point"),
    (torch.zeros(3), torch.zeros(3), r"\[n, D\]"),
])
def test_bad_embeddings(x, y, message):
    for criterion in (AUCCLLoss(), AUCCLLoss.preset("released-cifar")):
        with pytest.raises(ValueError, match=message):
            criterion(x, y)


@pytest.mark.parametrize("teacher, student, message", [
    ((2, 1, 4), (3, 1, 4), "at least two images"),
    ((2, 3, 4), (3, 3, 5), "differ in shape"),
    ((3, 3, 4), (2, 3, 4), "every teacher view"),
    ((1, 3, 4), (1, 3, 4), "every teacher view"),
    ((3, 4), (3, 4), r"\[views, n, D\]"),
])
def test_bad_teacher_student(teacher, student, message):
    for criterion in (AUCCLLoss(), AUCCLLoss.preset("released-imagenet")):
        with pytest.raises(ValueError, match=message):
            criterion.teacher_student(torch.zeros(teacher), torch.zeros(student))


@pytest.mark.parametrize("arguments, message", [
    (dict(learn=("a", "beta")), "beta"), (dict(score="angle"), "angle"), (dict(negative_weight="mean"), "mean"),
    (dict(margin_negative_weight=-1.0), "positive"), (dict(a=math.nan), "finite"), (dict(margin=math.inf), "finite"),
])
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        AUCCLLoss(**arguments)


def test_presets_refuse_what_they_are_not():
    with pytest.raises(ValueError, match="unknown preset"):
        AUCCLLoss.preset("simclr")
    with pytest.raises(ValueError, match="alpha"):
        AUCCLLoss.preset("released-cifar", learn=("alpha",))
    with pytest.raises(ValueError, match="no teacher/student form"):
        AUCCLLoss.preset("released-cifar").teacher_student(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="no symmetric form"):
        AUCCLLoss.preset("released-imagenet")(torch.zeros(3, 4), torch.zeros(3, 4))
    with pytest.raises(ValueError, match="sum"):
        AUCCLLoss(negative_weight="sum").param_groups(lr=0.1)


@pytest.mark.parametrize("preset, form", PRESET_FORMS)
def test_state_dict_round_trip(preset, form):
    x, y = embeddings(form, 5, 4)
    saved = AUCCLLoss.preset(preset).double()
    with torch.no_grad():
        for weight, value in zip((saved.a, saved.b, saved.alpha), (0.5, 0.25, 0.125)):
            weight.fill_(value)
    call(saved, form, x, y)
    restored = AUCCLLoss.preset(preset).double()
    restored.load_state_dict(saved.state_dict())
    assert restored.state_dict().keys() >= {"a", "b", "alpha"}
    assert call(restored, form, x, y) == call(saved, form, x, y)


def test_objective_takes_plain_numbers():
    moments = symmetric_moments(*(unit_rows(z.detach()) for z in embeddings("symmetric", 5, 4)))
    criterion = AUCCLLoss(a=0.5, b=0.2, alpha=0.3)
    torch.testing.assert_close(auc_objective(moments, 0.5, 0.2, 0.3, negative_weight=16.0), criterion._objective(moments))
