"""The cases: each is a few lines of plain PyTorch, which also reproduce a failure.

A case gets functions whose text precedes it in a reproduction (`dlopt.lab.verify.subject`): `make(params, **keys)`
builds the optimizer, `fresh(dtype)` returns parameters, the same at each call, `update(o, params, loss)` makes one
update. It raises AssertionError, with the observed values, if the optimizer is wrong.
"""

import contextlib
import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import torch

Make = Callable[..., torch.optim.Optimizer]
Update = Callable[..., Any]
Fresh = Callable[..., Any]
Loss = Callable[[Any], Any]
Flag = dict[str, Any]

# -- convex problems


def sphere(params: Any) -> Any:
    return sum((p - 1).square().sum() / 2 for p in params)


def ill_conditioned(params: Any) -> Any:
    return sum((torch.logspace(-2, 0, p.numel()).to(p).view_as(p) * (p - 1) ** 2).sum() / 2 for p in params)


def least_squares(params: Any) -> Any:
    return sum((torch.arange(6 * len(p)).to(p).view(6, -1).cos() @ p - 1).square().mean() / 8 for p in params)


def logistic(params: Any) -> Any:
    return sum(
        (-torch.arange(6 * len(p)).to(p).view(6, -1).cos() @ p).exp().log1p().mean() + (p**2).mean() for p in params
    )


def pseudo_huber(params: Any) -> Any:
    return sum((1 + (p - 1) ** 2).sqrt().sum() for p in params)


PROBLEMS: tuple[Loss, ...] = (sphere, ill_conditioned, least_squares, logistic, pseudo_huber)


SHAPES = (3, 2), (3, 2), (2, 3), (4,), (4,), ()
MATRIX_SHAPES = (8, 4), (8, 4), (4, 6), (5, 4), (4, 4)
ABSENT = (3, 7), (2, 5), (6,), (0, 1, 2), (4,), ()  # no gradients in updates 4 and 8, ...; parameter 3 joins at 4


def updates_in_groups(
    make: Any,
    shapes: Any,
    absent: Any,
    groups: Any,
    signs: Any = (1, 1, 1),
    turned: Any = (2,),
    steps: int = 10,
    factor: float = 1,
) -> Iterator[list[torch.Tensor]]:
    """Yields the weights after each update of three groups with two parameters each; the last one may have one.

    `absent` has for each parameter the updates without a gradient; `signs` multiply the gradients of the groups, whose
    sizes go through eight powers of ten in more than ten updates. The third parameter is transposed in memory;
    `turned`: whose gradients are. `factor`: of the learning rates after each update.
    """
    draw = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, generator=draw, dtype=torch.float64)) for s in shapes]
    params[2:3] = [torch.nn.Parameter(p.detach().t().contiguous().t()) for p in params[2:3]]
    o = make([{"params": params[2 * i : 2 * i + 2], **keys} for i, keys in enumerate(groups)])
    for t in range(steps):
        for i, p in enumerate(params):
            p.grad = (
                None
                if t in absent[i]
                else (torch.zeros_like(p.t().contiguous()).t() if i in turned else torch.zeros_like(p)).add_(
                    torch.randn(p.shape, generator=draw, dtype=torch.float64),
                    alpha=signs[i // 2] * 10.0 ** ((t % 9 - 4) * (steps > 10)),
                )
            )
        torch.manual_seed(t)
        o.step()
        [g.update({k: factor * v for k, v in g.items() if k == "lr" and factor != 1}) for g in o.param_groups]
        yield [p.detach().clone() for p in params]


def falls(make: Make, update: Update, fresh: Fresh, loss: Loss) -> None:
    params = fresh()
    o = make(params)
    before = float(loss(params))
    for _ in range(60):
        update(o, params)
    getattr(o, "eval", lambda: None)()
    assert loss(params) < before, f"the loss was {before:.6g} before 60 updates and is {float(loss(params)):.6g}"


# -- learning rate


def follows_the_schedule(make: Make, update: Update, fresh: Fresh) -> None:
    moves = []
    for factor in (1.0, 0.1):
        params = fresh()
        o = make(params)
        s = torch.optim.lr_scheduler.StepLR(o, 12, factor)
        for _ in range(12):
            update(o, params)
            s.step()
        before = [p.detach().clone() for p in params]
        update(o, params)
        moves.append([float(f"{(p - b).norm():.4g}") for p, b in zip(params, before, strict=True)])
    assert all(b < 0.95 * a or a == 0 for a, b in zip(*moves, strict=True)), (
        f"moved by {moves[0]}, at a tenth of the rate by {moves[1]}"
    )


def rests_at_rate_zero(make: Make, update: Update, fresh: Fresh) -> None:
    params = fresh()
    o = make(params)
    for group in o.param_groups:
        group["lr"] = 0.0
    before = [p.detach().clone() for p in params]
    for _ in range(2):
        update(o, params)
    moves = [float(f"{(p - b).norm():.4g}") for p, b in zip(params, before, strict=True)]
    assert moves == [0.0] * len(moves), f"moved by {moves} at lr = 0"


def rests_where_the_rate_is_zero(make: Make, update: Update, fresh: Fresh) -> None:
    params = fresh()
    o = make([{"params": [p]} for p in params])
    for group in o.param_groups:
        group["lr"] = group["lr"] * any(p is params[0] for p in group["params"])
    before = [p.detach().clone() for p in params]
    for _ in range(2):
        update(o, params)
    gap = float((params[1] - before[1]).abs().max())
    assert gap == 0, f"lr = 0 in the group of the second parameter only, which moves by {gap:.4g}"


# -- weight decay


def decays_by_group(
    make: Make, update: Update, fresh: Fresh, loss: Loss, scale: float, place: int, expected: bool
) -> None:
    ends = []
    for decay in (0.0, 10.0):
        params = fresh()
        o = make([{"params": params[:1], "weight_decay": decay}, {"params": params[1:], "weight_decay": 0.0}])
        for _ in range(12):
            update(o, params, lambda params: scale * loss(params))
        ends.append(params[place])
    changed = not torch.allclose(ends[0], ends[1], rtol=1e-9)
    assert changed == expected, f"only group 0 has a weight decay; it changes group {place}: {changed}"


def decays_apart_from_the_gradient(make: Make, update: Update, fresh: Fresh, flag: Flag) -> None:
    params, seen = fresh(), []
    o = make(params, weight_decay=0.1, **flag)
    for _ in range(300):
        update(o, params, lambda params: sum((0 * p**2).sum() for p in params))
        seen.append([p.detach().clone() for p in params])
    for a, b, c, d in zip(*seen[12:14], *seen[-2:], strict=True):
        first, last = 1 - b / a, 1 - d / c
        assert first.min() >= 0 or first.max() > 0, "at zero gradients, the weights grow"
        assert first.max() > 0, "at zero gradients, the weights do not shrink"
        assert first.max() - first.min() < 1e-6 * first.mean(), "the weights of a tensor do not shrink by one factor"
        assert (last - first).abs().max() < 1e-6 * first.mean(), "the factor of the decay changes over time"


def decays_as_the_l2_penalty(make: Make, update: Update, fresh: Fresh, loss: Loss, flag: Flag) -> None:
    params, others = fresh(), fresh()
    o, q = make(params, weight_decay=0.1, **flag), make(others, weight_decay=0.0, **flag)
    for _ in range(12):
        update(o, params)
        update(q, others, lambda params: loss(params) + 0.05 * sum((p**2).sum() for p in params))
    gap = float(torch.stack([(a - b).abs().max() for a, b in zip(params, others, strict=True)]).max())
    assert gap < 1e-9, f"differs by {gap:.2g} from the loss with 0.05 |w|^2 added"


def decays_by_the_rate(make: Make, update: Update, fresh: Fresh, flag: Flag) -> None:
    params = fresh()
    o = make(params, lr=0.01, weight_decay=0.1, **flag)
    for _ in range(3):
        before = params[0].detach().clone()  # a matrix: some methods have another rate for vectors
        update(o, params, lambda params: sum((0 * p**2).sum() for p in params))
    size = float((1 - params[0] / before).mean()) / (0.1 * o.param_groups[0]["lr"])
    assert abs(size - 1) < 1e-3, f"at zero gradients, the decay is {size:.4g} lr weight_decay w"


def decays_with_the_schedule(make: Make, update: Update, fresh: Fresh, flag: Flag) -> None:
    shrunk = []
    for factor in (1.0, 0.25):
        params = fresh()
        o = make(params, weight_decay=0.1, **flag)
        s = torch.optim.lr_scheduler.StepLR(o, 3, factor)
        for _ in range(4):
            before = params[0].detach().clone()
            update(o, params, lambda params: sum((0 * p**2).sum() for p in params))
            s.step()
        shrunk.append(float((1 - params[0] / before).mean()))
    ratio = shrunk[1] / shrunk[0] if shrunk[0] else 1.0
    assert min(abs(ratio - 1), abs(ratio - 0.25)) < 1e-3, f"at a quarter of the rate, {ratio:.4g} of the decay is left"


# -- missing gradients


def leaves_the_gradients(make: Make, fresh: Fresh, keys: Flag) -> None:
    params, kept = fresh(), []
    o = make(params, **keys)
    for t in range(3):
        for p in params:
            p.grad = p.detach().cos() + t
        kept += [(p.grad, p.grad.clone()) for p in params]
        o.step()
        assert all(p.grad is g for p, (g, _) in zip(params, kept[-len(params) :], strict=True)), "removes the gradients"
    changed = sum(not torch.equal(g, before) for g, before in kept)
    assert changed == 0, f"{keys}: {changed} of {len(kept)} gradients are changed in place"


def updates_in_place(make: Make, update: Update, fresh: Fresh) -> None:
    params = fresh()
    views = [p.detach() for p in params]
    o = make(params)
    for _ in range(3):
        update(o, params)
    moved = sum(not torch.equal(p, v) for p, v in zip(params, views, strict=True))
    assert moved == 0, f"{moved} of {len(params)} weights are in new memory, which views and tied weights do not see"


def keeps_no_gradient(make: Make, fresh: Fresh, loss: Loss) -> None:
    ends = []
    for to_none in (True, False):
        params = fresh()
        o = make(params)
        for t in range(6):
            torch.manual_seed(t)
            o.zero_grad(set_to_none=to_none)
            loss(params).backward()
            o.step()
        ends.append(params)
    gap = float(torch.stack([(a - b).abs().max() for a, b in zip(*ends, strict=True)]).max())
    assert gap < 1e-9, f"zero_grad(set_to_none=False) changes the weights by {gap:.2g}: a gradient is kept, not copied"


def leaves_what_has_no_gradient(make: Make, update: Update, fresh: Fresh, loss: Loss) -> None:
    for one in (0, 1):
        params = fresh()
        o = make(params)
        before = [p.detach().clone() for p in params]
        for _ in range(12):
            update(o, params, lambda params, i=one: loss(params[i : i + 1]))
        changed = [i for i, (p, b) in enumerate(zip(params, before, strict=True)) if not torch.equal(p, b)]
        assert changed == [one], f"only parameter {one} has a gradient; changed {changed}"
        for _ in range(12):
            update(o, params)
        assert not torch.equal(params[1 - one], before[1 - one]), "where a gradient begins later, nothing moves"


def takes_no_gradients_at_all(make: Make, update: Update, fresh: Fresh) -> None:
    params = fresh()
    o = make(params)
    before = [p.detach().clone() for p in params]
    o.step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True)), "moved without any gradient"


# -- resume


def turning(t: int) -> Loss:
    """The signs of the gradients change: a momentum that is lost then shows, also in methods that take a sign."""
    return lambda params: sum(
        (2 * (torch.arange(p.numel()) + 2 * t).cos().to(p).view_as(p) * p + p**2 / 4).sum() for p in params
    )


def resumes_from_its_state_dict(
    make: Make, update: Update, fresh: Fresh, keys: Flag | None, dtype: torch.dtype, bound: float
) -> None:
    params, file = fresh(dtype), io.BytesIO()
    o = make(params if keys is None else [{"params": params[:1]}, {"params": params[1:], **keys}])
    [update(o, params, turning(t)) for t in range(12)]
    torch.save(([p.detach() for p in params], o.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    others = fresh(dtype)
    r = make(others if keys is None else [{"params": [p]} for p in others])
    update(r, others)
    r.load_state_dict(state)
    [p.data.copy_(w) for p, w in zip(others, weights, strict=True)]
    for t, (optimizer, its) in enumerate(3 * [(o, params), (r, others)]):
        torch.manual_seed(1)
        update(optimizer, its, turning(t // 2))
    gap = float(torch.stack([(a - b).abs().max() for a, b in zip(params, others, strict=True)]).max())
    assert gap <= bound, f"3 updates after a resume, the weights differ by {gap:.2g}"


def resumes_from_a_deepcopy(make: Make, update: Update, fresh: Fresh, keys: Flag | None) -> None:
    params = fresh(torch.float32)
    o = make(params if keys is None else [{"params": params[:1]}, {"params": params[1:], **keys}])
    [update(o, params, turning(t)) for t in range(12)]
    others, r = copy.deepcopy((params, o))
    for t, (optimizer, its) in enumerate(3 * [(o, params), (r, others)]):
        torch.manual_seed(1)
        update(optimizer, its, turning(t // 2))
    gap = float(torch.stack([(a - b).abs().max() for a, b in zip(params, others, strict=True)]).max())
    assert gap == 0, f"3 updates after a deepcopy, the weights differ by {gap:.2g}"


# -- groups


def moves_as_alone(make: Make, update: Update, fresh: Fresh, keys: Flag) -> None:
    params, others = fresh()[::-1], fresh()[::-1]
    o = make([{"params": params[:1]}, {"params": params[1:], **keys}])
    own = make(others[:1]), make(others[1:], **keys)
    for t in range(20):
        for optimizer, its in (o, params), (own[0], others[:1]), (own[1], others[1:]):
            torch.manual_seed(t)
            update(optimizer, its)
    gap = float(torch.stack([(a - b).abs().max() for a, b in zip(params, others, strict=True)]).max())
    assert gap < 1e-9, f"{keys} in group 1: weights differ by {gap:.2g} from those of an optimizer per group"


def moves_as_alone_if_added(make: Make, update: Update, fresh: Fresh, keys: Flag) -> None:
    params, others = fresh()[::-1], fresh()[:1]
    o, own = make(params[:1]), make(others, **keys)
    for _ in range(5):
        update(o, params[:1])
    o.add_param_group({"params": params[1:], **keys})
    for _ in range(5):
        update(o, params)
        update(own, others)
    gap = float((params[1] - others[0]).abs().max())
    assert gap < 1e-9, f"a group added with {keys}: weights differ by {gap:.2g} from those of an optimizer of its own"


def obeys_changed_keys(make: Make, update: Update, fresh: Fresh, keys: Flag) -> None:
    params = fresh()
    o = make(params)
    for _ in range(5):
        update(o, params)
    others, state = copy.deepcopy(params), copy.deepcopy(o.state_dict())
    r = make(others, **keys)
    r.load_state_dict({**state, "param_groups": [{**g, **keys} for g in state["param_groups"]]})
    for g in o.param_groups:
        g.update(keys)
    for optimizer, its in 3 * [(o, params), (r, others)]:
        torch.manual_seed(1)
        update(optimizer, its)
    gap = float(torch.stack([(a - b).abs().max() for a, b in zip(params, others, strict=True)]).max())
    assert gap < 1e-9, f"{keys} set after 5 updates: weights differ by {gap:.2g} from an optimizer made with them"


def ignores_the_order(make: Make, update: Update, fresh: Fresh, twins: bool) -> None:
    ends = []
    for order in (1, -1):
        params = [*fresh(), torch.nn.Parameter(fresh()[0].detach().cos())][: 2 + twins]
        o = make(params[::order])
        for _ in range(6):
            update(o, params)
        ends.append(params)
    gap = float(torch.stack([(a - b).abs().max() for a, b in zip(*ends, strict=True)]).max())
    assert gap < 1e-6, f"two parameters of one shape in another order: weights differ by {gap:.2g}"


def ignores_the_memory_layout(make: Make, fresh: Fresh) -> None:
    ends = []
    for turned in (torch.clone, lambda g: g.t().contiguous().t()):
        p = fresh()[0]
        o = make([p])
        for t in range(3):
            p.grad = turned(p.detach().cos() + t)
            torch.manual_seed(t)
            o.step()
        ends.append(p)
    gap = float((ends[1] - ends[0]).norm() / (ends[0] - fresh()[0]).norm())
    assert gap < 0.01, f"gradients that are transposed in memory: the steps differ by {gap:.2g} of their length"


def leaves_the_generator(make: Make, update: Update, fresh: Fresh) -> None:
    params, ends = fresh(), []
    o = make(params)
    before = torch.get_rng_state()
    [update(o, params) for _ in range(12)]
    drawn = not torch.equal(before, torch.get_rng_state())
    for seed in (1, 2) if drawn else ():
        params = fresh()
        o = make(params)
        [(torch.manual_seed(seed + t), update(o, params)) for t in range(12)]
        ends.append(params)
    random = drawn and any(not torch.equal(a, b) for a, b in zip(*ends, strict=True))
    assert random or not drawn, "draws from torch's global generator without need, which changes masks of dropout"


def evaluates_without_a_trace(make: Callable[..., Any], update: Update, fresh: Fresh) -> None:
    ends = []
    for looks in (False, True):
        params = fresh()
        o = make(params)
        for _ in range(6):
            update(o, params)
            if looks:
                o.eval()
                o.train()
        ends.append(params)
    gap = float(torch.stack([(a - b).abs().max() for a, b in zip(*ends, strict=True)]).max())
    assert gap < 1e-9, f"eval() and train() after each update change the weights by {gap:.2g}"


# -- implementations


def equals_the_loop(make: Make, update: Update, fresh: Fresh, loss: Loss, flag: Flag) -> None:
    ends = []
    for keys in (dict.fromkeys(flag, False), flag):
        params = fresh()
        o = make(params, **keys)
        for _ in range(12):
            update(o, params, lambda params: 1e-6 * loss(params))
        ends.append(params)
    gap = float(torch.stack([(a - b).abs().max() for a, b in zip(*ends, strict=True)]).max())
    assert gap < 1e-9, f"{flag}: weights differ by {gap:.2g} from those of the loop"


def equals_the_loop_in_groups(
    make: Make, shapes: Any, absent: Any, groups: Any, flag: Flag, others: Any, signs: Any
) -> None:
    runs = (dict.fromkeys(flag, False), groups, (1, 1, 1)), (flag, others, signs)
    ends = [
        list(updates_in_groups(lambda g, keys=keys: make(g, **keys), shapes, absent, own, signs))[-1]
        for keys, own, signs in runs
    ]
    gaps = [float((a - b).abs().max()) for a, b in zip(*ends, strict=True)]
    assert all(gap < 1e-7 for gap in gaps), f"{flag or others}, in groups: weights differ by {gaps}"


def equals_torch(
    make: Make, shapes: Any, absent: Any, twin: str, keys: Flag, groups: Any, steps: int, size: float
) -> None:
    runs = [
        updates_in_groups(lambda g, f=f: f(g, **keys), shapes, absent, groups, 3 * [size], steps=steps, factor=0.97)
        for f in (make, getattr(torch.optim, twin))
    ]
    for t, (ours, theirs) in enumerate(zip(*runs, strict=True), 1):
        gaps = [float((a - b).norm() / (1 + b.norm())) for a, b in zip(ours, theirs, strict=True)]
        assert all(gap < 1e-6 for gap in gaps), f"{keys}: after {t} updates, weights differ by {gaps} from {twin}'s"


def equals_torch_with_complex_weights(make: Make, twin: str, keys: Flag) -> None:
    ends = []
    for f in (make, getattr(torch.optim, twin)):
        draw = torch.Generator().manual_seed(0)
        p = torch.nn.Parameter(torch.randn(3, 2, generator=draw, dtype=torch.complex128))
        o = f([p], **keys)
        for _ in range(8):
            p.grad = torch.randn(3, 2, generator=draw, dtype=torch.complex128)
            o.step()
        ends.append(p)
    gap = float((ends[0] - ends[1]).abs().max())
    assert gap < 1e-7, f"{keys}: after 8 updates, complex weights differ by {gap:.2g} from {twin}'s"


# -- precision


def stays_within_rounding(
    make: Make, update: Update, fresh: Fresh, loss: Loss, dtype: torch.dtype, share: float
) -> None:
    runs = [(params, make(params)) for params in (fresh(), fresh(dtype))]
    for params, o in 10 * runs:
        update(o, params)
    before, exact, found = (
        float(loss([p.detach().double() for p in each])) for each in (fresh(), runs[0][0], runs[1][0])
    )
    rounding = 10 * torch.finfo(dtype).eps * sum(float(p.abs().sum()) for p in fresh())
    bound = share * abs(exact - before) + rounding
    assert abs(found - exact) <= bound, f"{dtype}: loss {found:.6g}, in float64 {exact:.6g}; bound {bound:.2g}"


def keeps_the_precision(make: Make, update: Update, fresh: Fresh) -> None:
    params = fresh()
    o = make(params)
    for _ in range(3):
        update(o, params)
    kept = [v for p in params for v in o.state[p].values() if torch.is_tensor(v) and v.shape == p.shape]
    lower = {v.dtype for v in kept if v.is_floating_point() and v.dtype != torch.float64}
    assert not lower, f"the state of weights in float64 is in {lower}"


def counts_all_updates(make: Make, update: Update, fresh: Fresh) -> None:
    params = fresh(torch.bfloat16)
    o, seen = make(params), []
    for t in range(300):
        update(o, params)
        if t in (10, 11, 299):
            seen.append({(i, k): float(v) for i, p in enumerate(params) for k, v in o.state[p].items()
                         if torch.is_tensor(v) and v.numel() == 1 and p.numel() > 1})  # fmt: skip
    wrong = {k: seen[2][k] for k in seen[0] if seen[1][k] == seen[0][k] + 1 and seen[2][k] != seen[0][k] + 289}
    assert not wrong, f"after 300 updates in bfloat16, a counter is {next(iter(wrong.values()))}"


# -- unusual input


def leaves_zeros_at_zero_gradients(make: Make, update: Update, fresh: Fresh) -> None:
    params = [torch.nn.Parameter(torch.zeros_like(p)) for p in fresh()]
    o = make(params)
    for _ in range(3):
        update(o, params, lambda params: sum((0 * p**2).sum() for p in params))
    assert not any(p.any() for p in params), (
        f"zero weights with zero gradients become {params[0].flatten()[:2].tolist()}"
    )


def trains_scalars(make: Make, update: Update, fresh: Fresh) -> None:
    p = torch.nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
    o = make([p])
    for _ in range(12):
        update(o, [p])
    assert p.isfinite() and p != 0.5, f"a parameter of shape [] is {float(p)} after 12 updates from 0.5"


def trains_complex_weights(make: Make) -> None:
    p, goal = torch.nn.Parameter(torch.ones(3, dtype=torch.complex128)), torch.full((3,), 1 - 2j)
    o = make([p])
    for _ in range(20):
        o.zero_grad()
        (p - goal).abs().square().sum().backward()
        o.step()
    assert (p.imag < 0).all(), f"a weight goes from 1 to {complex(p.detach()[0]):.4g}, at gradients towards 1 - 2j"


def takes_sparse_gradients(make: Make, keys: Flag) -> None:
    ends = []
    for is_sparse in (False, True):
        p = torch.nn.Parameter(torch.ones(4, 3, dtype=torch.float64))
        o = make([p], **keys)
        for t in range(3):
            values = (torch.arange(1.0, 10).double() + t).cos().view(3, 3)
            g = torch.sparse_coo_tensor(torch.tensor([[2, 0, 2]]), values, (4, 3))
            p.grad = g if is_sparse else g.to_dense()
            torch.manual_seed(t)
            o.step()
        ends.append(p.detach()[[0, 2]])
    gap = float((ends[0] - ends[1]).abs().max())
    assert gap < 1e-9, f"3 updates by sparse gradients with a row twice differ by {gap:.2g} from those by dense ones"


def calls_its_closure_once(make: Callable[..., Any], fresh: Fresh, loss: Loss, keys: Flag) -> None:
    params, seen = fresh(), []
    o = make(params, **keys)
    for _ in range(2):
        returned = o.step(lambda: (o.zero_grad(), seen.extend([loss(params)]), seen[-1].backward(), seen[-1])[-1])  # type: ignore[func-returns-value]
    assert len(seen) == 2, f"{len(seen)} calls of the closure in 2 updates"
    assert returned is seen[-1], f"step returned {returned}, not the closure's loss"
    assert torch.is_grad_enabled(), "after step(closure), gradients are switched off"


def steps_by_its_closure(make: Callable[..., Any], fresh: Fresh, loss: Loss) -> None:
    ends = []
    for by_closure in (False, True):
        params = fresh()
        o = make(params)
        for t in range(4):
            torch.manual_seed(t)
            (
                o.step(lambda o=o, its=params: (o.zero_grad(), seen := loss(its), seen.backward(), seen)[-1])
                if by_closure
                else (o.zero_grad(), loss(params).backward(), o.step())
            )
        ends.append(params)
    gap = float(torch.stack([(a - b).abs().max() for a, b in zip(*ends, strict=True)]).max())
    assert gap < 1e-12, f"step(closure) and backward() with step() lead to weights that differ by {gap:.2g}"


def takes_empty_tensors(make: Make, update: Update, fresh: Fresh) -> None:
    p, empty = fresh()[0], torch.nn.Parameter(torch.zeros(0, 3, dtype=torch.float64))
    o = make([empty, p])
    before = p.detach().clone()
    for _ in range(12):
        update(o, [empty, p])
    assert p.isfinite().all() and not torch.equal(p, before), "beside an empty parameter the other does not move"


def shows_nan(make: Make, update: Update, fresh: Fresh, loss: Loss) -> None:
    params, seen = fresh(), []
    o = make(params)
    with contextlib.suppress(ArithmeticError, RuntimeError, ValueError):
        for factor in (0.0, float("nan"), *[0.0] * 12):
            update(o, params, lambda params, f=factor: loss(params) + f * params[0][0, 0])
            seen.append(params[0].detach().clone())
    shown = len(seen) < 14 or torch.equal(seen[0], seen[1]) or params[0][0, 0].isnan()
    assert shown, f"12 updates after its gradient was NaN, a weight is {float(params[0][0, 0]):.4g}"
