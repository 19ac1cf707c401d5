"""Cosines and effective ranks of tokens against explicit formulas; no nan, no copies of tokens, no padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from layerprobe.analyses.measures import effective_rank as effective_rank_of_features
from layerprobe.layersync.alignment import (
    MAX_RANK_TOKENS,
    Projectors,
    mean_cosine,
    token_cosines,
    token_rank,
    tokens_that_count,
)

COUNTS = torch.tensor([[True, True, False, False], [False] * 4, [True] * 4])


def tokens(seed: int, shape: tuple[int, ...] = (3, 4, 8), dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def gradient(student: Tensor, teacher: Tensor, counts: Tensor | None = None, **options: bool) -> tuple[Tensor, Tensor]:
    student = student.clone().requires_grad_()
    value = mean_cosine(student, teacher, counts, **options)
    value.backward()
    assert student.grad is not None
    return value.detach(), student.grad


def test_cosines_and_gradient_equal_torchs() -> None:
    student, teacher = tokens(0).requires_grad_(), tokens(1).requires_grad_()
    torch.testing.assert_close(token_cosines(student, teacher), F.cosine_similarity(student, teacher, dim=-1))
    assert torch.autograd.gradcheck(lambda s: token_cosines(s, teacher.detach()), (student,))
    token_cosines(student, teacher).sum().backward()
    assert teacher.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_compared_in_float32_without_saved_copies(dtype: torch.dtype) -> None:
    student, teacher = 300 * tokens(0, (2, 50, 64), dtype), 300 * tokens(1, (2, 50, 64), dtype)  # squares exceed 65504
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    student.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        cosines = token_cosines(student, teacher)
    torch.testing.assert_close(cosines, F.cosine_similarity(student.float(), teacher.float(), dim=-1))
    cosines.sum().backward()
    assert student.grad is not None
    assert student.grad.dtype == dtype
    copies = [tensor for tensor in saved if tensor.data_ptr() not in (student.data_ptr(), teacher.data_ptr())]
    assert max(tensor.numel() for tensor in copies) == 100  # one number per token


def test_a_token_without_direction_has_cosine_and_gradient_zero() -> None:
    student, teacher = tokens(0, dtype=torch.float32), tokens(1, dtype=torch.float32)
    student[0, 0] = 0
    teacher[1, 1] = 0
    _, slope = gradient(student, teacher)
    assert token_cosines(student, teacher)[0, 0] == token_cosines(student, teacher)[1, 1] == 0
    assert not slope[0, 0].any()
    assert not slope[1, 1].any()
    assert bool(slope.isfinite().all())


def test_only_counted_tokens_matter() -> None:
    student, teacher = tokens(0), tokens(1)
    cosines = F.cosine_similarity(student, teacher, dim=-1)
    value, slope = gradient(student, teacher, COUNTS)
    # The mean over the counted tokens of each sample; the sample without any stays in the denominator.
    torch.testing.assert_close(value, (cosines[0, :2].mean() + cosines[2].mean()) / 3)
    assert not slope[~COUNTS].any()
    assert slope[COUNTS].any(-1).all()
    student[~COUNTS], teacher[~COUNTS] = 1e6, -3.0
    again, same = gradient(student, teacher, COUNTS)
    assert torch.equal(again, value)
    assert torch.equal(same, slope)


@pytest.mark.parametrize("centered", [False, True])
def test_a_batch_without_counted_tokens_gives_zero_and_no_gradient(centered: bool) -> None:
    value, slope = gradient(tokens(0), tokens(1), torch.zeros(3, 4, dtype=torch.bool), centered=centered)
    assert value == 0
    assert not slope.any()  # nor nan


@pytest.mark.parametrize("counts", [None, COUNTS])
def test_parts_of_a_batch_average_to_the_whole(counts: Tensor | None) -> None:
    student, teacher = tokens(0), tokens(1)
    whole, slope = gradient(student, teacher, counts)
    parts = [
        gradient(student[i : i + 1], teacher[i : i + 1], None if counts is None else counts[i : i + 1])
        for i in range(3)
    ]
    torch.testing.assert_close(torch.stack([value for value, _ in parts]).mean(), whole)
    torch.testing.assert_close(torch.cat([part for _, part in parts]) / 3, slope)


@pytest.mark.parametrize("counts", [None, COUNTS])
def test_centering_removes_the_common_part_of_all_tokens(counts: Tensor | None) -> None:
    student, teacher = tokens(0), tokens(1)
    value, slope = gradient(student, teacher, counts, centered=True)
    counted = torch.ones(3, 4, dtype=torch.bool) if counts is None else counts
    s, t = student - student[counted].mean(0), teacher - teacher[counted].mean(0)
    torch.testing.assert_close(value, mean_cosine(s, t, counts))
    far, same = gradient(student + 1000, teacher - 500 * torch.arange(8.0), counts, centered=True)
    torch.testing.assert_close(far, value)
    torch.testing.assert_close(same, slope)
    assert torch.autograd.gradcheck(
        lambda s: mean_cosine(s, teacher, counts, centered=True), (student.clone().requires_grad_(),)
    )
    uncentered = [float(mean_cosine(student + 1000, teacher + 1000, counts)), float((counted.any(1)).double().mean())]
    assert uncentered[0] == pytest.approx(uncentered[1], abs=1e-4)  # without centering, the common part dominates


def test_masks_of_samples_and_tokens_are_combined() -> None:
    x = tokens(0)
    samples, mask = torch.tensor([True, False, True]), torch.tensor([[True, True, False, False]] * 3)
    assert tokens_that_count(x, samples=None, mask=None) is None
    both = tokens_that_count(x, samples=samples, mask=mask)
    assert both is not None
    assert both.tolist() == [[True, True, False, False], [False] * 4, [True, True, False, False]]
    with pytest.raises(ValueError, match=r"^the noise levels have shape \(2,\) for 3 samples; pass one per sample$"):
        tokens_that_count(x, samples=samples[:2], mask=None)
    with pytest.raises(
        ValueError, match=r"^the mask has shape \(3, 3\), the tokens have \(3, 4\); pass one value per token$"
    ):
        tokens_that_count(x, samples=None, mask=mask[:, :3])


@pytest.mark.parametrize("shape", [(200, 12), (9, 30)])
def test_effective_rank_is_that_of_the_analyses(shape: tuple[int, int]) -> None:
    x = tokens(3, shape) * torch.linspace(0.01, 2, shape[1]) + 1000
    assert token_rank(x) == pytest.approx(effective_rank_of_features(x.numpy()), rel=1e-6)


def test_effective_rank_of_collapsed_tokens() -> None:
    direction = tokens(0, (8,))
    assert token_rank(torch.outer(tokens(1, (50,)), direction)) == pytest.approx(1, abs=1e-3)
    assert token_rank(direction.float().expand(50, 8)) == 0
    assert token_rank(torch.zeros(50, 8)) == 0


def test_effective_rank_of_many_tokens_is_estimated_from_a_fixed_subset() -> None:
    x = tokens(0, (3 * MAX_RANK_TOKENS, 6), torch.float32) * torch.linspace(0.1, 1, 6)
    assert token_rank(x) == token_rank(x)
    # A sample of 4096 gives singular values to about 1 / sqrt(2 * 4096).
    assert token_rank(x) == pytest.approx(effective_rank_of_features(x.numpy().astype(np.float64)), rel=0.02)


def test_each_pair_has_its_own_head() -> None:
    projectors = Projectors([(8, 8), (8, 5)], 16)
    student = tokens(0, dtype=torch.float32)
    first, second = projectors([student, student])
    assert first.shape == (3, 4, 8)
    assert second.shape == (3, 4, 5)
    linear, _, last = projectors.heads[1]
    torch.testing.assert_close(second, last(F.silu(linear(student))))


def test_second_order_gradients_are_those_of_the_plain_formula() -> None:
    student, teacher = tokens(0).requires_grad_(), tokens(1)
    teacher[0, 0] = 0  # without a direction
    slopes = []
    for cosines in (token_cosines, F.cosine_similarity):
        (first,) = torch.autograd.grad(
            cosines(student, teacher, **({} if cosines is token_cosines else {"dim": -1})).mean(),
            student,
            create_graph=True,
        )
        slopes.append(torch.autograd.grad(first.square().sum(), student)[0])
    assert slopes[0].abs().max() > 1e-4
    torch.testing.assert_close(slopes[0][1:], slopes[1][1:])
    torch.testing.assert_close(slopes[0][0, 1:], slopes[1][0, 1:])
    assert not slopes[0][0, 0].any()  # nor nan
    assert torch.autograd.gradgradcheck(lambda s: token_cosines(s, teacher), (student,))


def test_padding_that_is_not_finite_has_no_influence() -> None:
    student, teacher = tokens(0), tokens(1)
    expected = gradient(student, teacher, COUNTS)
    student[~COUNTS], teacher[~COUNTS] = float("nan"), float("inf")
    for got, other in zip(gradient(student, teacher, COUNTS), expected, strict=True):
        assert torch.equal(got, other)


@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.uint8, torch.float32, torch.bfloat16])
def test_masks_of_zeros_and_ones_have_any_dtype(dtype: torch.dtype) -> None:
    counts = tokens_that_count(tokens(0), samples=None, mask=COUNTS.to(dtype))
    assert counts is not None
    assert torch.equal(counts, COUNTS)


@pytest.mark.parametrize(("value", "shown"), [(-10000.0, "-10000"), (float("-inf"), "-inf"), (float("nan"), "nan")])
def test_masks_of_other_numbers_are_refused(value: float, shown: str) -> None:
    mask = torch.where(COUNTS, 0.0, value)  # as it is added to logits
    with pytest.raises(ValueError, match=rf"^the mask contains {shown}; pass True or 1 for tokens that count"):
        tokens_that_count(tokens(0), samples=None, mask=mask)
