"""The plain-torch stages, which other backends are held against, against autograd through torch's own functions."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mbv2.kernels import aten
from mbv2.kernels.layout import COUNT, MEAN, RSTD, SCALE, SHIFT, VAR, channels_last

EPS = 1e-3
Norm = Callable[[Tensor, str], Tensor]


def random(*shape: int, seed: int, around: float = 0.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + around


def dense(*shape: int, seed: int) -> Tensor:
    return channels_last(random(*shape, seed=seed))


def block_of(c: int, hidden: int | None, out: int) -> dict[str, Tensor]:
    """Weights, gamma, beta, and running statistics of a block's stages."""
    width = hidden or c
    sizes = {"1": hidden, "2": width, "3": out}
    block = {"wd": random(width, 1, 3, 3, seed=1), "w3": random(out, width, 1, 1, seed=2)}
    if hidden is not None:
        block["w1"] = random(hidden, c, 1, 1, seed=3)
    for index, (which, size) in enumerate(sizes.items()):
        if size is not None:
            block["g" + which] = random(size, seed=10 + index, around=1)
            block["b" + which] = random(size, seed=20 + index, around=1)
            block["mean" + which] = random(size, seed=30 + index)
            block["var" + which] = random(size, seed=40 + index).square() + 0.5
    return block


def autograd_block(x: Tensor, block: dict[str, Tensor], stride: int, residual: bool, training: bool) -> Tensor:
    """torch's own convolutions and batch_norm."""

    def norm(y: Tensor, which: str) -> Tensor:
        mean, var = block["mean" + which].clone(), block["var" + which].clone()
        return F.batch_norm(y, mean, var, block["g" + which], block["b" + which], training, 0.1, EPS)

    a = x if "w1" not in block else F.relu6(norm(F.conv2d(x, block["w1"]), "1"))
    a = F.relu6(norm(F.conv2d(a, block["wd"], None, stride, 1, groups=a.shape[1]), "2"))
    out = norm(F.conv2d(a, block["w3"]), "3")
    return out + x if residual else out


def staged_block(
    x: Tensor, block: dict[str, Tensor], stride: int, residual: bool, training: bool, grad: Tensor
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """The same through the stages: the output, and the gradients by name."""

    def bn(moments: Tensor, which: str) -> Tensor:
        gamma, beta = block["g" + which], block["b" + which]
        if training:
            return aten.bn_finalize(moments, gamma, beta, EPS)
        return aten.bn_constant(block["mean" + which], block["var" + which], gamma, beta, EPS, x.dtype)

    y1, bn1 = x, None
    if "w1" in block:
        y1, moments = aten.expand(x, block["w1"])
        bn1 = bn(moments, "1")
    y2, moments = aten.depthwise(y1, bn1, block["wd"], stride)
    bn2 = bn(moments, "2")
    y3, moments = aten.project(y2, bn2, block["w3"])
    bn3 = bn(moments, "3")
    out = aten.bn_apply(y3, bn3, x if residual else None, False)

    totals3, coef3 = aten.bn_backward(aten.bn_sums(grad, y3, bn3, False), bn3)
    dz2, sums2, dw3 = aten.project_backward(grad, y3, coef3, block["w3"], y2, bn2, True, True)
    totals2, coef2 = aten.bn_backward(sums2, bn2)
    dz1, sums1, dwd = aten.depthwise_backward(dz2, y2, coef2, y1, bn1, block["wd"], stride, True, True)
    grads = {"w3": dw3, "b3": totals3[0], "g3": totals3[1], "wd": dwd, "b2": totals2[0], "g2": totals2[1]}
    skip = grad if residual else None
    if bn1 is None:
        assert sums1 is None
        return out, grads | {"x": dz1 if skip is None else dz1 + skip}
    totals1, coef1 = aten.bn_backward(sums1, bn1)
    dx, dw1 = aten.expand_backward(dz1, y1, coef1, block["w1"], x, skip, True, True)
    return out, grads | {"x": dx, "w1": dw1, "b1": totals1[0], "g1": totals1[1]}


@pytest.mark.parametrize("training", [True, False], ids=["batch statistics", "constant statistics"])
@pytest.mark.parametrize(
    ("c", "hidden", "out", "stride", "residual", "h", "w"),
    [
        (3, 8, 3, 1, True, 6, 5),
        (3, 8, 5, 1, False, 4, 4),
        (3, 8, 5, 2, False, 7, 6),
        (3, 8, 5, 2, False, 6, 7),
        (4, None, 3, 1, False, 5, 5),
        (4, None, 4, 1, True, 5, 5),
        (1, 1, 1, 1, True, 4, 3),
        (2, 4, 3, 2, False, 1, 1),
    ],
)
def test_chained_stages_equal_autograd_through_batch_norm(
    c: int, hidden: int | None, out: int, stride: int, residual: bool, h: int, w: int, training: bool
) -> None:
    block = block_of(c, hidden, out)
    x = dense(3, c, h, w, seed=5)
    leaves = {k: v.clone().requires_grad_() for k, v in block.items() if not k.startswith(("mean", "var"))}
    leaves["x"] = x.clone().requires_grad_()
    expected = autograd_block(leaves["x"], block | leaves, stride, residual, training)
    grad = dense(*expected.shape, seed=6)
    mine, grads = staged_block(x, block, stride, residual, training, grad)
    torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-10)
    assert grads.keys() == leaves.keys()
    for (name, leaf), g in zip(leaves.items(), torch.autograd.grad(expected, list(leaves.values()), grad), strict=True):
        assert grads[name].stride() == leaf.stride(), name
        torch.testing.assert_close(grads[name], g, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("training", [True, False], ids=["batch statistics", "constant statistics"])
@pytest.mark.parametrize("stride", [1, 2])
def test_stem_equals_autograd(stride: int, training: bool) -> None:
    x, weight, gamma, beta = dense(2, 3, 7, 6, seed=1), random(4, 3, 3, 3, seed=2), random(4, seed=3), random(4, seed=4)
    mean, var = random(4, seed=5), random(4, seed=6).square() + 0.5
    leaves = [v.clone().requires_grad_() for v in (x, weight, gamma, beta)]
    raw = F.conv2d(leaves[0], leaves[1], None, stride, 1)
    expected = F.relu6(F.batch_norm(raw, mean.clone(), var.clone(), leaves[2], leaves[3], training, 0.1, EPS))
    grad = dense(*expected.shape, seed=7)

    y, moments = aten.stem(x, weight, stride)
    bn = (
        aten.bn_finalize(moments, gamma, beta, EPS)
        if training
        else aten.bn_constant(mean, var, gamma, beta, EPS, x.dtype)
    )
    torch.testing.assert_close(aten.bn_apply(y, bn, None, True), expected, rtol=1e-10, atol=1e-10)
    (dbeta, dgamma), coef = aten.bn_backward(aten.bn_sums(grad, y, bn, True), bn)
    dx, dweight = aten.stem_backward(grad, y, bn, coef, x, weight, stride, True, True)
    theirs = torch.autograd.grad(expected, leaves, grad)
    torch.testing.assert_close((dx, dweight, dgamma, dbeta), theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("training", [True, False], ids=["batch statistics", "constant statistics"])
def test_head_equals_autograd(training: bool) -> None:
    x, weight, gamma, beta = dense(3, 4, 5, 4, seed=1), random(6, 4, 1, 1, seed=2), random(6, seed=3), random(6, seed=4)
    mean, var = random(6, seed=5), random(6, seed=6).square() + 0.5
    leaves = [v.clone().requires_grad_() for v in (x, weight, gamma, beta)]
    raw = F.conv2d(leaves[0], leaves[1])
    normed = F.batch_norm(raw, mean.clone(), var.clone(), leaves[2], leaves[3], training, 0.1, EPS)
    expected = F.relu6(normed).mean((2, 3))
    grad = random(3, 6, seed=7)

    y, moments = aten.expand(x, weight)
    bn = (
        aten.bn_finalize(moments, gamma, beta, EPS)
        if training
        else aten.bn_constant(mean, var, gamma, beta, EPS, x.dtype)
    )
    torch.testing.assert_close(aten.bn_relu6_pool(y, bn), expected, rtol=1e-10, atol=1e-10)
    dz, sums = aten.pool_backward(grad, y, bn)
    (dbeta, dgamma), coef = aten.bn_backward(sums, bn)
    dx, dweight = aten.expand_backward(dz, y, coef, weight, x, None, True, True)
    theirs = torch.autograd.grad(expected, leaves, grad)
    torch.testing.assert_close((dx, dweight, dgamma, dbeta), theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("affine", [True, False])
def test_bn_rows_are_batch_norms(affine: bool) -> None:
    y = dense(3, 4, 5, 6, seed=1)
    gamma, beta = (random(4, seed=2), random(4, seed=3)) if affine else (None, None)
    bn = aten.bn_finalize(aten.expand(y, torch.eye(4, dtype=y.dtype)[:, :, None, None])[1], gamma, beta, EPS)
    var, mean = torch.var_mean(y, (0, 2, 3), correction=0)
    torch.testing.assert_close(bn[MEAN], mean)
    torch.testing.assert_close(bn[VAR], var)
    torch.testing.assert_close(bn[RSTD], (var + EPS).rsqrt())
    assert (bn[COUNT] == 90).all()
    expected = F.batch_norm(y, None, None, gamma, beta, True, 0.0, EPS)
    torch.testing.assert_close(y * bn[SCALE, :, None, None] + bn[SHIFT, :, None, None], expected)


# --- moments and sums in parts -------------------------------------------------------------------------------------


def moments_of(values: Tensor) -> Tensor:
    """[3, C] of values [M, C] in float64, zeros where there are none."""
    values = values.double()
    if len(values) == 0:
        return torch.zeros(3, values.shape[1], dtype=torch.float64)
    mean = values.mean(0)
    return torch.stack((torch.full_like(mean, len(values)), mean, (values - mean).square().sum(0)))


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any),
    offset=st.sampled_from([0.0, 1.0, 1e3, -1e6]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    seed=st.integers(0, 1000),
)
def test_merged_moments_of_any_split_are_those_of_the_whole(
    lengths: list[int], offset: float, dtype: torch.dtype, seed: int
) -> None:
    values = (random(sum(lengths), 3, seed=seed) + offset).to(dtype)
    parts = torch.stack([moments_of(part) for part in values.split(lengths)]).to(dtype)
    count, mean, m2 = aten.merge_moments(parts)
    whole = moments_of(values)
    unit = torch.finfo(dtype).eps
    assert torch.equal(count.double(), whole[0])
    torch.testing.assert_close(mean.double(), whole[1], rtol=8 * unit, atol=8 * unit)
    # Part means are rounded to `dtype`: an error of eps * |mean| in each, relative to the spread.
    spread = sum(lengths) * (8 * unit * (abs(offset) + 4)) ** 2
    torch.testing.assert_close(m2.double(), whole[2], rtol=1e3 * unit * max(1.0, abs(offset)), atol=spread + 1e2 * unit)


def test_a_shift_far_from_zero_costs_no_variance() -> None:
    values = (random(4096, 2, seed=0) + 1000).float()
    parts = torch.stack([moments_of(part) for part in values.split(100)]).float()
    bn = aten.bn_finalize(parts, None, None, 0.0)
    torch.testing.assert_close(bn[VAR].double(), values.double().var(0, correction=0), rtol=1e-5, atol=0)


def test_merging_leaves_parts_as_they_are_and_one_part_unchanged() -> None:
    parts = torch.stack([moments_of(random(n, 3, seed=n)) for n in (4, 5)])
    before = parts.clone()
    aten.merge_moments(parts)
    assert torch.equal(parts, before)
    assert torch.equal(aten.merge_moments(parts[:1]), parts[0])


@pytest.mark.parametrize("where", [0, 2, 3])
def test_an_input_that_is_empty_changes_nothing(where: int) -> None:
    weight = random(5, 3, 1, 1, seed=1)
    parts = [aten.expand(dense(n, 3, 2, 2, seed=n), weight)[1] for n in (1, 2, 3)]
    whole = aten.merge_moments(torch.cat(parts))
    parts.insert(where, aten.expand(dense(0, 3, 2, 2, seed=0), weight)[1])
    assert torch.equal(aten.merge_moments(torch.cat(parts)), whole)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_reach_mean_and_variance_of_their_channel_only(poison: float) -> None:
    x = dense(4, 3, 2, 2, seed=1)
    x[1, 2, 0, 1] = poison
    identity = torch.eye(3, dtype=x.dtype)[:, :, None, None]
    parts = torch.cat([aten.depthwise(part, None, identity.new_ones(3, 1, 3, 3), 1)[1] for part in x.split(1)])
    bn = aten.bn_finalize(parts, None, None, EPS)
    assert not bn[MEAN, 2].isfinite()
    assert bn[[VAR, SCALE, SHIFT], 2].isnan().all()
    assert bn[:, :2].isfinite().all()


def test_gradient_sums_of_parts_and_of_two_processes_equal_the_whole() -> None:
    y, grad = dense(6, 3, 4, 5, seed=1), dense(6, 3, 4, 5, seed=2)
    gamma, beta = random(3, seed=3), random(3, seed=4)
    identity = torch.eye(3, dtype=y.dtype)[:, :, None, None]
    bn = aten.bn_finalize(aten.expand(y, identity)[1], gamma, beta, EPS)
    totals, coef = aten.bn_backward(aten.bn_sums(grad, y, bn, True), bn)
    parts = torch.cat([aten.bn_sums(g, v, bn, True) for g, v in zip(grad.split(2), y.split(2), strict=True)])
    before = parts.clone()
    torch.testing.assert_close(aten.bn_backward(parts, bn), (totals, coef))
    assert torch.equal(parts, before)

    ranks = [aten.bn_backward(part, bn)[0] for part in (parts[:1], parts[1:])]
    everyone = sum(ranks)
    shared = torch.stack((everyone[0], everyone[1] / bn[RSTD]))[None]
    torch.testing.assert_close(aten.bn_backward(shared, bn), (totals, coef))


# --- the mask, what is frozen, layout and rounding ------------------------------------------------------------------


def test_the_mask_is_relu6s_own_at_its_corners_and_for_nan() -> None:
    values = torch.tensor([-1.0, 0.0, 1e-30, 3.0, 6.0, 7.0, float("nan"), float("inf"), -float("inf")])
    y = values.double().view(1, 1, 3, 3)
    bn = torch.tensor([[0.0], [1.0], [1.0], [1.0], [0.0], [9.0]], dtype=torch.float64)
    leaf = y.clone().requires_grad_()
    (theirs,) = torch.autograd.grad(F.relu6(leaf).sum(), leaf)
    nine = torch.full((1, 1), 9.0, dtype=torch.float64)
    dz, _ = aten.pool_backward(nine, y, bn)
    # For NaN, torch's own loop on a CPU gives 0 or 1 by the value's place in memory; on a GPU it is 1.
    theirs[0, 0, 2, 0] = 1
    assert torch.equal(dz, theirs)
    coef = torch.tensor([[1.0], [0.0], [0.0]], dtype=torch.float64)
    finite = channels_last(y[:, :, :2])
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    dz, _, _ = aten.project_backward(torch.ones_like(finite), finite, coef, one, finite, bn, True, False)
    assert torch.equal(dz, theirs[:, :, :2])


@pytest.mark.parametrize(("need_input", "need_weight"), [(True, False), (False, True), (False, False)])
def test_what_is_frozen_is_none_and_the_rest_is_unchanged(need_input: bool, need_weight: bool) -> None:
    y, wide_y = dense(2, 3, 4, 4, seed=1), dense(2, 5, 4, 4, seed=2)
    coef3, coef5 = random(3, 3, seed=3), random(3, 5, seed=4)
    bn = aten.bn_constant(random(3, seed=5), random(3, seed=6).square(), None, None, EPS, y.dtype)
    bn5 = aten.bn_constant(random(5, seed=5), random(5, seed=6).square(), None, None, EPS, y.dtype)
    dense_weight, narrow, depth = random(5, 3, 3, 3, seed=7), random(5, 3, 1, 1, seed=8), random(3, 1, 3, 3, seed=9)
    calls = [
        lambda *need: aten.project_backward(wide_y, wide_y, coef5, narrow, y, bn, *need),
        lambda *need: aten.depthwise_backward(y, y, coef3, y, bn, depth, 1, *need),
        lambda *need: aten.depthwise_backward(y, y, coef3, y, None, depth, 1, *need),
        lambda *need: aten.expand_backward(wide_y, wide_y, coef5, narrow, y, y, *need),
        lambda *need: aten.stem_backward(wide_y, wide_y, bn5, coef5, y, dense_weight, 1, *need),
    ]
    for call in calls:
        *inputs, weight = call(need_input, need_weight)
        *all_inputs, all_weight = call(True, True)
        for got, full in zip(inputs, all_inputs, strict=True):
            assert torch.equal(got, full) if need_input and full is not None else got is None
        assert torch.equal(weight, all_weight) if need_weight else weight is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_statistics_are_wide_and_of_the_rounded_values(dtype: torch.dtype) -> None:
    x, weight = (dense(2, 3, 5, 4, seed=1) * 3 + 1).to(dtype), random(4, 3, 1, 1, seed=2).to(dtype)
    y, moments = aten.expand(x, weight)
    assert (y.dtype, moments.dtype) == (dtype, torch.float32)
    rounded = y.permute(0, 2, 3, 1).reshape(-1, 4)
    torch.testing.assert_close(aten.merge_moments(moments).double(), moments_of(rounded), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 3, 1, 1), (2, 1, 3, 3), (1, 1, 1, 4)])
def test_convolutions_and_their_gradients_are_dense_channels_last(shape: tuple[int, int, int, int]) -> None:
    c = shape[1]
    x = dense(*shape, seed=1).float()
    weight = random(c, c, 1, 1, seed=2).float()
    bn = aten.bn_finalize(aten.expand(x, weight)[1], None, None, EPS)
    coef = random(3, c, seed=3).float()
    depth, full = random(c, 1, 3, 3, seed=4).float(), random(c, c, 3, 3, seed=5).float()
    tensors = [
        aten.expand(x, weight)[0],
        aten.depthwise(x, bn, depth, 1)[0],
        aten.project(x, bn, weight)[0],
        aten.stem(x, full, 1)[0],
        aten.project_backward(x, x, coef, weight, x, bn, True, True)[0],
        aten.depthwise_backward(x, x, coef, x, bn, depth, 1, True, True)[0],
        aten.depthwise_backward(x, x, coef, x, None, depth, 1, True, True)[0],
        aten.expand_backward(x, x, coef, weight, x, x, True, True)[0],
        aten.stem_backward(x, x, bn, coef, x, full, 1, True, True)[0],
        aten.pool_backward(x[:, :, 0, 0], x, bn)[0],
    ]
    _, _, h, w = shape
    assert [t.stride() for t in tensors] == [(c * h * w, 1, w * c, c)] * len(tensors)


def test_weight_gradients_take_the_weights_memory() -> None:
    x, grad = dense(2, 3, 4, 4, seed=1), dense(2, 5, 4, 4, seed=2)
    weight = random(5, 3, 3, 3, seed=3).contiguous(memory_format=torch.channels_last)
    bn = aten.bn_constant(random(5, seed=5), random(5, seed=6).square(), None, None, EPS, x.dtype)
    _, dweight = aten.stem_backward(grad, grad, bn, random(3, 5, seed=4), x, weight, 1, False, True)
    assert dweight.stride() == weight.stride()


# --- inference ------------------------------------------------------------------------------------------------------


def folded(weight: Tensor, seed: int) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """A BatchNorm in evaluation mode, folded into (weight, bias), and the BatchNorm itself."""
    c = weight.shape[0]
    mean, var = random(c, seed=seed), random(c, seed=seed + 1).square() + 0.5
    gamma, beta = random(c, seed=seed + 2), random(c, seed=seed + 3, around=1)
    _, _, _, scale, shift, _ = aten.bn_constant(mean, var, gamma, beta, EPS, weight.dtype)
    return weight * scale.view(-1, 1, 1, 1), shift, lambda y: F.batch_norm(y, mean, var, gamma, beta, False, 0.0, EPS)


@pytest.mark.parametrize("stride", [1, 2])
def test_folded_stages_equal_convolution_and_batch_norm(stride: int) -> None:
    x, image = dense(2, 4, 5, 6, seed=1), dense(2, 3, 7, 6, seed=2)
    ws, w1, wd, w3 = (
        random(8, 3, 3, 3, seed=3),
        random(8, 4, 1, 1, seed=4),
        random(8, 1, 3, 3, seed=5),
        random(4, 8, 1, 1, seed=6),
    )
    (fs, bs, norm_s), (f1, b1, norm1) = folded(ws, 50), folded(w1, 60)
    (fd, bd, norm_d), (f3, b3, norm3) = folded(wd, 70), folded(w3, 80)
    close = torch.testing.assert_close
    close(aten.stem_folded(image, fs, bs, stride), F.relu6(norm_s(F.conv2d(image, ws, None, stride, 1))))
    a1 = F.relu6(norm1(F.conv2d(x, w1)))
    a2 = F.relu6(norm_d(F.conv2d(a1, wd, None, stride, 1, groups=8)))
    out = norm3(F.conv2d(a2, w3))
    skip = dense(*out.shape, seed=7)
    close(aten.pointwise_folded(x, f1, b1, True, None), a1)
    close(aten.depthwise_folded(a1, fd, bd, stride), a2)
    close(aten.pointwise_folded(a2, f3, b3, False, skip), out + skip)
    close(aten.expand_depthwise_folded(x, f1, b1, fd, bd, stride), a2)
    close(aten.depthwise_project_folded(a1, fd, bd, f3, b3, stride, skip), out + skip)
    close(aten.head_folded(x, f1, b1), a1.mean((2, 3)))
