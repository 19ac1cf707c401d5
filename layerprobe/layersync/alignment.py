"""What the LayerSync regularizer computes from tokens (B, T, D), and how it is told that they collapse."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

SHORTEST = 1e-8
MOST_TOKENS = 4096


def mean_cosine(student: Tensor, teacher: Tensor, counts: Tensor | None = None, *, centered: bool = False) -> Tensor:
    """The mean over the batch of each sample's mean cosine, a scalar; gradients go to the student alone.

    A sample in which nothing counts adds 0 and stays in the denominator, so that equal parts of a batch, computed one
    by one or by several processes, average to the whole. (Centering is the exception: each part has its own mean.)

    Args:
        student: Tokens, shape (B, T, D).
        teacher: Tokens of the same shape; another dtype will do.
        counts: Which tokens count, shape (B, T), bool; None counts all.
        centered: Subtract each channel's mean over the tokens that count first.
    """
    if centered:
        student, teacher = _centered(student, counts), _centered(teacher.detach(), counts)
    cosines = token_cosines(student, teacher)
    if counts is None:
        return cosines.mean()
    share = counts / (counts.sum(1, keepdim=True).clamp(min=1) * len(counts))
    return (cosines * share).sum()


def token_cosines(student: Tensor, teacher: Tensor) -> Tensor:
    """Cosines of tokens with tokens, (B, T, D) twice -> (B, T), in float32 at least; the teacher gets no gradient.

    A token shorter than `SHORTEST` has no direction: its cosine is 0, and so is its gradient.
    """
    cosines: Tensor = _TokenCosines.apply(student, teacher.detach())  # type: ignore[no-untyped-call]
    return cosines


class _TokenCosines(torch.autograd.Function):
    """Keeps the tokens themselves, which the network keeps anyway, and three numbers a token.

    The chain of elementary operations would keep float32 copies of both: in half precision twice the tokens each,
    which under gradient checkpointing is most of what is kept at all.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        # Norms overflow and cosines lose digits in half precision.
        dtype = torch.promote_types(student.dtype, torch.float32)
        inverse_s, inverse_t = _inverse_norm(student, dtype), _inverse_norm(teacher, dtype)
        cosines = (student.to(dtype) * teacher).sum(-1) * inverse_s * inverse_t
        ctx.save_for_backward(student, teacher, cosines, inverse_s, inverse_t)
        return cosines

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        student, teacher, cosines, inverse_s, inverse_t = ctx.saved_tensors
        # d cos / d s = t / (|s| |t|) - cos s / |s|^2
        towards, along = gradient * inverse_s * inverse_t, gradient * cosines * inverse_s.square()
        result = torch.addcmul(teacher.to(cosines.dtype) * towards[..., None], student, along[..., None], value=-1)
        return result.to(student.dtype), None


def tokens_that_count(tokens: Tensor, *, samples: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """Which tokens (B, T, D) count, shape (B, T), bool; None for all.

    Args:
        tokens: Those that are aligned.
        samples: The samples that count, shape (B,), bool, or None for all.
        mask: The tokens that count, shape (B, T), bool, or None for all.

    Raises:
        ValueError: If a shape is another.
    """
    if samples is None and mask is None:
        return None
    shape = tuple(tokens.shape[:2])
    counts = torch.ones(shape, dtype=torch.bool, device=tokens.device)
    if samples is not None:
        if tuple(samples.shape) != shape[:1]:
            raise ValueError(f"there are {tuple(samples.shape)} noise levels for {shape[0]} samples; pass one for each")
        counts &= samples.to(tokens.device)[:, None]
    if mask is not None:
        if tuple(mask.shape) != shape:
            raise ValueError(f"the mask has shape {tuple(mask.shape)}, the tokens have {shape}; pass a value for each")
        counts &= mask.to(tokens.device)
    return counts


def token_rank(tokens: Tensor) -> float:
    """How many directions tokens (n, D) take: exponential of the entropy of their normalized singular values, centered.

    At least 1, at most min(n - 1, D); 0 where all tokens are equal. Of more than `MOST_TOKENS` tokens that many are
    drawn, always the same ones. Computed in float64.

    Source: Roy and Vetterli 2007, The effective rank: a measure of effective dimensionality.
    """
    if len(tokens) > MOST_TOKENS:
        chosen = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))[:MOST_TOKENS]
        tokens = tokens[chosen.to(tokens.device)]
    x = tokens.detach().double()
    x = x - x.mean(0)
    gram = x.T @ x if x.shape[0] > x.shape[1] else x @ x.T
    values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    total = float(values.sum())
    # What is left of equal tokens by subtracting their mean is rounding.
    if not total > 1e-12 * float(tokens.detach().double().norm()):
        return 0.0
    share = values / total
    return float(torch.special.entr(share).sum().exp())


class Projectors(nn.Module):
    """One MLP a pair, from the student's tokens to the teacher's width: two linear layers with a SiLU between.

    All are applied in one call, so that `DistributedDataParallel` and `fully_shard` can wrap them.

    Args:
        widths: Of the student's and the teacher's tokens, by pair.
        hidden: Width in between.

    Source: the head of SRA, Jiang et al. 2025 (arXiv:2505.02831).
    """

    def __init__(self, widths: Sequence[tuple[int, int]], hidden: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(student, hidden), nn.SiLU(), nn.Linear(hidden, teacher))
            for student, teacher in widths
        )

    def forward(self, tokens: Iterable[Tensor]) -> list[Tensor]:
        """Each pair's tokens (B, T, D) through its own head."""
        return [head(one) for head, one in zip(self.heads, tokens, strict=True)]


def _inverse_norm(tokens: Tensor, dtype: torch.dtype) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(tokens, dim=-1, dtype=dtype)
    return norm.reciprocal().masked_fill(norm < SHORTEST, 0.0)


def _centered(tokens: Tensor, counts: Tensor | None) -> Tensor:
    tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    if counts is None:
        return tokens - tokens.mean((0, 1))
    return tokens - (tokens * counts[..., None]).sum((0, 1)) / counts.sum().clamp(min=1)
