"""Pairs by the numbers of blocks and by the pick of a run, in networks of many shapes and wrappers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from diffusers_models import CASES
from residual_network import Network, X
from torch import nn

from layerprobe.backbones import wrap
from layerprobe.layersync.loss import LayerSync, unwrapped
from layerprobe.layersync.naming import as_pairs, block_name, picked_in
from layerprobe.layersync.pair import LayerPair

FOUR = tuple(f"blocks.{i}" for i in range(4))


def case(name: str) -> Any:
    return next(case for case in CASES if case.id == name).build()


class Around(nn.Module):
    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def selection(pick: tuple[str, str] | None = ("blocks.0", "blocks.2"), layers: tuple[str, ...] = FOUR) -> Any:
    pair = None if pick is None else LayerPair(*pick)
    return SimpleNamespace(pick=pair, weight=0.45, basis=SimpleNamespace(layers=layers))


def test_numbers_are_those_of_the_module_in_the_only_list_of_blocks() -> None:
    for numbers, names in (((0, 2), ("blocks.0", "blocks.2")), ((0, "blocks.3"), ("blocks.0", "blocks.3"))):
        for sync in (LayerSync(Network(), *numbers), LayerSync(Network(), [numbers])):
            assert sync.pairs == (LayerPair(*names),)
    assert LayerSync(Network(), 0, 2).weight == 0.3
    assert block_name(Around(net=Network()), 3) == "net.blocks.3"
    assert block_name(case("SD3Transformer2DModel"), 1) == "transformer_blocks.1"
    # A list in each block, and an MLP of layers without parts, are no lists of blocks.
    inner = Around(blocks=nn.ModuleList(Around(heads=nn.ModuleList([Network(), Network()])) for _ in range(3)))
    inner.add_module("mlp", nn.Sequential(nn.Linear(1, 1), nn.SiLU(), nn.Linear(1, 1)))
    assert block_name(inner, 2) == "blocks.2"


NO_NUMBERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int], str]] = {
    "two streams": (
        lambda: case("FluxTransformer2DModel"),
        (0, 1),
        r"^FluxTransformer2DModel has several lists of blocks \(transformer_blocks\.0 to transformer_blocks\.1, "
        r"single_transformer_blocks\.0 to single_transformer_blocks\.1\); pass names for 0$",
    ),
    "two lists": (lambda: Around(a=Network(), b=Network()), (0, 1), r"several lists of blocks \(a\.blocks\.0 to .*b\."),
    "no list": (lambda: nn.Sequential(nn.Linear(1, 1), nn.SiLU()), (0, 1), r"^Sequential has no list of blocks in"),
    "negative": (
        Network,
        (-1, 2),
        r"^there is no block -1 in Network, which has blocks\.0 to blocks\.3; pass a number",
    ),
    "too deep": (Network, (1, 4), r"^there is no block 4 in Network.*from 0 to 3$"),
    "itself": (Network, (2, 2), r"^blocks\.2 cannot be its own teacher"),
    "a truth": (Network, (True, 2), r"^bool and int is not a \(student, teacher\) pair; pass a list of pairs"),
}


@pytest.mark.parametrize(("build", "numbers", "message"), NO_NUMBERS.values(), ids=NO_NUMBERS)
def test_numbers_that_are_no_single_block_are_refused(
    build: Callable[[], nn.Module], numbers: tuple[int, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        LayerSync(build(), *numbers)


def test_what_is_no_pair_is_refused() -> None:
    for other in ([8], [(None, "blocks.1")], [(nn.Linear(1, 1), nn.Linear(1, 1))]):
        with pytest.raises(ValueError, match=r" is not a \(student, teacher\) pair; pass a list of pairs"):
            as_pairs(other, None, Network())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^7 is a student without a teacher; pass LayerSync\(model, 7, teacher\)$"):
        LayerSync(Network(), 7)


def written(folder: Path, pick: dict[str, str] | None) -> Path:
    folder.mkdir()
    record = {"pick": pick, "weight": 0.45, "basis": {"layers": FOUR}, "ranked": []}
    (folder / "selection.json").write_text(json.dumps(record))
    return folder


def test_the_pick_of_a_run_comes_with_its_weight_from_a_folder_a_run_or_a_selection(tmp_path: Path) -> None:
    folder = written(tmp_path / "run", {"student": "blocks.0", "teacher": "blocks.2"})
    for run in (folder, str(folder), folder / "selection.json", selection(), SimpleNamespace(selection=selection())):
        sync = LayerSync.from_selection(Network(), run)
        assert (sync.pairs, sync.weight) == ((LayerPair("blocks.0", "blocks.2"),), 0.45)
    assert LayerSync.from_selection(Network(), folder, weight=0.1).weight == 0.1
    with pytest.raises(ValueError, match=r"run has no admissible pair, for which `layerprobe select` gives the reason"):
        LayerSync.from_selection(Network(), written(tmp_path / "other run", None))
    (folder / "selection.json").write_text('{"pick": {"student": 3}}')
    with pytest.raises(ValueError, match=r"selection\.json is damaged \(.*\); repeat `layerprobe probe`"):
        LayerSync.from_selection(Network(), folder)
    with pytest.raises(FileNotFoundError, match=r"nowhere.*does not exist; pass a folder that `layerprobe probe`"):
        LayerSync.from_selection(Network(), tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"^a float holds no pick; pass the folder of a run"):
        LayerSync.from_selection(Network(), 0.3)


def test_the_pick_is_found_in_a_wrapped_network() -> None:
    network = Network()
    assert picked_in(Around(net=network), selection()).pair == LayerPair("net.blocks.0", "net.blocks.2")
    with LayerSync.from_selection(Around(net=network), selection()) as sync:
        with pytest.raises(ValueError, match="no forward pass with gradients"):
            sync.loss()
        assert unwrapped(sync.module) is sync.module
    with pytest.raises(
        ValueError, match=r"^Around has blocks\.0 several times \(a\.blocks\.0, b\.blocks\.0\); pass the"
    ):
        picked_in(Around(a=Network(), b=Network()), selection())


def test_another_network_than_the_runs_is_refused_or_told_of() -> None:
    with pytest.raises(ValueError, match=r"^Network has no blocks\.4, which the run measured; pass the network of the"):
        picked_in(Network(), selection(layers=(*FOUR, "blocks.4")))
    with pytest.warns(UserWarning, match=r"^Network also has blocks\.4, which the run did not measure; is it the"):
        LayerSync.from_selection(Network(depth=6), selection())
    picked_in(Network(depth=6), selection(layers=("blocks.0", "blocks.2", "blocks.5")))  # layers that the user chose


def test_a_backbone_brings_its_function_for_tokens() -> None:
    seen = []

    def tokens(output: Any, name: str) -> Any:
        seen.append(name)
        return output

    network = Network()
    backbone = wrap(network, layers="blocks.*", schedule="flow", prediction="velocity", shape=(7, 16), tokens=tokens)
    with LayerSync.from_selection(backbone, selection()) as sync:
        network(X)
        sync.loss()
    assert seen == ["blocks.0", "blocks.2"]
