"""Computations of the LayerSync regularizer on tokens (B, T, D): cosines, effective rank and projectors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

MIN_NORM = 1e-8
MAX_RANK_TOKENS = 4096


def mean_cosine(student: Tensor, teacher: Tensor, counts: Tensor | None = None, *, centered: bool = False) -> Tensor:
    """Computes the mean over the batch of each sample's mean cosine, a scalar, with gradients for the student only.

    A token that is not counted has no influence, even if it is not finite, as padding may be. A sample without counted
    tokens adds 0 and stays in the denominator. Equal parts of a batch, computed one after
    another or by several processes, therefore average to the whole. Centering is an exception: each part subtracts
    its own mean.

    Args:
        student: Tokens of the student, shape (B, T, D).
        teacher: Tokens of the teacher, of the same shape; the dtype may differ.
        counts: Mask of the counted tokens, shape (B, T), bool; None counts all.
        centered: Whether to subtract each channel's mean over the counted tokens first.
    """
    if counts is not None:
        student, teacher = without_padding(student, counts), without_padding(teacher, counts)
    if centered:
        student, teacher = _centered(student, counts), _centered(teacher.detach(), counts)
    cosines = token_cosines(student, teacher)
    if counts is None:
        return cosines.mean()
    share = counts / (counts.sum(1, keepdim=True).clamp(min=1) * len(counts))
    return (cosines * share).sum()


def without_padding(tokens: Tensor, counts: Tensor) -> Tensor:
    """Returns the tokens, shape (B, T, D), with 0 for those that are not counted."""
    return tokens.masked_fill(~counts[..., None], 0.0)


def token_cosines(student: Tensor, teacher: Tensor) -> Tensor:
    """Computes cosines between corresponding tokens, shape (B, T), in at least float32; the teacher gets no gradient.

    A token with a norm below `MIN_NORM` has no direction: its cosine and its gradient are 0.

    Args:
        student: Tokens of the student, shape (B, T, D).
        teacher: Tokens of the teacher, shape (B, T, D).
    """
    cosines: Tensor = _TokenCosines.apply(student, teacher.detach())  # type: ignore[no-untyped-call]
    return cosines


class _TokenCosines(torch.autograd.Function):
    """Cosines that save only the tokens, which the network keeps anyway, and three numbers per token.

    Autograd through elementary operations would save float32 copies of both inputs. In half precision each copy takes
    twice the memory of the tokens, which dominates under gradient checkpointing.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        # In half precision, norms overflow and cosines lose digits.
        dtype = torch.promote_types(student.dtype, torch.float32)
        inverse_s, inverse_t = _inverse_norm(student, dtype), _inverse_norm(teacher, dtype)
        cosines = (student.to(dtype) * teacher).sum(-1) * inverse_s * inverse_t
        ctx.save_for_backward(student, teacher, cosines, inverse_s, inverse_t)
        return cosines

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        student, teacher, cosines, inverse_s, inverse_t = ctx.saved_tensors
        if torch.is_grad_enabled():  # The result will be differentiated too, and depends on the student by its norm.
            inverse_s = _inverse_norm(student, cosines.dtype)
        # d cos / d s = t / (|s| |t|) - cos s / |s|^2
        towards, along = gradient * inverse_s * inverse_t, gradient * cosines * inverse_s.square()
        result = torch.addcmul(teacher.to(cosines.dtype) * towards[..., None], student, along[..., None], value=-1)
        return result.to(student.dtype), None


def tokens_that_count(tokens: Tensor, *, samples: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """Combines masks of samples and tokens into one mask of the counted tokens, shape (B, T), bool; None counts all.

    Args:
        tokens: Tokens that are aligned, shape (B, T, D).
        samples: Mask of the counted samples, shape (B,), bool; None counts all.
        mask: Mask of the counted tokens, shape (B, T), bool or numbers 0 and 1; None counts all.

    Raises:
        ValueError: If a mask does not match the shape of the tokens, or contains other numbers.
    """
    if samples is None and mask is None:
        return None
    shape = tuple(tokens.shape[:2])
    counts = torch.ones(shape, dtype=torch.bool, device=tokens.device)
    if samples is not None:
        if tuple(samples.shape) != shape[:1]:
            raise ValueError(
                f"the noise levels have shape {tuple(samples.shape)} for {shape[0]} samples; pass one per sample"
            )
        counts &= samples.to(tokens.device)[:, None]
    if mask is not None:
        if tuple(mask.shape) != shape:
            raise ValueError(
                f"the mask has shape {tuple(mask.shape)}, the tokens have {shape}; pass one value per token"
            )
        counts &= _as_bool(mask).to(tokens.device)
    return counts


def token_rank(tokens: Tensor) -> float:
    """Computes the effective rank of tokens: the exponential of the entropy of their normalized singular values.

    Tokens are centered first. The result lies between 1 and min(n - 1, D), or is 0 if all tokens are equal. If there
    are more than `MAX_RANK_TOKENS` tokens, that many are drawn with a fixed seed. Computed in float64.

    Args:
        tokens: Tokens, shape (n, D).

    Source: Roy and Vetterli 2007, The effective rank: a measure of effective dimensionality.
    """
    if len(tokens) > MAX_RANK_TOKENS:
        rows = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))[:MAX_RANK_TOKENS]
        tokens = tokens[rows.to(tokens.device)]
    x = tokens.detach().double()
    x = x - x.mean(0)
    gram = x.T @ x if x.shape[0] > x.shape[1] else x @ x.T
    values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    total = float(values.sum())
    # For equal tokens, only rounding errors remain after centering.
    if not total > 1e-12 * float(tokens.detach().double().norm()):
        return 0.0
    share = values / total
    return float(torch.special.entr(share).sum().exp())


class Projectors(nn.Module):
    """One MLP per pair from the student's to the teacher's token width: two linear layers with a SiLU in between.

    One call applies all of them, so that `DistributedDataParallel` and `fully_shard` can wrap them.

    Args:
        widths: Widths of the student's and the teacher's tokens, by pair.
        hidden: Width of the hidden layer.

    Source: the head of SRA, Jiang et al. 2025 (arXiv:2505.02831).
    """

    def __init__(self, widths: Sequence[tuple[int, int]], hidden: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(student, hidden), nn.SiLU(), nn.Linear(hidden, teacher))
            for student, teacher in widths
        )

    def forward(self, tokens: Iterable[Tensor]) -> list[Tensor]:
        """Applies the head of each pair to the student's tokens of this pair, shape (B, T, D)."""
        return [head(student) for head, student in zip(self.heads, tokens, strict=True)]


def _as_bool(mask: Tensor) -> Tensor:
    counts = mask == 1
    # Masks that are added to the logits of an attention contain 0 for tokens that count.
    if mask.dtype != torch.bool and not bool((counts | (mask == 0)).all()):
        other = float(mask[~counts & (mask != 0)][0])
        raise ValueError(f"the mask contains {other:g}; pass True or 1 for tokens that count, False or 0 for padding")
    return counts


def _inverse_norm(tokens: Tensor, dtype: torch.dtype) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(tokens, dim=-1, dtype=dtype)
    # Filled first: the slope of 1 / 0 would be nan.
    small = norm < MIN_NORM
    return norm.masked_fill(small, 1.0).reciprocal().masked_fill(small, 0.0)


def _centered(tokens: Tensor, counts: Tensor | None) -> Tensor:
    tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    if counts is None:
        return tokens - tokens.mean((0, 1))
    return tokens - (tokens * counts[..., None]).sum((0, 1)) / counts.sum().clamp(min=1)
