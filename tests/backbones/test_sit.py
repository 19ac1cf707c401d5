"""Our SiT against the official one's names and shapes, MAE's position embedding, and a forward pass written by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from operator import mod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from plain_sit import official_shapes, plain_sit
from torch import Tensor, nn

from layerprobe.backbones.base import Backbone, layer_shapes
from layerprobe.backbones.sit import (
    SiT,
    SiTConfig,
    config_from_state_dict,
    fitting_patch,
    new_sit,
    sincos_position,
    sit_backbone,
    unpatchify,
)
from layerprobe.capture import capture
from layerprobe.data.samples import Splits, Subset, TensorSamples
from layerprobe.extraction.forward import extract
from layerprobe.extraction.plan import ExtractionPlan
from layerprobe.noise.schedules import LinearPath, schedule_from_name

SMALL = SiTConfig(shape=(3, 8, 8), patch_size=2, hidden_size=32, depth=3, num_heads=4, num_classes=5)


GRIDS = [(12,), (8, 4), (4, 2, 6)]


PATCHED = [((12,), 2), ((8, 4), 2), ((4, 2, 6), 2), ((8, 6), (4, 1)), ((4, 2, 6), (1, 2, 3))]


def trained(config: SiTConfig = SMALL, *, seed: int = 0, **options: Any) -> Backbone:
    """A SiT whose every weight does something; a new one is the identity."""
    backbone = new_sit(config, seed=seed, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in backbone.module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    backbone.module.eval()
    return backbone


def inputs(config: SiTConfig, n: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, *config.shape, generator=generator)
    return x, torch.rand(n, generator=generator), torch.randint(0, config.num_classes + 1, (n,), generator=generator)


@pytest.mark.parametrize(("grid", "patch"), PATCHED)
@pytest.mark.parametrize("learn_sigma", [False, True])
def test_shapes_on_every_grid(grid: tuple[int, ...], patch: int | tuple[int, ...], learn_sigma: bool) -> None:
    config = replace(SMALL, shape=(3, *grid), patch_size=patch, learn_sigma=learn_sigma)
    backbone = trained(config)
    x, t, y = inputs(config)
    edges = (patch,) * len(grid) if isinstance(patch, int) else patch
    num_tokens = math.prod(grid) // math.prod(edges)
    with capture(backbone.module, backbone.layers) as outputs:
        assert backbone.module(x, t, y).shape == x.shape
    assert all(tokens.shape == (4, num_tokens, 32) for tokens in outputs.values())
    assert layer_shapes(backbone) == {f"blocks.{i}": (num_tokens, 32) for i in range(3)}
    assert config.grid == backbone.token_grid == tuple(n // edge for n, edge in zip(grid, edges, strict=True))


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        replace(SMALL, shape=(2, 8, 12), patch_size=4, learn_sigma=True),
        replace(SMALL, qk_norm=True),
        replace(SMALL, patch_size=(1, 4)),
    ],
    ids=["small", "learned sigma", "normalized queries", "patches of 1x4"],
)
@pytest.mark.parametrize("time_scale", [1.0, 999.0])
@torch.no_grad()
def test_output_and_every_block_equal_a_forward_pass_written_by_hand(config: SiTConfig, time_scale: float) -> None:
    backbone = trained(config)
    x, t, y = inputs(config)
    with capture(backbone.module, backbone.layers) as outputs:
        output = backbone.module(x, t * time_scale, y)
    expected = plain_sit(backbone.module.state_dict(), config, x, t * time_scale, y)
    for got, wanted in zip([*outputs.values(), output], expected, strict=True):
        # float32 through a few blocks: some units in the last place of values of order 1 to 10. Times up to 999 lose
        # three digits in the angles, alike in both up to the rounding of the frequencies.
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5 if time_scale == 1 else 1e-3)


@pytest.mark.parametrize(("grid", "patch"), PATCHED)
def test_unpatchify_is_the_inverse_of_the_patches_order(grid: tuple[int, ...], patch: int | tuple[int, ...]) -> None:
    """Planted: the embedding reads one value of a patch, and that value goes back to where it was read."""
    edges = (patch,) * len(grid) if isinstance(patch, int) else patch
    config = SiTConfig((2, *grid), patch_size=patch, hidden_size=8 * math.prod(edges), depth=1, num_heads=1)
    module = SiT(config)
    x = torch.arange(math.prod(config.shape), dtype=torch.float32).view(1, *config.shape)
    # A row of the kernel for each (place in the patch, channel), in the order of the final layer.
    places = torch.cartesian_prod(*map(torch.arange, edges)).view(-1, len(grid)).tolist()
    kernel = torch.zeros_like(module.x_embedder.proj.weight)
    for row, (place, channel) in enumerate((place, channel) for place in places for channel in range(2)):
        kernel[(row, channel, *place)] = 1
    with torch.no_grad():
        module.x_embedder.proj.weight.copy_(kernel)
        tokens = module.x_embedder(x)[:, :, : len(places) * 2]
    assert torch.equal(unpatchify(tokens, config=config), x)
    # The first token is the patch at the origin, the second its neighbor along the last axis.
    assert tokens[0, 0, 0] == x.flatten()[0]
    assert tokens[0, 1, 0] == x[(0, 0, *[0] * (len(grid) - 1), edges[-1])]


def test_learned_sigma_channels_are_left_out() -> None:
    config = replace(SMALL, learn_sigma=True)
    tokens = torch.randn(2, 16, 4 * 6, generator=torch.Generator().manual_seed(0))
    ours = unpatchify(tokens.view(2, 16, 4, 6)[..., :3].reshape(2, 16, 12), config=SMALL)
    assert torch.equal(unpatchify(tokens, config=config), ours)


@pytest.mark.parametrize("grid", GRIDS)
def test_a_new_sit_is_the_identity_from_block_to_block_and_predicts_zero(grid: tuple[int, ...]) -> None:
    config = replace(SMALL, shape=(3, *grid))
    backbone = new_sit(config, seed=0)
    x, t, y = inputs(config)
    with capture(backbone.module, ["x_embedder", *backbone.layers]) as outputs:
        output = backbone.module(x, t, y)
    assert not output.any()
    for name in backbone.layers:
        assert torch.equal(outputs[name], outputs["x_embedder"] + backbone.module.pos_embed)


def test_a_trained_sit_tells_times_and_labels_apart() -> None:
    backbone = trained()
    x, _, _ = inputs(SMALL, 1)
    x = x.expand(4, -1, -1, -1)
    outputs = backbone.module(x, torch.tensor([0.1, 0.2, 0.1, 0.1]), torch.tensor([0, 0, 1, 5]))
    assert len(outputs.detach().flatten(1).unique(dim=0)) == 4


def mae_position(width: int, edge: int) -> NDArray[np.float64]:
    """MAE's 2-D embedding as its paper describes it: half for the column, half for the row; sines, then cosines."""

    def axis(positions: NDArray[Any]) -> NDArray[np.float64]:
        rates = 1 / 10000 ** (np.arange(width // 4) / (width / 4))
        angles = np.outer(positions, rates)
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    rows, columns = np.divmod(np.arange(edge * edge), edge)
    return np.concatenate([axis(columns), axis(rows)], axis=1)


@pytest.mark.parametrize(("width", "edge"), [(16, 3), (64, 8), (1152, 16)])
def test_position_embedding_equals_mae(width: int, edge: int) -> None:
    position = sincos_position(width, (edge, edge))
    assert position.shape == (1, edge * edge, width)
    assert position.dtype == torch.float32
    np.testing.assert_allclose(position[0], mae_position(width, edge), atol=1e-7)  # float32


@pytest.mark.parametrize(
    ("width", "grid"), [(64, (10,)), (32, (4, 6)), (32, (4, 3, 5)), (34, (2, 3, 4)), (6, (3, 3, 3))]
)
def test_positions_differ_and_are_sums_over_the_axes(width: int, grid: tuple[int, ...]) -> None:
    position = sincos_position(width, grid)[0]
    assert position.shape == (math.prod(grid), width)
    assert len(position.unique(dim=0)) == math.prod(grid)
    # Every place has the same norm: sin^2 + cos^2 = 1 for each of width / 2 frequencies.
    torch.testing.assert_close(position.square().sum(1), torch.full((math.prod(grid),), width / 2))
    # Each channel knows one axis only.
    maps = position.view(*grid, width)
    for channel in range(width):
        axes = [axis for axis, n in enumerate(grid) if bool((maps[..., channel].diff(dim=axis) != 0).any())]
        assert len(axes) <= 1


def test_positions_are_not_trained() -> None:
    assert not new_sit(SMALL, seed=0).module.pos_embed.requires_grad


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("sigma", [False, True])
def test_names_and_shapes_are_the_official_ones(sigma: bool) -> None:
    ours = shapes(SiT(replace(SMALL, learn_sigma=sigma)))
    wanted = official_shapes(depth=3, d=32, patch=2, edge=8, c=3, classes=5, sigma=sigma)
    assert ours == wanted
    assert list(ours) == list(wanted)  # so that optimizers of the official code find their parameters


@pytest.mark.parametrize(
    ("name", "depth", "width", "heads", "patch"),
    [("S/8", 12, 384, 6, 8), ("B/4", 12, 768, 12, 4), ("L/2", 24, 1024, 16, 2), ("XL/2", 28, 1152, 16, 2)],
)
def test_presets_are_the_sizes_of_the_paper(name: str, depth: int, width: int, heads: int, patch: int) -> None:
    config = replace(SiTConfig.preset(name, shape=(4, 32, 32), num_classes=1000), learn_sigma=True)
    assert (config.depth, config.hidden_size, config.num_heads, config.patch_size) == (depth, width, heads, patch)
    # Tensors without values, so that XL costs nothing.
    wanted = official_shapes(depth=depth, d=width, patch=patch, edge=32, c=4, classes=1000)
    tensors = {name: torch.empty(shape, device="meta") for name, shape in wanted.items()}
    assert config_from_state_dict(tensors) == config


@pytest.mark.parametrize("name", ["M/2", "S", "S/3", "XL/x", "S/2/2", ""])
def test_unknown_presets_are_refused(name: str) -> None:
    with pytest.raises(
        ValueError, match=rf"^unknown preset '{name}'; use tiny, small, or one of S, B, L, XL with patch size 2, 4 or 8"
    ):
        SiTConfig.preset(name, shape=(4, 32, 32))


@pytest.mark.parametrize(
    ("grid", "tiny", "small"),
    [
        ((8, 8), 1, 1),  # digits: no more than 64 places
        ((28, 28), 4, 2),
        ((32, 32), 4, 2),
        ((40, 48), 8, 4),  # log-mel
        ((120,), 2, 1),  # motion
        ((47,), 1, 1),
        ((16, 32, 32), (4, 8, 8), 4),
        ((8, 32, 32), (2, 8, 8), (2, 4, 4)),
        ((5, 30, 30), (1, 10, 10), (1, 5, 5)),
        ((3, 3), 1, 1),  # fewer than 16 places
    ],
)
def test_small_presets_choose_a_patch_for_the_grid(grid: tuple[int, ...], tiny: Any, small: Any) -> None:
    for name, patch, width, most in (("tiny", tiny, 64, 64), ("small", small, 128, 256)):
        config = SiTConfig.preset(name, shape=(2, *grid), num_classes=3)
        assert (config.patch_size, config.hidden_size, config.depth, config.num_heads) == (patch, width, 8, 4)
        assert min(16, math.prod(grid)) <= math.prod(config.grid) <= most
        # The patch may be given, whatever the preset's would be.
        assert SiTConfig.preset(name, shape=(2, *grid), patch_size=1).grid == grid
    assert SiTConfig.preset("S/2", shape=(1, 9, 4), patch_size=(3, 4)).grid == (3, 1)


@given(st.lists(st.integers(1, 24), min_size=1, max_size=3), st.sampled_from([64, 256]))
def test_no_other_square_patch_makes_more_tokens_within_the_limit(edges: list[int], most: int) -> None:
    grid = tuple(edges)
    counts = []
    for patch in itertools.product(*(range(1, edge + 1) for edge in grid)):
        count = math.prod(grid) / math.prod(patch)
        if not any(map(mod, grid, patch)) and min(16, math.prod(grid)) <= count <= most:
            square = len(patch) == 1 or patch[-1] == patch[-2]
            counts += [int(count)] * (square and patch[0] <= patch[-1])
    if counts:
        assert math.prod(SiTConfig((1, *grid), fitting_patch(grid, most)).grid) == max(counts)
    else:
        with pytest.raises(ValueError, match=r"no (square )?patch divides a grid"):
            fitting_patch(grid, most)


def test_a_grid_without_a_fitting_patch_is_named() -> None:
    with pytest.raises(
        ValueError,
        match=r"^no patch divides a grid of 509 into 16 to 64 tokens; pass --patch-size, or another --length or --size",
    ):
        SiTConfig.preset("tiny", shape=(66, 509))
    with pytest.raises(ValueError, match=r"^no square patch divides a grid of 64x47 into 16 to 64 tokens; pass"):
        SiTConfig.preset("tiny", shape=(1, 64, 47))


def test_one_edge_for_each_axis_is_the_same_as_one_for_all() -> None:
    """So that configurations compare equal, and records stay what they were."""
    config = replace(SMALL, patch_size=[2, 2])  # as JSON gives it
    assert config == SMALL
    assert config.to_dict()["patch_size"] == SMALL.to_dict()["patch_size"] == 2
    assert replace(SMALL, patch_size=(1, 4)).to_dict()["patch_size"] == [1, 4]
    one, two = (new_sit(c, seed=0).module.state_dict() for c in (config, SMALL))
    assert all(torch.equal(one[name], two[name]) for name in two)


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        replace(SMALL, shape=(1, 12)),
        replace(SMALL, shape=(3, 4, 4, 4), num_classes=0),
        replace(SMALL, learn_sigma=True, mlp_ratio=2.0, patch_size=4),
        replace(SMALL, qk_norm=True),
    ],
    ids=lambda config: str(config.shape),
)
def test_a_configuration_is_found_from_the_tensors(config: SiTConfig) -> None:
    assert config_from_state_dict(SiT(config).state_dict(), num_heads=config.num_heads) == config
    assert SiTConfig(**config.to_dict()) == config


def test_patches_of_unequal_edges_leave_the_grid_open() -> None:
    config = replace(SMALL, shape=(1, 4, 8, 8), patch_size=(1, 4, 4))
    tensors = SiT(config).state_dict()
    assert config_from_state_dict(tensors, num_heads=4, shape=(1, 4, 8, 8)) == config
    with pytest.raises(ValueError, match=r"^the 16 positions in pos_embed leave the grid of 1x4x4 patches open; pass"):
        config_from_state_dict(tensors, num_heads=4)
    with pytest.raises(ValueError, match=r"does not fit 1 channels and 16 patches of 1x4x4; pass the shape of the"):
        config_from_state_dict(tensors, num_heads=4, shape=(1, 4, 8, 4))


def test_heads_have_to_be_told_where_the_width_is_no_presets() -> None:
    tensors = SiT(SMALL).state_dict()
    with pytest.raises(
        ValueError, match=r"^no preset has width 32, so the number of heads is unknown; pass --num-heads$"
    ):
        config_from_state_dict(tensors)
    for sizes in ({"depth": 10**9}, {"hidden_size": 10**12}, {"num_classes": 10**12}, {"shape": (1, 2**20, 2**20)}):
        with pytest.raises(ValueError, match="is larger than any that exists; check the sizes"):
            SiTConfig(**({"shape": (1, 8, 8), "num_heads": 2, "hidden_size": 32} | sizes))
    for sizes in ({"depth": 2.0}, {"num_classes": True}, {"mlp_ratio": float("nan")}):
        with pytest.raises(ValueError, match="sizes must be whole numbers, and mlp_ratio above 0 and at most 64"):
            SiTConfig(**({"shape": (1, 8, 8), "num_heads": 2, "hidden_size": 32} | sizes))
    with pytest.raises(ValueError, match="hidden size 32 does not divide into 5 heads"):
        config_from_state_dict(tensors, num_heads=5)
    with pytest.raises(ValueError, match="must be at least 1"):
        config_from_state_dict(tensors, num_heads=0)


def test_normalized_queries_tell_the_number_of_heads() -> None:
    tensors = SiT(replace(SMALL, qk_norm=True)).state_dict()
    assert config_from_state_dict(tensors).num_heads == 4
    with pytest.raises(ValueError, match=r"^blocks.0.attn.q_norm.weight shows 4 heads, not 2; leave"):
        config_from_state_dict(tensors, num_heads=2)


def test_grids_that_are_not_square_have_to_be_told() -> None:
    config = replace(SMALL, shape=(3, 8, 12))
    tensors = SiT(config).state_dict()
    assert config_from_state_dict(tensors, num_heads=4, shape=[3, 8, 12]) == config
    with pytest.raises(ValueError, match=r"^the 24 positions in pos_embed do not form a square grid; pass --shape$"):
        config_from_state_dict(tensors, num_heads=4)
    for wrong in [(3, 8, 8), (4, 8, 12), (3, 24), (3, 8)]:
        with pytest.raises(ValueError, match=r"does not fit 3 channels and 24 patches of 2; pass the shape of the"):
            config_from_state_dict(tensors, num_heads=4, shape=wrong)


def test_the_width_of_the_mlp_survives_rounding() -> None:
    """49 / 49 * k and the like fall just below a whole number."""
    for width in (98, 214, 322):
        for mlp_width in range(1, 3 * width, 7):
            tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes(SiT(SMALL)).items()}
            tensors["x_embedder.proj.weight"] = torch.empty(width, 3, 2, 2, device="meta")
            tensors["blocks.0.mlp.fc1.weight"] = torch.empty(mlp_width, width, device="meta")
            config = config_from_state_dict(tensors, num_heads=1)
            assert int(width * config.mlp_ratio) == mlp_width


@pytest.mark.parametrize(
    ("name", "tensor", "seen"),
    [
        ("pos_embed", None, "is missing"),
        ("blocks.0.mlp.fc1.weight", None, "is missing"),
        ("y_embedder.embedding_table.weight", None, "is missing"),
        ("pos_embed", torch.zeros(16), r"has shape \(16,\)"),
        ("x_embedder.proj.weight", torch.zeros(32, 12), r"has shape \(32, 12\)"),
        ("x_embedder.proj.weight", torch.zeros(32, 3, 0, 0), r"has shape \(32, 3, 0, 0\)"),
    ],
)
def test_state_dicts_that_are_no_sit_are_refused(name: str, tensor: Tensor | None, seen: str) -> None:
    tensors = SiT(SMALL).state_dict()
    del tensors[name]
    if tensor is not None:
        tensors[name] = tensor
    with pytest.raises(
        ValueError, match=rf"^this is not a complete SiT or DiT: {name} {seen}; use a complete state dict$"
    ):
        config_from_state_dict(tensors, num_heads=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": (3,)}, r"shape must be \(C, \*grid\) with one to three grid axes, got \(3,\)"),
        ({"shape": (3, 2, 2, 2, 2)}, "one to three grid axes"),
        ({"shape": (3, 8, 7)}, r"the grid \(8, 7\) does not divide into patches of 2; change one of them"),
        (
            {"shape": (3, 0, 8)},
            "shape, patch, width, depth and heads must be at least 1, and classes at least 0, got SiTConfig",
        ),
        ({"patch_size": 0}, "must be at least 1"),
        ({"patch_size": (0, 2)}, "must be at least 1"),
        ({"patch_size": (2, 3)}, r"the grid \(8, 8\) does not divide into patches of 2x3; change one of them"),
        ({"patch_size": (1, 2, 2)}, r"a patch of 1x2x2 does not fit the grid \(8, 8\); pass one edge for all axes"),
        ({"depth": 0}, "must be at least 1"),
        ({"num_heads": 0}, "must be at least 1"),
        ({"num_classes": -1}, "classes at least 0"),
        ({"hidden_size": 30}, "hidden size 30 does not divide into 4 heads; change one of them"),
        ({"hidden_size": 33, "num_heads": 3}, "hidden size 33 is odd or too small for positions; pass an even one"),
        ({"hidden_size": 2, "num_heads": 1}, "hidden size 2 is odd or too small for positions"),
    ],
)
def test_configurations_that_make_no_network_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)


def test_fresh_weights_depend_on_the_seed_only() -> None:
    torch.manual_seed(5)
    one, state = new_sit(SMALL, seed=0).module.state_dict(), torch.get_rng_state()
    torch.manual_seed(6)
    two, other = new_sit(SMALL, seed=0).module.state_dict(), new_sit(SMALL, seed=1).module.state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)
    torch.manual_seed(5)
    assert torch.equal(state, torch.get_rng_state())  # the caller's random numbers are untouched


@pytest.mark.parametrize("schedule", ["sit", "flow", "flow-1000", "ddpm-linear", "edm"])
@torch.no_grad()
def test_backbone_tells_the_network_its_own_time_and_turns_the_velocity_round(schedule: str) -> None:
    path = schedule_from_name(schedule)
    backbone = trained(schedule=path)
    x, level, y = inputs(SMALL)
    expected = backbone.module(x, path.native_time(level), y) * (-1 if schedule == "sit" else 1)
    torch.testing.assert_close(backbone.predict(x, level, y), expected)
    torch.testing.assert_close(backbone(x, level, y), expected)
    # Levels in float64 are as good: the network still gets its own type.
    assert backbone.predict(x, level.double(), y).dtype == torch.float32


@torch.no_grad()
def test_backbone_converts_what_the_network_predicts_to_a_velocity() -> None:
    eps = trained(schedule=LinearPath(0, 1), prediction="eps")
    x, level, y = inputs(SMALL)
    at = level.view(-1, 1, 1, 1)
    torch.testing.assert_close(eps(x, level, y), (eps.predict(x, level, y) - x) / (1 - at), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_no_condition_is_the_null_label() -> None:
    backbone = trained()
    x, level, _ = inputs(SMALL)
    assert torch.equal(backbone.predict(x, level), backbone.predict(x, level, torch.full((4,), 5)))
    null = backbone.null_condition(3)
    assert null is not None
    assert null.tolist() == [5, 5, 5]
    unconditional = trained(replace(SMALL, num_classes=0))
    assert unconditional.null_condition(3) is None
    assert unconditional(x, level).shape == x.shape


def test_samples_of_another_shape_are_refused() -> None:
    with pytest.raises(
        ValueError,
        match=r"^samples have shape \(3, 16, 16\), but SiT with 3 blocks of width 32, patch 2 takes \(3, 8, 8\); ",
    ):
        new_sit(SMALL, seed=0)(torch.zeros(1, 3, 16, 16), torch.tensor([0.5]))


def test_backbone_names_its_blocks_in_order() -> None:
    backbone = sit_backbone(SiT(replace(SMALL, depth=11)), name="mine")
    assert backbone.layers == tuple(f"blocks.{i}" for i in range(11))
    assert (backbone.name, backbone.num_classes, backbone.shape) == ("mine", 5, (3, 8, 8))
    assert backbone.device == torch.device("cpu")


@torch.no_grad()
def test_tokens_of_unequal_patches_are_pooled_on_their_own_grid(tmp_path: Path) -> None:
    """Patches of 4x1 on 8x12 make 2x12 tokens; their number alone would say 4x6."""
    backbone = trained(SiTConfig((1, 8, 12), (4, 1), 16, 2, 2, num_classes=3))
    x = torch.randn(6, 1, 8, 12, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(6, 8, 12, dtype=torch.bool)
    mask[:3, :, 7:] = False
    samples = TensorSamples(x, torch.arange(6) % 3, mask=mask)
    splits = Splits(*(Subset(samples, [i, i + 3], name=str(i)) for i in range(3)))
    store = extract(backbone, splits, ExtractionPlan(backbone.layers, (0.0,)), tmp_path / "padded")
    with capture(backbone.module, backbone.layers) as outputs:
        backbone.masked(mask).predict(samples.x, torch.zeros(6))
    tokens = outputs["blocks.1"].view(6, 2, 12, 16)
    wanted = torch.cat([tokens[:3, :, :7].mean((1, 2)), tokens[3:].mean((1, 2))])
    # Without the mask's grid, tokens of padding would count: far from rounding.
    assert float((wanted - tokens.mean((1, 2))).abs().max()) > 0.01
    found = torch.from_numpy(store.features("blocks.1", 0.0, split="train"))
    torch.testing.assert_close(found, wanted[[0, 3]], rtol=1e-4, atol=1e-5)

    whole = Splits(*(TensorSamples(part, ids=torch.arange(2) + 2 * i) for i, part in enumerate(x.split(2))))
    kept = extract(backbone, whole, ExtractionPlan(backbone.layers, (0.5,), token_samples=2), tmp_path / "whole")
    assert kept.grid("blocks.1") == (2, 12)


@torch.no_grad()
def test_bfloat16_autocast_is_near_float32() -> None:
    backbone = trained()
    x, level, y = inputs(SMALL)
    expected = backbone.predict(x, level, y)
    with torch.autocast("cpu", torch.bfloat16), capture(backbone.module, backbone.layers) as outputs:
        output = backbone.predict(x, level, y)
    assert all(tokens.dtype == torch.float32 for tokens in outputs.values())  # the residual stream keeps its digits
    # Three blocks of products with 8 significant bits each.
    assert float((output - expected).norm() / expected.norm()) < 0.03


def test_gradients_reach_every_trained_parameter_under_autocast() -> None:
    backbone = trained()
    x, level, y = inputs(SMALL)
    with torch.autocast("cpu", torch.bfloat16):
        loss = backbone.predict(x, level, y).float().square().mean()
    loss.backward()
    for name, parameter in backbone.module.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.isfinite().all())) == parameter.requires_grad, name


def test_the_whole_network_is_one_graph_for_the_compiler() -> None:
    backbone = trained(replace(SMALL, depth=1))
    x, level, y = inputs(SMALL)
    expected = backbone.module(x, level, y)
    # The graph runs as it is: what generates code from it is torch's own, and takes a C++ compiler and many seconds.
    compiled: Callable[..., Tensor] = torch.compile(backbone.module, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, level, y), expected)
    torch.compiler.reset()
