"""Updates against formulas written out in NumPy, against torch, and against other implementations."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dlopt.basics.errors import UserError
from dlopt.lab.verify.references import (
    Formula,
    adadelta,
    adagrad,
    adam,
    averaging,
    lamb,
    lars,
    lion,
    nadam,
    radam,
    rmsprop,
    rprop,
    sgd,
    sgdw,
)
from dlopt.optim import LAMB, LARS, SAM, SGDW, AdaBelief, Lion, LossClosure, Muon, Rprop, common
from dlopt.optim.orthogonalize import orthogonalize
from tests.support.updates import (
    GRADS,
    SHAPES,
    START,
    parameters,
    path,
    set_gradients,
    written,
)

FORMULAS: dict[str, tuple[str, list[str], Formula]] = {
    "sgd": ("sgd", ["lr=0.1", "weight_decay=0.3"], sgd),
    "sgd without momentum": ("sgd", ["lr=0.1", "momentum=0.0"], lambda w, gs: sgd(w, gs, momentum=0, wd=0)),
    "nesterov": ("sgd", ["lr=0.1", "nesterov=true"], lambda w, gs: sgd(w, gs, wd=0, nesterov=True)),
    "gradient_descent": ("gradient_descent", ["lr=0.1"], lambda w, gs: sgd(w, gs, momentum=0, wd=0)),
    "momentum": ("momentum", ["lr=0.1"], averaging),
    "sgdw": ("sgdw", ["lr=0.1", "weight_decay=0.3"], lambda w, gs: averaging(w, gs, wd=0.3)),
    "sgdw, paper": ("sgdw", ["lr=0.1", "weight_decay=0.3"], sgdw),
    "rprop": ("rprop", ["lr=0.1", "step_sizes=[0.04,0.13]"], rprop),
    "irprop": ("irprop", ["lr=0.1", "step_sizes=[0.04,0.13]"], lambda w, gs: rprop(w, gs, skip=True)),
    "adagrad": ("adagrad", ["lr=0.1"], adagrad),
    "adadelta": ("adadelta", [], adadelta),
    "rmsprop": ("rmsprop", ["lr=0.1"], rmsprop),
    "adam": ("adam", ["lr=0.1"], adam),
    "adamw": ("adamw", ["lr=0.1", "weight_decay=0.3"], lambda w, gs: adam(w, gs, wd=0.3)),
    "nadam": ("nadam", ["lr=0.1"], nadam),
    "radam": ("radam", ["lr=0.1"], radam),
    "lion": ("lion", ["lr=0.1", "weight_decay=0.3"], lion),
    "lamb": ("lamb", ["lr=0.1", "weight_decay=0.3"], lamb),
    "lars": ("lars", ["lr=0.1", "weight_decay=0.3", "trust_coefficient=0.02"], lars),
}


@pytest.mark.parametrize("case", FORMULAS)
def test_formula_at_every_step(case: str, choose: Callable[..., Any]) -> None:
    choice, typed, formula = FORMULAS[case]
    params = parameters()
    ours = path(choose(choice, params.values(), *typed), params)
    # torch keeps NAdam's product of momenta as a float32 number
    torch.testing.assert_close(ours, written(formula), rtol=2e-6 if choice == "nadam" else 1e-11, atol=1e-12)


@pytest.mark.parametrize(("momentum", "equal"), [(0.0, True), (0.9, False)])
def test_sgdw_is_the_l2_loss_without_momentum_only(momentum: float, equal: bool) -> None:
    first, second = parameters()["vector"], parameters()["vector"]
    draw = np.random.default_rng(1)
    inputs, targets = torch.tensor(draw.normal(size=(20, 5))), torch.tensor(draw.normal(size=20))

    def squared_error(p: Tensor) -> Tensor:
        return ((inputs @ p - targets) ** 2).mean()

    decoupled = SGDW([first], lr=0.05, momentum=momentum, weight_decay=0.3)
    coupled = SGDW([second], lr=0.05, momentum=momentum, weight_decay=0.0)
    for _ in range(10):
        decoupled.step(LossClosure(decoupled, lambda: squared_error(first)))
        coupled.step(LossClosure(coupled, lambda: squared_error(second) + 0.5 * 0.3 * (second**2).sum()))
    assert torch.allclose(first, second, rtol=1e-12, atol=0) is equal


def test_rprop_steps_where_torch_skips_after_a_sign_change() -> None:
    for make, third in ((Rprop, -0.5), (torch.optim.Rprop, 0.0)):
        p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = make([p], lr=1.0)
        steps, before = [], 0.0
        for g in (1.0, 1.0, -1.0, -1.0):
            p.grad = torch.full_like(p, g)
            optimizer.step()
            steps.append(before - p.item())
            before = p.item()
        assert steps[:3] == pytest.approx([1.0, 1.2, 1.2 * third])


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=20), st.floats(1e-3, 10))
def test_rprop_step_sizes_stay_within_their_bounds(grads: list[float], lr: float) -> None:
    p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = Rprop([p], lr=lr, step_sizes=(0.01, 0.5))
    for i, g in enumerate(grads):
        before = p.item()
        p.grad = torch.full_like(p, g)
        optimizer.step()
        moved = abs(p.item() - before)
        assert moved == 0 if g == 0 else 0.01 - 1e-9 <= moved <= 0.5 + 1e-9, i


# pytorch-optimizer's LAMB adds eps to the norm below as well; adam_debias=True leaves the bias uncorrected.
ORACLES = {
    "LAMB": (
        lambda p: LAMB(p, lr=0.1, weight_decay=0.3, eps=1e-13, bias_correction=False, max_weight_norm=10.0),
        lambda o, p: o.Lamb(p, lr=0.1, weight_decay=0.3, eps=1e-13, weight_decouple=False, adam_debias=True),
    ),
    "LARS": (
        lambda p: LARS(p, lr=0.1, weight_decay=0.0, momentum=0.8, trust_coefficient=0.02),
        lambda o, p: o.LARS(p, lr=0.1, weight_decay=0.0, momentum=0.8, trust_coefficient=0.02),
    ),
    "LARS with decay, on matrices": (
        lambda p: LARS(p[:2], lr=0.1, weight_decay=0.3),
        lambda o, p: o.LARS(p[:2], lr=0.1, weight_decay=0.3),
    ),
    "Lion": (lambda p: Lion(p, lr=0.1, weight_decay=0.3), lambda o, p: o.Lion(p, lr=0.1, weight_decay=0.3)),
}


@pytest.mark.parametrize("case", ORACLES)
def test_equals_pytorch_optimizer(case: str) -> None:
    oracle = pytest.importorskip("pytorch_optimizer")
    ours, theirs = ORACLES[case]
    first, second = parameters(), parameters()
    a = path(ours(list(first.values())), first)
    b = path(theirs(oracle, list(second.values())), second)
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert not torch.equal(a[0], a[-1])


def test_adabelief_adapts_to_small_gradients() -> None:
    """With the default eps, as in the authors' code; 1e-8 would be a floor of 0.003 under gradients of 0.001."""
    oracle = pytest.importorskip("pytorch_optimizer")
    first, second = parameters(), parameters()
    small = [{name: 1e-3 * (1 + g) for name, g in gradient.items()} for gradient in GRADS]
    a = path(AdaBelief(first.values()), first, small)
    b = path(oracle.AdaBelief(second.values()), second, small)
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert (a[-1] - a[-2]).abs().mean() > 0.7e-3  # of lr = 0.001; 0.3e-3 with eps = 1e-8


def test_muon_scales_kernels_as_the_matrices_that_it_orthogonalizes() -> None:
    """The author's code takes height / width there: updates shorter by sqrt(out / (in * height * width))."""
    kernel, matrix = (nn.Parameter(torch.zeros(shape)) for shape in ((64, 3, 3, 3), (64, 27)))
    matrix.grad = torch.randn(64, 27, generator=torch.Generator().manual_seed(0))
    kernel.grad = matrix.grad.view_as(kernel).clone()
    Muon([kernel, matrix], lr=0.1).step()
    assert torch.equal(kernel.view_as(matrix), matrix)
    author = 0.1 * orthogonalize(matrix.grad.unsqueeze(0), (3.4445, -4.775, 2.0315), 5, 1e-7)[0].float()
    assert float(matrix.detach().norm() / author.norm()) == pytest.approx((64 / 27) ** 0.5, rel=1e-2)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_sam_equals_pytorch_optimizer(base: Any, adaptive: bool, problem: Callable[..., Any]) -> None:
    oracle = pytest.importorskip("pytorch_optimizer")
    first, second = problem(), problem()
    ours = SAM(base=base(first.params, lr=0.1), rho=0.2, adaptive=adaptive)
    theirs = oracle.SAM(second.params, base, lr=0.1, rho=0.2, adaptive=adaptive)
    for _ in range(6):
        ours.step(LossClosure(ours, first.loss))
        closure = LossClosure(theirs, second.loss)
        closure()  # theirs wants the first gradient in place
        theirs.step(closure)
    torch.testing.assert_close(first.weights(), second.weights(), rtol=1e-5, atol=1e-7)  # theirs: float32 norms


def test_sam_uses_the_gradient_at_the_perturbed_weights(problem: Callable[..., Any]) -> None:
    p = problem()
    before = p.weights()
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(p.loss(), p.params)])
    other = problem()
    with torch.no_grad():
        nn.utils.vector_to_parameters(before + 0.3 * gradient / gradient.norm(), other.params)
    expected = torch.cat([g.reshape(-1) for g in torch.autograd.grad(other.loss(), other.params)])
    # two groups, one learning rate twice the other: the neighbourhood is that of all parameters
    groups: list[dict[str, Any]] = [{"params": p.params[:2]}, {"params": p.params[2:], "lr": 0.2}]
    optimizer = SAM(base=torch.optim.SGD(groups, lr=0.1), lr=0.05, rho=0.3)
    optimizer.step(LossClosure(optimizer, p.loss))
    size = sum(q.numel() for q in p.params[:2])
    moved = before - p.weights()
    torch.testing.assert_close(moved[:size], 0.05 * expected[:size])
    torch.testing.assert_close(moved[size:], 0.1 * expected[size:])


def test_sam_with_rho_zero_is_its_base(problem: Callable[..., Any]) -> None:
    first, second = problem(), problem()
    sam, plain = SAM(base=torch.optim.Adam(first.params), rho=0.0), torch.optim.Adam(second.params)
    for _ in range(4):
        sam.step(LossClosure(sam, first.loss))
        plain.step(LossClosure(plain, second.loss))
    assert torch.equal(first.weights(), second.weights())


def test_sam_rejects_unsupported_bases_and_missing_closures(problem: Callable[..., Any]) -> None:
    p = problem()
    with pytest.raises(UserError, match=r"SAM.*call step"):
        SAM(base=torch.optim.SGD(p.params)).step()
    with pytest.raises(UserError, match=r"optimizer\.base=LBFGS"):
        SAM(base=torch.optim.LBFGS(p.params))


def test_muon_equals_torch_for_matrices_and_adamw_otherwise() -> None:
    first, second = parameters(), parameters()
    ours = Muon(first.values(), lr=0.05, weight_decay=0.3, rest_lr=0.01)
    kernel = nn.Parameter(second["kernel"].detach().reshape(3, -1))  # an independent one takes matrices only
    torchs = torch.optim.Muon([kernel, second["matrix"]], lr=0.05, weight_decay=0.3)
    adamw = torch.optim.AdamW([second["vector"]], lr=0.01, weight_decay=0.3)
    for gradient in GRADS:
        for params in (first, second):
            set_gradients(params, gradient)
        kernel.grad = torch.tensor(gradient["kernel"].reshape(3, -1))
        for optimizer in (ours, torchs, adamw):
            optimizer.step()
    torch.testing.assert_close(first["kernel"].reshape(3, -1), kernel, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(first["matrix"], second["matrix"], rtol=1e-12, atol=1e-14)
    assert torch.equal(first["vector"], second["vector"])


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 24, 216), (1, 64, 10)])
def test_orthogonalization_against_singular_vectors(shape: tuple[int, ...]) -> None:
    """The directions are those of the singular value decomposition, the singular values all come near 1."""
    matrices = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    found = orthogonalize(matrices, (3.4445, -4.775, 2.0315), 5, 1e-7)
    assert found.dtype == torch.bfloat16
    inner = u.mT @ found.double() @ v.mT  # diagonal where the directions are kept
    values = inner.diagonal(dim1=1, dim2=2)
    assert values.min() > 0.3 and values.max() < 1.3
    assert (inner - torch.diag_embed(values)).abs().max() < 0.05  # bfloat16
    # with coefficients that converge (1.875, -1.25, 0.375) and enough steps it is U V^T itself
    exact = orthogonalize(matrices, (1.875, -1.25, 0.375), 25, 1e-7).double()
    torch.testing.assert_close(exact, u @ v, rtol=0, atol=0.02)


def test_muon_normalizes_weights_before_the_update() -> None:
    params, plain = parameters(), parameters()
    with torch.no_grad():
        for name in ("kernel", "matrix"):
            plain[name].mul_(len(plain[name]) ** 0.5 / plain[name].norm())
    first = Muon(params.values(), lr=0.1, weight_decay=0.0, normalize_weights=True)
    second = Muon(plain.values(), lr=0.1, weight_decay=0.0)
    path(first, params, GRADS[:1])
    path(second, plain, GRADS[:1])
    torch.testing.assert_close(dict(params), dict(plain))


def test_muon_does_not_normalize_zero_weights() -> None:
    """`init.zero_last_gamma` of a network without norm layers starts matrices at zero."""
    zero = nn.Parameter(torch.zeros(4, 3))
    zero.grad = torch.ones(4, 3)
    Muon([zero], lr=0.1, normalize_weights=True).step()
    assert zero.isfinite().all() and zero.any()


def test_muon_takes_a_learning_rate_in_a_tensor() -> None:
    """As captured graphs need it: the same weights as with a number."""
    params, plain = parameters(), parameters()
    first, second = Muon(params.values(), rest="sgd", rest_lr=0.01), Muon(plain.values(), rest="sgd", rest_lr=0.01)
    for group in first.param_groups:
        group["lr"] = torch.tensor(group["lr"], dtype=torch.float64)
    path(first, params)
    path(second, plain)
    torch.testing.assert_close(dict(params), dict(plain))


def test_muon_does_not_depend_on_the_layout_of_kernels() -> None:
    first, second = parameters(), parameters()
    second["kernel"].data = second["kernel"].data.contiguous(memory_format=torch.channels_last)
    gradients = [{name: 1e3 * g for name, g in gradient.items()} for gradient in GRADS]
    a, b = path(Muon(first.values()), first, gradients), path(Muon(second.values()), second, gradients)
    assert second["kernel"].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(a, b, rtol=0, atol=0.02 * 8 * 0.02)  # bfloat16 inside
    assert float((second["kernel"] - torch.tensor(START["kernel"])).detach().norm()) > 0.1


def test_a_group_with_a_momentum_of_its_own_updates_vectors_by_adamw() -> None:
    vectors = [nn.Parameter(torch.tensor([1.0, -2.0])) for _ in range(2)]
    ours = Muon([{"params": vectors[:1], "momentum": 0.8}], rest_lr=0.03, weight_decay=0.3)
    torchs = torch.optim.AdamW(vectors[1:], lr=0.03, weight_decay=0.3)
    for t in range(4):
        for p, optimizer in zip(vectors, (ours, torchs), strict=True):
            p.grad = torch.tensor([0.5, t - 1.0])
            optimizer.step()
    torch.testing.assert_close(vectors[0], vectors[1], rtol=1e-6, atol=0)


def test_muon_with_sgd_takes_gradients_that_begin_later() -> None:
    vectors = [nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2)]
    optimizer = Muon(vectors, rest="sgd", rest_lr=0.1, rest_momentum=0.5, weight_decay=0.0)
    for late in (False, True):
        for p, active in zip(vectors, (True, late), strict=True):
            p.grad = torch.ones_like(p) if active else None
        optimizer.step()
    # Nesterov: 0.1 * (1 + 0.5) in the first update, 0.1 * (1 + 0.5 * 1.5) in the second
    torch.testing.assert_close(vectors[0].detach(), torch.full_like(vectors[0], 1 - 0.15 - 0.175))
    torch.testing.assert_close(vectors[1].detach(), torch.full_like(vectors[1], 1 - 0.15))


def test_muon_groups() -> None:
    params = parameters()
    groups = [
        {"params": [params["kernel"], params["vector"]], "lr": 0.5, "weight_decay": 0.0},
        {"params": [params["matrix"]], "use_muon": False},
    ]
    optimizer = Muon(groups, lr=0.1, rest_lr=0.01, rest="sgd")
    seen = {tuple(g["params"][0].shape): (g["lr"], g["weight_decay"], g["use_muon"]) for g in optimizer.param_groups}
    assert seen[SHAPES["kernel"]] == (0.5, 0.0, True)
    assert seen[SHAPES["vector"]] == (pytest.approx(0.05), 0.0, False)  # keeps its ratio to the default
    assert seen[SHAPES["matrix"]] == (pytest.approx(0.01), 0.01, False)
    reference = nn.Parameter(torch.tensor(START["matrix"]))
    sgd_ = torch.optim.SGD([reference], lr=0.01, momentum=0.9, nesterov=True, weight_decay=0.01)
    path(optimizer, params)
    path(sgd_, {"matrix": reference})
    assert torch.equal(params["matrix"], reference)


@pytest.mark.parametrize("choice", ["schedule_free_sgd", "schedule_free_adamw"])
def test_evaluations_do_not_change_schedule_free_training(
    choice: str, problem: Callable[..., Any], choose: Callable[..., Any]
) -> None:
    package = pytest.importorskip("schedulefree")
    first, second, third = problem(), problem(), problem()
    plain, watched = choose(choice, first.params), choose(choice, second.params)
    original = package.SGDScheduleFree if choice.endswith("sgd") else package.AdamWScheduleFree
    reference = original(third.params, lr=plain.defaults["lr"])
    reference.train()
    for _ in range(8):
        plain.step(LossClosure(plain, first.loss))
        watched.step(LossClosure(watched, second.loss))
        reference.step(LossClosure(reference, third.loss))
        training = second.weights()
        watched.eval()
        assert _ == 0 or not torch.equal(second.weights(), training)
        watched.train()
        assert torch.equal(second.weights(), training)
    assert torch.equal(first.weights(), second.weights())
    assert torch.equal(first.weights(), third.weights())
    plain.eval()
    reference.eval()
    assert torch.equal(first.weights(), third.weights())


def test_sgd_on_a_two_layer_net_equals_backpropagation_by_hand() -> None:
    """tanh hidden layer, softmax cross-entropy; heavy ball and L2 penalty; NumPy from the inputs to the weights."""
    draw = np.random.default_rng(1)
    x, y = draw.normal(size=(16, 6)), draw.integers(3, size=16)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    w1, b1, w2, b2 = (p.detach().numpy().copy() for p in net.parameters())
    buffers = [np.zeros_like(w) for w in (w1, b1, w2, b2)]
    lr, momentum, decay = 0.2, 0.9, 0.01
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=momentum, weight_decay=decay)
    for _ in range(25):
        closure = LossClosure(optimizer, lambda: nn.functional.cross_entropy(net(torch.tensor(x)), torch.tensor(y)))
        loss = optimizer.step(closure)

        hidden = np.tanh(x @ w1.T + b1)
        scores = hidden @ w2.T + b2
        shares = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
        assert float(loss) == pytest.approx(-np.log(shares[np.arange(16), y]).mean(), rel=1e-13)
        error = (shares - np.eye(3)[y]) / 16
        back = error @ w2 * (1 - hidden**2)
        grads = (back.T @ x, back.sum(0), error.T @ hidden, error.sum(0))
        for w, g, v in zip((w1, b1, w2, b2), grads, buffers, strict=True):
            v *= momentum
            v += g + decay * w
            w -= lr * v
        for p, w in zip(net.parameters(), (w1, b1, w2, b2), strict=True):
            np.testing.assert_allclose(p.detach().numpy(), w, rtol=1e-12, atol=1e-14)


def test_lars_moves_a_matrix_of_zeros_by_the_learning_rate() -> None:
    """Its norm, zero, is no scale: by the formula it would stay zero for ever."""
    p, other = torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.ones(2, 2))
    p.grad, other.grad = torch.tensor([[1.0, -2.0], [0.0, 4.0]]), torch.ones(2, 2)
    LARS([p, other], lr=0.5, weight_decay=0.0, trust_coefficient=0.02).step()
    torch.testing.assert_close(p.detach(), torch.tensor([[-0.5, 1.0], [0.0, -2.0]]))
    torch.testing.assert_close(other.detach(), torch.full((2, 2), 1 - 0.5 * 0.02))


def test_muon_decays_weights_in_bfloat16_without_rounding_the_factor() -> None:
    p = nn.Parameter(torch.full((2, 2), 3.0, dtype=torch.bfloat16))
    p.grad = torch.zeros_like(p)
    Muon([p], lr=0.1, weight_decay=0.37).step()
    assert torch.equal(p, torch.full((2, 2), 3.0 * (1 - 0.1 * 0.37)).bfloat16())


def test_muon_fuses_the_step_of_other_parameters_where_torch_can() -> None:
    dense, strided = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(6)[::2])
    for params, fused in (([dense], True), ([strided], None), ([dense, strided], None)):
        optimizer = Muon([*params, nn.Parameter(torch.ones(2, 2))])
        assert [group["fused"] for group in optimizer.param_groups if not group["use_muon"]] == [fused]
    assert Muon([dense], cautious=True).param_groups[0].get("fused") is None


def test_foreach_updates_take_the_parameters_in_chunks_of_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "_CHUNK", 10)
    params = [nn.Parameter(torch.zeros(size)) for size in (4, 6, 1, 12, 0, 3, 7, 2)]
    for p in params[:-1]:
        p.grad = torch.zeros_like(p)
    assert [[len(p) for p in chunk] for chunk in common.chunks(params)] == [[4, 6], [1], [12], [3, 7]]
    assert list(common.chunks(params[-1:])) == []
    placed = [
        nn.Parameter(torch.zeros(9, dtype=d, device="meta")) for d in (torch.float32, torch.float64, torch.float32)
    ]
    for p in placed:
        p.grad = torch.zeros_like(p)
    found = list(common.chunks([*placed, params[0]]))  # those on an accelerator last, by dtype
    assert [list(map(id, chunk)) for chunk in found] == [
        [id(params[0])],
        [id(placed[0]), id(placed[2])],
        [id(placed[1])],
    ]


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (torch.zeros(2, 3), True),
        (torch.zeros(2, 3).T, True),
        (torch.zeros(4)[::2], False),
        (torch.zeros(1).expand(2), False),
        (torch.zeros(2, 3)[:, :2], False),
        (torch.zeros(()), True),
        (torch.zeros(2, 3, 4, 4).contiguous(memory_format=torch.channels_last), True),
    ],
)
def test_dense_tensors_fill_their_memory(tensor: Tensor, expected: bool) -> None:
    assert common.is_dense(tensor) is expected
