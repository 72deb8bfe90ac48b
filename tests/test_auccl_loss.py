"""The objective against brute force over all pairs in float64, its saddle point, unbiasedness and edges."""
import contextlib
import copy
import itertools
import math
import warnings

import auccl_loss
import pytest
import references as ref
import timm.optim
import torch
from auccl_loss import (AUCCLLoss, auc_objective, log_mean_exp, mean_fourth_power, pair_auc,
                        symmetric_moments, teacher_student_moments, unit_rows)
from released_losses import released_cifar, released_imagenet

FORMS = ("symmetric", "teacher_student")
OURS = "paper", "hard", "quartic"
PRESET_FORMS = [*itertools.product(OURS, FORMS), ("poster", "symmetric"),
                ("released-cifar", "symmetric"), ("released-imagenet", "teacher_student")]


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def embeddings(form, n, dim, seed=0, views=2):
    """Branches whose positives agree more than chance: views [n, D], or a teacher's [2, n, D] and a student's
    [5, n, D], [2, n, D] if of the teacher's views alone."""
    image = normal(n, dim, seed=seed)
    if form == "symmetric":
        return [(image + normal(n, dim, seed=seed + view)).requires_grad_() for view in range(1, views + 1)]
    views = 2 if form == "global" else 5
    teacher, student = image + normal(2, n, dim, seed=seed + 1), image + normal(views, n, dim, seed=seed + 2)
    return [teacher, student.requires_grad_()]


def pairs(form, *branches):
    return (ref.symmetric_pairs if form == "symmetric" else ref.teacher_student_pairs)(*branches)


def call(criterion, form, *branches):
    return (criterion if form == "symmetric" else criterion.teacher_student)(*branches)


def moments_of(form, x, y, gram=None):
    function = symmetric_moments if form == "symmetric" else teacher_student_moments
    return function(unit_rows(x), unit_rows(y), gram=gram)


def assert_close(ours, reference, tolerance=1e-10):
    torch.testing.assert_close(ours, reference, rtol=tolerance, atol=tolerance)


def assert_equal(ours, reference, variables, criterion=None, nu=1.0, tolerance=1e-10):
    """The same value and gradients; those of the criterion's b divided by nu, of its alpha reversed."""
    variables = [x for x in (*variables, *(criterion.parameters() if criterion else ())) if x.requires_grad]
    mine, theirs = ([x, *torch.autograd.grad(x, variables, retain_graph=True)] for x in (ours, reference))
    if criterion:
        theirs[-2:] = theirs[-2] / nu, -theirs[-1]
    assert_close(mine, theirs, tolerance)


# --------------------------------------------------------------------------------- equality with brute force

@pytest.mark.parametrize("n, dim", [(2, 7), (5, 12), (9, 6)])  # 2n below, n below, and n above D
@pytest.mark.parametrize("gram", [True, False, None])
@pytest.mark.parametrize("form", [*FORMS, "global"])
def test_moments_equal_brute_force(form, gram, n, dim):
    x, y = embeddings(form, n, dim)
    moments = moments_of(form, x, y, gram)
    positive, negative = pairs(form, x, y)
    expected = (positive.mean(), positive.square().mean(), negative.mean(), negative.square().mean())
    for ours, reference in zip(moments, expected):
        assert_equal(ours, reference, (x, y))
    assert moments.negatives == (2 * n - 2 if form == "symmetric" else n - 1)


@pytest.mark.parametrize("nu, kappa, score", [(1.0, 1.0, "cosine"), (16.0, 1.0, "unit"),
                                              ("sum", "sum", "cosine"), ("sum", "sum", "unit")])
@pytest.mark.parametrize("temperature, rho", [(None, 0.0), (0.2, 0.0), (None, 40.0), (0.2, 40.0)])
@pytest.mark.parametrize("form, views, dim", [
    ("symmetric", 2, 6), ("symmetric", 3, 40), ("symmetric", 4, 3), ("teacher_student", 5, 6)])
def test_loss_equals_brute_force_with_alpha_reversed_and_b_scaled(form, views, dim, temperature, rho, nu,
                                                                  kappa, score):
    criterion = AUCCLLoss(a=0.7, b=0.1, alpha=0.4, margin=0.9, negative_weight=nu, score=score,
                          margin_negative_weight=kappa, temperature=temperature, fourth_moment=rho).double()
    if temperature:
        criterion.u.fill_(1.5)
    branches = embeddings(form, 5, dim, views=views)
    positive, negative = pairs(form, *branches)
    number = 4 * views if form == "symmetric" else 4
    nu, kappa = (number if weight == "sum" else weight for weight in (nu, kappa))
    reference = ref.auc_loss(positive, negative, *criterion.parameters(), 0.9, nu, kappa, score, temperature,
                             u=1.5) + rho * (negative**4).mean()
    assert_equal(call(criterion, form, *branches), reference, branches, criterion, nu)
    assert criterion.stats["positive"] == pytest.approx(ref.SCORES[score](positive).mean().item(), abs=1e-12)
    assert_close(criterion.means[1], ref.SCORES[score](negative).mean().detach(), 1e-12)


def test_the_poster_holds_a_and_sums_over_each_anchors_negatives():
    criterion = AUCCLLoss.preset("poster").double()
    x, y = embeddings("symmetric", 5, 6)
    _, b, alpha = criterion.parameters()
    positive, negative = ref.symmetric_pairs(x, y)
    sums = ((negative - b)**2 + 2 * alpha * negative).view(10, 8).sum(1)  # of each anchor
    reference = ((positive - 1)**2 + 2 * alpha * (1 - positive)).mean() + sums.mean() - alpha**2
    assert_equal(criterion(x, y), reference, (x, y), criterion, nu=8)


@pytest.mark.parametrize("form", FORMS)
def test_u_is_the_log_of_a_moving_average_of_earlier_batches(form):
    criterion, average = AUCCLLoss.preset("hard").double(), None
    for seed in range(3):
        x, y = embeddings(form, 4, 6, seed=seed)
        positive, negative = (z.detach() for z in pairs(form, x, y))
        now = (negative / 0.1).exp().mean()
        average = now if average is None else average
        expected = ref.auc_loss(positive, negative, 1, 0, 1, 1, criterion.negative_weight, 1, "cosine", 0.1,
                                average.log())
        assert_close(call(criterion, form, x, y).detach(), expected)
        average = 0.9 * average + 0.1 * now
        assert criterion.stats["u"] == pytest.approx(average.log().item(), abs=1e-10)
    call(criterion.eval(), form, *embeddings(form, 4, 6, seed=9))
    assert criterion.stats["u"] == pytest.approx(average.log().item(), abs=1e-10)  # only training moves it


def test_large_batches_take_the_pairs_within_blocks(monkeypatch):
    monkeypatch.setattr(auccl_loss, "BLOCK", 9)
    views = normal(3, 7, 4)  # 21 views: blocks of 3, 2 and 2 images
    cosines = torch.cat([ref.symmetric_pairs(*views[:, rows])[1] for rows in ([0, 1, 2], [3, 4], [5, 6])])
    views = unit_rows(views)
    assert_close(log_mean_exp(views, views, 0.1, same_view=True), (cosines / 0.1).exp().mean().log())
    assert_close(mean_fourth_power(views, views, same_view=True), (cosines**4).mean())
    monkeypatch.setattr(auccl_loss, "BLOCK", 1)
    assert log_mean_exp(views, views, 0.1).isfinite()  # no block of a single image


def test_released_cifar_equals_its_formula():
    weights = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (10.0, 0.3, 1.0)]
    z0, z1 = embeddings("symmetric", 5, 4)
    z1.data[0] = -z0.data[0]  # a cosine that is clamped
    loss, *_ = released_cifar(z0, z1, *weights)
    assert_equal(loss, ref.released_cifar(z0, z1, *weights), (z0, z1, *weights))
    criterion = AUCCLLoss.preset("released-cifar", b=0.3).double()
    assert_close(criterion(z0, z1), ref.released_cifar(z0, z1, 10.0, criterion.b, 1.0))
    assert criterion.param_groups(lr=0.1)[0]["params"] == [criterion.b]
    for mean, cosines in zip(criterion.means, ref.symmetric_pairs(z0, z1)):
        assert_close(mean, (1 + cosines.detach().mean()) / 2)


def test_released_imagenet_equals_its_formula():
    criterion = AUCCLLoss.preset("released-imagenet").double()
    center = torch.zeros(4, dtype=torch.float64)
    for seed in range(3):  # the center moves between calls
        teacher, student = embeddings("teacher_student", 5, 4, seed=10 * seed)
        reference = ref.released_imagenet(teacher, student, center)
        assert_equal(criterion.teacher_student(teacher, student), reference, (student,))
        q, k = ((teacher - center) / 0.04).softmax(-1), student.detach() / 0.1
        products = ref.teacher_student_pairs(q, k, torch.dot)
        assert_close(criterion.means, torch.stack([(1 + x.mean()) / 2 for x in products]))
        loss, _, _ = released_imagenet(q, k, 2.0, 0.5, 0.7)
        assert_close(loss, ref.released_imagenet(teacher, student.detach(), center, 2.0, 0.5, 0.7))
        center = 0.9 * center + 0.1 * teacher.mean((0, 1))
        assert_close(criterion.center, center)
    criterion.eval().teacher_student(teacher, student)
    assert_close(criterion.center, center)  # only training moves it


@pytest.mark.parametrize("form, gram", [*itertools.product(FORMS, (True, False))])
def test_first_and_second_derivatives(form, gram):
    x, y = embeddings(form, 3, 3)
    weights = [torch.tensor(w, dtype=torch.float64, requires_grad=True) for w in (0.7, 0.1, 0.4)]
    def loss(x, y, a, b, alpha):
        return auc_objective(moments_of(form, x, y, gram), a, b, alpha, 0.9, 4.0, 2.0)
    assert torch.autograd.gradcheck(loss, (x, y, *weights))
    assert torch.autograd.gradgradcheck(loss, (x, y, *weights))


@pytest.mark.parametrize("n", [3, 9])  # matrices of cosines, Gram matrices
@pytest.mark.parametrize("form, preset", [*itertools.product(FORMS, OURS)])
def test_torch_func_grad_equals_autograd(form, preset, n):
    x, y = embeddings(form, n, 6)
    criterion = AUCCLLoss.preset(preset).double()
    expected, = torch.autograd.grad(call(criterion, form, x.detach(), y), y)
    assert_close(torch.func.grad(lambda y: call(criterion, form, x.detach(), y))(y.detach()), expected)
    assert criterion.stats["positive"] <= 1


def test_pair_auc_counts_couples():
    z0, z1 = embeddings("symmetric", 6, 3)
    positive, negative = ref.symmetric_pairs(z0, z1)
    couples = [(p > q).double() + 0.5 * (p == q).double() for p in positive for q in negative]
    assert pair_auc(z0, z1) == pytest.approx(torch.stack(couples).mean().item(), abs=1e-12)
    same = torch.ones(4, 2)
    assert pair_auc(same, same) == 0.5  # all tied


# ------------------------------------------------------------------------------------------- the saddle point

@pytest.mark.parametrize("form, score, nu, kappa, temperature", [
    ("symmetric", "cosine", 1.0, 1.0, None), ("teacher_student", "unit", 64.0, 1.0, None),
    ("symmetric", "cosine", "sum", "sum", None), ("symmetric", "cosine", 8.0, 1.0, 0.1)])
def test_plain_steps_reach_the_saddle_which_is_the_square_surrogate(form, score, nu, kappa, temperature):
    """At fixed embeddings, by SGD at one step size for every nu. A temperature: of the hardest negatives."""
    criterion = AUCCLLoss(negative_weight=nu, margin_negative_weight=kappa, score=score,
                          temperature=temperature).double()
    x, y = (z.detach() for z in embeddings(form, 6, 4))
    optimizer = torch.optim.SGD(criterion.parameters(), lr=0.4)
    for _ in range(60):
        optimizer.zero_grad()
        call(criterion, form, x, y).backward()
        optimizer.step()
    positive, negative = (ref.SCORES[score](cosines) for cosines in pairs(form, x, y))
    hardest = negative.mean()
    if temperature:
        hardest = temperature * (negative / temperature).exp().mean().log()
    violation = 1 - positive.mean() + (10 if kappa == "sum" else kappa) * hardest
    for weight, value in zip(criterion.parameters(), (positive.mean(), negative.mean(), violation)):
        assert_close(weight.detach(), value, 1e-8)
    if kappa == 1:
        expected = ref.surrogate(positive, negative, 1.0) + (nu - 1) * negative.var(correction=0)
        expected += violation**2 - (1 - positive.mean() + negative.mean())**2  # 0 without a temperature
        assert_close(call(criterion, form, x, y).detach(), expected, 1e-8)


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("build, options", [
    (torch.optim.SGD, dict(lr=0.1, momentum=0.5)), (torch.optim.Adam, dict(lr=0.02)),
    (torch.optim.AdamW, dict(lr=0.02)), (timm.optim.Lars, dict(lr=0.1)), (timm.optim.Lamb, dict(lr=0.02)),
    (timm.optim.Muon, dict(lr=0.02)), (timm.optim.Adafactor, dict(lr=0.02, scale_parameter=False))])
def test_every_optimizer_does_descent_ascent(build, options, grouped):
    criterion, bystander = AUCCLLoss(a=0.0, b=0.4, alpha=0.4), torch.nn.Parameter(torch.ones(4, 4))
    x, y = (z.detach().float() for z in embeddings("symmetric", 8, 4))
    parameters = ([{"params": [bystander]}, *criterion.param_groups(lr=0.02)] if grouped else
                  [bystander, *criterion.parameters()])
    optimizer = build(parameters, **options)
    with torch.no_grad():
        moments = symmetric_moments(unit_rows(x), unit_rows(y))
        a, b = moments.positive_mean, moments.negative_mean
        saddle = torch.stack([a, b, 1 - a + b])
    def distance():
        return (torch.stack([*criterion.parameters()]).detach() - saddle).abs()
    start = distance()
    for _ in range(150):
        optimizer.zero_grad()
        (criterion(x, y) + 0 * bystander.sum()).backward()
        optimizer.step()
    assert (start > 0.2).all() and (distance() < 0.05).all()


@pytest.mark.parametrize("options", [{"lr": 0.05, "maximize": True}, {"lr": 1.5}])
def test_one_warning_when_alpha_leaves_its_range(options):
    criterion = AUCCLLoss()
    x, y = (z.detach().float() for z in embeddings("symmetric", 8, 4))
    optimizer = torch.optim.SGD([criterion.alpha], **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(30):
            assert criterion.alpha.abs() > 3 or not caught
            optimizer.zero_grad()
            criterion(x, y).backward()
            optimizer.step()
    assert len(caught) == 1 and "maximize=True" in str(caught[0].message) and "+-3" in str(caught[0].message)


def test_off_the_cpu_alpha_is_read_at_every_100th_call(monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: contextlib.nullcontext())  # meta has none
    criterion, z = AUCCLLoss(), torch.zeros(3, 4, device="meta")  # whose values cannot be read
    for _ in range(99):
        criterion(z, z)
    with pytest.raises(RuntimeError, match="meta"):
        criterion(z, z)


def test_collapse_is_no_minimum_of_the_defaults():
    """A student facing a fixed teacher can reach any mean cosine c. With kappa = nu > 1, the collapsed
    a = b = c = -m/(nu - 1) has loss 0; with the default kappa = 1 every collapsed network pays m^2."""
    def collapsed_loss(kappa, nu, c, temperature=None):
        teacher, student = (torch.tensor([x, math.sqrt(1 - x * x)], dtype=torch.float64) for x in (1, c))
        criterion = AUCCLLoss(a=c, b=c, alpha=1 - c + kappa * c, negative_weight=nu,
                              margin_negative_weight=kappa, temperature=temperature).double()
        return criterion.teacher_student(teacher.expand(1, 6, 2), student.expand(2, 6, 2)).item()
    assert collapsed_loss(kappa=4.0, nu=4.0, c=-1 / 3) == pytest.approx(0, abs=1e-12)
    default = AUCCLLoss().margin_negative_weight
    for c, t in itertools.product((-0.9, -1 / 3, 0.0, 0.5, 1.0), (None, 0.1)):
        assert collapsed_loss(default, 4.0, c, t) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("preset", ["hard", "quartic"])
def test_hard_negatives_leave_collapse(preset, views):
    """Embeddings that are all but equal fall apart under plain steps."""
    criterion, z = AUCCLLoss.preset(preset).double(), torch.nn.Parameter(1 + 1e-3 * normal(6, 8))
    optimizer = torch.optim.SGD([{"params": [z], "lr": 2.0}, *criterion.param_groups(lr=0.05)])
    for _ in range(100):
        optimizer.zero_grad()
        criterion(*[z] * views).backward()
        optimizer.step()
    assert criterion.stats["negative"] < 0.1


# ----------------------------------------------------------------------------------------------- unbiasedness

VIEWS = normal(3, 6, 4)  # of 6 images


def small_network():
    network = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3)).double()
    for index, p in enumerate(network.parameters()):
        p.data = normal(*p.shape, seed=index)
    return network


def relative_bias(loss, network, size, weights=()):
    """Of the gradient for network and weights: its mean over ALL batches of `size` of the 6 images, against
    that of all 6."""
    def mean_gradient(size):
        batches = [VIEWS[:, list(batch)] for batch in itertools.combinations(range(6), size)]
        grads = [torch.autograd.grad(loss(*network(views)), [*network.parameters(), *weights])
                 for views in batches]
        return torch.stack([torch.cat([g.flatten() for g in grad]) for grad in grads]).mean(0)
    population = mean_gradient(6)
    return ((mean_gradient(size) - population).norm() / population.norm()).item()


@pytest.mark.parametrize("size", range(2, 6))
@pytest.mark.parametrize("form, options", [
    ("symmetric", {}), ("symmetric", dict(negative_weight=4.0, margin_negative_weight=4.0)),
    ("symmetric", dict(temperature=0.1)), ("symmetric", dict(temperature=0.5)),
    ("symmetric", dict(fourth_moment=40.0)), ("teacher_student", {}),
    ("teacher_student", dict(fourth_moment=40.0))])
def test_every_batch_size_is_unbiased(form, options, size):
    network, criterion = small_network(), AUCCLLoss(a=0.3, b=0.1, alpha=0.6, **options).double().eval()
    weights = [*criterion.parameters()]
    if temperature := criterion.temperature:
        _, negative = ref.symmetric_pairs(*network(VIEWS))
        criterion.u = (negative / temperature).exp().mean().log().detach().requires_grad_()
        weights.append(criterion.u)

    def loss(*views):
        x, y = views[:2] if form == "symmetric" else (torch.stack(views[:2]).detach(), torch.stack(views))
        return call(criterion, form, x, y)
    assert relative_bias(loss, network, size, weights) < 1e-10


@pytest.mark.parametrize("size", range(2, 7))
@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_softmax_losses_and_logs_of_batch_means_are_biased(temperature, size):
    def log_of_this_batch(z0, z1, _):
        z = unit_rows(torch.stack([z0, z1]))
        hardest = temperature * log_mean_exp(z, z, temperature, same_view=True)
        return hardest - symmetric_moments(*z).positive_mean
    for loss in (log_of_this_batch, lambda z0, z1, _: ref.nt_xent(z0, z1, temperature),
                 lambda z0, z1, _: ref.dcl(z0, z1, temperature)):
        assert (relative_bias(loss, small_network(), size) > 1e-3) == (size < 6)


# ------------------------------------------------------------------------------------------------------ edges

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("preset, form", PRESET_FORMS)
def test_low_precision_inputs_and_autocast(preset, form, dtype):
    """Moments are taken in float32: the loss is that of the rounded embeddings, inside autocast or not. A
    teacher gets no gradient."""
    x, y = (z.detach().to(dtype).requires_grad_() for z in embeddings(form, 40, 8))
    expected = call(AUCCLLoss.preset(preset).double(), form, x.detach().double(), y.detach().double())
    with torch.autocast("cpu", torch.bfloat16):
        loss = call(AUCCLLoss.preset(preset), form, x, y)
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    assert y.grad.dtype == dtype and y.grad.isfinite().all() and y.grad.abs().sum() > 0
    assert (x.grad is None) == (form == "teacher_student")


@pytest.mark.parametrize("form, preset", [*itertools.product(FORMS, OURS)])
@pytest.mark.parametrize("n", [2, 30])
@pytest.mark.parametrize("kind", ["equal", "zero", "one zero", "large"])
def test_degenerate_embeddings_stay_finite(form, preset, n, kind):
    x, y = (z.detach().float() for z in embeddings(form, n, 8))
    for z in (x, y):
        if kind == "large":
            z *= 1e15
        else:
            z[..., :1 if kind == "one zero" else n, :] = kind == "equal"
    x, y = x.requires_grad_(), y.requires_grad_()
    criterion = AUCCLLoss.preset(preset)
    loss = call(criterion, form, x, y)
    loss.backward()
    assert loss.isfinite() and y.grad.isfinite().all() and criterion.alpha.grad.isfinite()
    if kind == "one zero":
        assert (y.grad[..., 0, :] == 0).all()  # a zero row has no direction to improve
    if kind == "equal":
        # nu (1 - b)^2 + rho + 2 alpha m - alpha^2
        expected = criterion.negative_weight + criterion.fourth_moment + 2 * criterion.margin - 1
        assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_no_overflow_at_a_low_temperature_when_embeddings_collapse_at_once():
    criterion = AUCCLLoss(temperature=0.01)
    for spread in (1.0, 0.0, 1.0):
        z = torch.lerp(torch.ones(8, 8), torch.eye(8), spread).requires_grad_()
        loss = criterion(z, z)
        loss.backward()
        assert loss.isfinite() and z.grad.isfinite().all() and criterion.u.isfinite()


@pytest.mark.parametrize("shapes, message", [
    ([(1, 4), (1, 4)], "at least two images"), ([(3, 4), (3, 5)], "one n and D"),
    ([(3, 4), (2, 4)], "one n and D"), ([(3,), (3,)], r"\[n, D\]")])
def test_bad_embeddings(shapes, message):
    for criterion in (AUCCLLoss(), AUCCLLoss.preset("released-cifar")):
        with pytest.raises(ValueError, match=message):
            criterion(*map(torch.zeros, shapes))
    with pytest.raises(ValueError, match="floating point"):
        AUCCLLoss()(torch.zeros(3, 4, dtype=torch.int64), torch.zeros(3, 4))
    with pytest.raises(ValueError, match="two views"):
        AUCCLLoss()(torch.zeros(3, 4))


@pytest.mark.parametrize("teacher, student, message", [
    ((2, 1, 4), (3, 1, 4), "at least two images"), ((3, 3, 4), (2, 3, 4), "every teacher view"),
    ((1, 3, 4), (1, 3, 4), "every teacher view"), ((3, 4), (3, 4), r"\[views, n, D\]")])
def test_bad_teacher_student(teacher, student, message):
    for criterion in (AUCCLLoss(), AUCCLLoss.preset("released-imagenet")):
        with pytest.raises(ValueError, match=message):
            criterion.teacher_student(torch.zeros(teacher), torch.zeros(student))


@pytest.mark.parametrize("preset, arguments, message", [
    ("simclr", {}, "unknown preset"), ("paper", dict(learn=("a", "beta")), "beta"),
    ("paper", dict(score="angle"), "angle"), ("paper", dict(margin_negative_weight=-1.0), "positive"),
    ("paper", dict(negative_weight="mean"), "mean"), ("paper", dict(temperature=0.0), "temperature"),
    ("paper", dict(fourth_moment=-1.0), "fourth_moment"), ("released-cifar", dict(learn=("alpha",)), "alpha"),
    ("released-cifar", dict(fourth_moment=1.0), "has no fourth_moment"),
    ("released-imagenet", dict(margin=2.0, gather=True), "has no gather, margin")])
def test_bad_arguments(preset, arguments, message):
    with pytest.raises(ValueError, match=message):
        AUCCLLoss.preset(preset, **arguments)


def test_the_released_losses_have_one_form_each():
    with pytest.raises(ValueError, match="no teacher"):
        AUCCLLoss.preset("released-cifar").teacher_student(*torch.zeros(2, 2, 3, 4))
    with pytest.raises(ValueError, match="no symmetric form"):
        AUCCLLoss.preset("released-imagenet")(*torch.zeros(2, 3, 4))


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
    assert call(restored, form, x, y) == call(copy.deepcopy(saved), form, x, y)
