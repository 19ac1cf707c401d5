"""The result of a convention check in sentences."""

from __future__ import annotations

import math

from layerprobe.checkpoints.convention import LOG_SNRS, ConventionCheck, Fit

_CAUTIONS = {
    "true labels no better than wrong ones": (
        "the true labels denoise no better than wrong ones: the classes may be numbered differently"
    ),
    "null label like a wrong one": (
        "the null label denoises like a wrong label: its row may be a class, as after training without label dropout; "
        "pass --num-classes with the number of rows of the label table, or check it"
    ),
    "more classes in the data": (
        "the data has {check.classes[1]} classes, but the network {check.classes[0]} and a null label: if all rows of "
        "its label table are classes, pass --num-classes with the number of rows"
    ),
    "another number of heads fits as well": (
        "{check.rival_heads} attention heads fit about as well as {check.declared.num_heads}: the weights do not "
        "decide between them; make sure of --num-heads"
    ),
    "null label worse than a wrong one": (
        "the null label denoises worse than a wrong label: the model may have been trained without it"
    ),
}


def convention_name(fit: Fit, beside: Fit | None = None) -> str:
    """The convention of a fit as options of the command line; heads and value range only if another fit differs."""
    name = f"--schedule {fit.schedule} --prediction {fit.prediction}"
    if beside is not None and fit.num_heads != beside.num_heads:
        name += f" --num-heads {fit.num_heads}"
    if beside is not None and fit.value_range != beside.value_range:
        name += f" --value-range {','.join(f'{value:g}' for value in fit.value_range)}"
    return name


def convention_message(check: ConventionCheck) -> str:
    """The verdict in one line, with the errors behind it."""
    declared, best = check.declared, check.fits[0]
    if check.verdict == "misfit":
        return (
            f"the weights do not fit {convention_name(declared, best)}: the denoising error is {_times(declared)} that "
            f"of a linear denoiser, but {_times(best)} under {convention_name(best, declared)}; pass these, or "
            "--trust-convention to go on"
        )
    if check.verdict == "unclear":
        return (
            "this network does not denoise this data under any known convention: the best, "
            f"{convention_name(best, declared)}, has {_times(best)} the error of a linear denoiser; check the data, "
            "its scale and the training"
        )
    error = f"the denoising error is {_times(declared)} that of a linear denoiser"
    return f"the weights fit {convention_name(declared)}: {error}"


def convention_cautions(check: ConventionCheck) -> list[str]:
    """Warnings about heads and labels."""
    return [_CAUTIONS[caution].format(check=check) for caution in check.cautions]


def convention_lines(check: ConventionCheck) -> list[str]:
    """The message, the warnings, and a text table of the best five fits and the declared one."""
    shown = [*check.fits[:5], *([check.declared] if check.declared not in check.fits[:5] else [])]
    names = [convention_name(fit, check.declared) + " (declared)" * (fit is check.declared) for fit in shown]
    width = max(map(len, [*names, "convention"]))
    head = f"{'convention':<{width}}" + "".join(f"{f'{log_snr:+.0f}':>8}" for log_snr in LOG_SNRS)
    rows = [
        f"{name:<{width}}" + "".join(f"{ratio:>8.3g}" for ratio in fit.ratios)
        for name, fit in zip(names, shown, strict=True)
    ]
    title = "denoising error over that of a linear denoiser, by log signal-to-noise ratio; below 1 is better"
    return [convention_message(check), *convention_cautions(check), title, head, *rows]


def _times(fit: Fit) -> str:
    return f"{math.exp(fit.score):.3g} times"
