"""LoRA adapters are merged as peft and diffusers merge them, and what cannot be merged so is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

pytest.importorskip("diffusers", reason="diffusers is not installed (pip install 'layerprobe[diffusers]')")
peft = pytest.importorskip("peft", reason="peft is not installed (pip install 'layerprobe[diffusers]')")

from diffusers_checks import BY_NAME  # noqa: E402

from layerprobe.backbones.diffusers.opening import open_diffusers  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:diffusers"),
    pytest.mark.filterwarnings("ignore:Adapter .default.*invalid shape"),  # vectors of lora_bias
]
DIT, SD3, UNET = "DiTTransformer2DModel", "SD3Transformer2DModel", "UNet2DConditionModel"


def same(module: nn.Module, wanted: Mapping[str, Tensor]) -> None:
    state = module.state_dict()
    assert state.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


def peft_folder(folder: Path, **settings: Any) -> tuple[Any, Any]:
    """Saves a base model and a random adapter of it with peft; returns peft's model and a copy of the base."""
    base = BY_NAME[DIT].save(folder / "base")
    options = {"r": 2, "lora_alpha": 6, "target_modules": ["to_q", "to_v"], "init_lora_weights": False}
    tuned = peft.get_peft_model(base, peft.LoraConfig(**(options | settings)))
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    tuned.save_pretrained(folder / "adapter")
    return tuned, BY_NAME[DIT].build()


@pytest.mark.parametrize(
    ("settings", "factors"),
    [
        ({}, [3.0]),
        ({"use_rslora": True}, [6 / 2**0.5]),
        ({"alpha_pattern": {"0.attn1.to_q": 20}, "rank_pattern": {"to_v": 4}}, [1.5, 3.0, 10.0]),
        ({"use_dora": True}, [3.0]),
        ({"bias": "all"}, [3.0]),
        ({"lora_bias": True}, [3.0]),
        ({"modules_to_save": ["proj_out_2"]}, [3.0]),
    ],
    ids=lambda value: "-".join(value) or "plain" if isinstance(value, dict) else "",
)
def test_a_peft_adapter_is_merged_as_peft_merges_it(
    settings: dict[str, Any], factors: list[float], tmp_path: Path
) -> None:
    tuned, base = peft_folder(tmp_path, **settings)
    wanted = tuned.merge_and_unload().state_dict()
    plain = base.state_dict()
    assert any(not torch.allclose(plain[name], tensor) for name, tensor in wanted.items())
    backbone = open_diffusers(tmp_path / "base", lora=tmp_path / "adapter")
    same(backbone.module, wanted)
    lora = backbone.origin["lora"]
    assert lora["factor"] == pytest.approx(factors)
    assert (lora["modules"], lora["alpha_from"]) == (6, "adapter_config.json")
    assert not any("alpha" in assumption for assumption in backbone.assumptions)


def with_adapter(folder: Path, *, rank: int = 8, alpha: int = 16, name: str = SD3) -> tuple[Any, Path]:
    """Saves a base model and a file of diffusers with a random adapter; returns the fused model and the file."""
    base: Any = BY_NAME[name].save(folder / "base")
    targets = ["to_q", "to_v"]
    base.add_adapter(peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, init_lora_weights=False))
    base.save_lora_adapter(folder / "adapter")
    base.fuse_lora()
    base.unload_lora()
    return base, folder / "adapter/pytorch_lora_weights.safetensors"


def rewrite(file: Path, change: Any, header: dict[str, str] | None = None) -> None:
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata() if header is None else header
    save_file(change(load_file(file)), file, metadata=metadata)


def test_the_alpha_in_a_file_s_header_is_read(tmp_path: Path) -> None:
    fused, file = with_adapter(tmp_path)
    for path in (file, file.parent):
        backbone = open_diffusers(tmp_path / "base", lora=path)
        same(backbone.module, fused.state_dict())
        lora = backbone.origin["lora"]
        assert (lora["rank"], lora["alpha"], lora["factor"]) == ([8], [16.0], [2.0])
        assert lora["alpha_from"] == "lora_adapter_metadata in its header"
    # Pipelines write names and settings of all components into one file.
    header = {f"transformer.{key}": value for key, value in json.loads(_metadata(file)).items()}
    rewrite(
        file,
        lambda state: (
            {f"transformer.{name}": value for name, value in state.items()}
            | {"text_encoder.text_model.q_proj.lora_B.weight": torch.ones(2, 2)}
        ),
        {"lora_adapter_metadata": json.dumps(header | {"text_encoder.lora_alpha": 1})},
    )
    backbone = open_diffusers(tmp_path / "base", lora=file)
    same(backbone.module, fused.state_dict())
    assert backbone.origin["lora"]["left_out"] == {"text_encoder": 1}


def _metadata(file: Path) -> str:
    with safe_open(file, framework="pt") as opened:
        return str(opened.metadata()["lora_adapter_metadata"])


def test_an_alpha_that_nothing_says_is_told_and_can_be_passed(tmp_path: Path) -> None:
    fused, file = with_adapter(tmp_path)
    rewrite(file, dict, {})
    assumed = open_diffusers(tmp_path / "base", lora=file)
    assert assumed.origin["lora"]["factor"] == [1.0]
    assert any("its rank, so the factor is 1" in text and "--lora-alpha" in text for text in assumed.assumptions)
    told = open_diffusers(tmp_path / "base", lora=file, lora_alpha=16)
    same(told.module, fused.state_dict())
    assert told.origin["lora"]["alpha_from"] == "--lora-alpha"
    rewrite(file, dict, {"ss_network_alpha": "16", "ss_network_dim": "8"})
    same(open_diffusers(tmp_path / "base", lora=file).module, fused.state_dict())
    with pytest.raises(ValueError, match=r"has its alpha in ss_network_alpha in its header; leave --lora-alpha out"):
        open_diffusers(tmp_path / "base", lora=file, lora_alpha=16)
    with pytest.raises(ValueError, match="--lora-alpha has no effect without --lora"):
        open_diffusers(tmp_path / "base", lora_alpha=16)


def kohya(module: nn.Module, names: list[str], *, alpha: float = 3.0, rank: int = 2) -> dict[str, Tensor]:
    """An adapter of these modules as kohya's scripts write it, by dotted names."""
    state = {}
    for name in names:
        weight = module.get_submodule(name).weight
        state[f"{name}.lora_down.weight"] = torch.randn(rank, *weight.shape[1:])
        state[f"{name}.lora_up.weight"] = torch.randn(len(weight), rank, *[1] * (weight.ndim - 2))
        state[f"{name}.alpha"] = torch.tensor(alpha)
    return state


def underscored(state: Mapping[str, Tensor], head: str = "lora_unet_") -> dict[str, Tensor]:
    """Writes the dots of the modules' names as underscores."""
    cut = {name: next(end for end in (".lora_", ".alpha") if end in name) for name in state}
    return {
        head + name[: name.index(cut[name])].replace(".", "_") + name[name.index(cut[name]) :]: value
        for name, value in state.items()
    }


UNET_TARGETS = [
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0",
    "down_blocks.0.attentions.0.proj_in",
    "down_blocks.0.resnets.0.conv1",
]


@pytest.mark.parametrize("style", ["kohya", "ComfyUI", "old diffusers", "processors"])
def test_names_of_other_programs_are_read(style: str, tmp_path: Path) -> None:
    base: Any = BY_NAME[UNET].save(tmp_path / "base")
    targets = UNET_TARGETS[:2] if style == "processors" else UNET_TARGETS
    targets = [name for name in targets if hasattr(base.get_submodule(name), "weight")]
    state = kohya(base, targets)
    if style == "ComfyUI":
        written = {f"diffusion_model.{n}".replace("lora_down", "lora_A"): v for n, v in state.items()}
        written = {n.replace("lora_up", "lora_B"): v for n, v in written.items()}
    elif style == "kohya":
        written = underscored(state) | {"lora_te1_text_model_q_proj.alpha": torch.tensor(1.0)}
    else:
        written = {f"unet.{n}".replace(".lora_", ".lora."): v for n, v in state.items()}
        if style == "processors":
            for part in ("to_q", "to_out.0"):
                short = part.removesuffix(".0")
                written = {n.replace(f".{part}.lora.", f".processor.{short}_lora."): v for n, v in written.items()}
            written = {n: v for n, v in written.items() if not n.endswith(".alpha")}
    save_file(written, tmp_path / "adapter.safetensors")
    backbone = open_diffusers(tmp_path / "base", lora=tmp_path / "adapter.safetensors")
    # diffusers' own, from names of its own.
    loaded = {f"unet.{n}".replace("lora_down", "lora_A").replace("lora_up", "lora_B"): v for n, v in state.items()}
    alphas = {n: float(v) for n, v in loaded.items() if n.endswith(".alpha")}
    matrices = {n: v for n, v in loaded.items() if not n.endswith(".alpha")}
    base.load_lora_adapter(matrices, prefix="unet", network_alphas=None if style == "processors" else alphas)
    base.fuse_lora()
    base.unload_lora()
    same(backbone.module, base.state_dict())
    lora = backbone.origin["lora"]
    assert (lora["modules"], lora["factor"]) == (len(targets), [1.0] if style == "processors" else [1.5])
    assert lora["left_out"] == ({"lora_te1": 1} if style == "kohya" else {})


@pytest.mark.parametrize("case", ["Wan of ComfyUI", "Flux of kohya", "SDXL of kohya"])
def test_names_of_the_original_code_are_converted(case: str, tmp_path: Path) -> None:
    """The same matrices under the names of diffusers, renamed by hand, give the same weights."""
    name = {"Wan": "WanTransformer3DModel", "Flux": "FluxTransformer2DModel", "SDXL": UNET}[case.split()[0]]
    base: Any = BY_NAME[name].save(tmp_path / "base")
    if case.startswith("Wan"):
        own = kohya(base, ["blocks.0.attn1.to_q", "blocks.1.attn2.to_out.0", "blocks.0.ffn.net.2"], alpha=2.0)
        pairs = (("attn1.to_q", "self_attn.q"), ("attn2.to_out.0", "cross_attn.o"), ("ffn.net.2", "ffn.2"))
        other = {n.replace("lora_down", "lora_A").replace("lora_up", "lora_B"): v for n, v in own.items()}
        other = {n: v for n, v in other.items() if not n.endswith(".alpha")}
        for new, old in pairs:
            other = {n.replace(new, old): v for n, v in other.items()}
        other = {f"diffusion_model.{n}": v for n, v in other.items()}
    elif case.startswith("Flux"):
        own = kohya(base, ["transformer_blocks.0.attn.to_out.0", "single_transformer_blocks.0.proj_out"])
        pairs = (("transformer_blocks.0.attn.to_out.0", "double_blocks_0_img_attn_proj"),)
        pairs = (("single_transformer_blocks.0.proj_out", "single_blocks_0_linear2"), *pairs)
        other = dict(own)
        for new, old in pairs:
            other = {n.replace(new, old): v for n, v in other.items()}
        other = {f"lora_unet_{n}": v for n, v in other.items()}
    else:
        own = kohya(base, [UNET_TARGETS[0]])
        other = underscored(own)
        other = {n.replace("down_blocks_0_attentions_0", "input_blocks_1_1"): v for n, v in other.items()}
        other |= {f"lora_te2_text_model_q_proj.lora_{part}.weight": torch.ones(2, 2) for part in ("up", "down")}
    save_file(own, tmp_path / "own.safetensors")
    save_file(other, tmp_path / "other.safetensors")
    wanted = open_diffusers(tmp_path / "base", lora=tmp_path / "own.safetensors", shape=_shape(name))
    found = open_diffusers(tmp_path / "base", lora=tmp_path / "other.safetensors", shape=_shape(name))
    same(found.module, wanted.module.state_dict())
    assert found.origin["lora"]["left_out"] == ({"lora_te2": 2} if case.startswith("SDXL") else {})
    assert ("converted" in found.origin["lora"]["alpha_from"]) == case.startswith("Flux")
    plain = open_diffusers(tmp_path / "base", shape=_shape(name)).module.state_dict()
    assert any(not torch.equal(plain[key], value) for key, value in found.module.state_dict().items())


def test_a_conversion_that_leaves_something_out_is_refused(tmp_path: Path) -> None:
    """diffusers drops the original names of a file that mixes both kinds."""
    base: Any = BY_NAME[UNET].save(tmp_path / "base")
    own = underscored(kohya(base, UNET_TARGETS[:2]))
    mixed = {n.replace("down_blocks_0_attentions_0", "input_blocks_1_1") if "to_q" in n else n: own[n] for n in own}
    save_file(mixed, tmp_path / "mixed.safetensors")
    with pytest.raises(
        ValueError, match=r"no place for lora_unet_input_blocks_1_1_\S+ \(3 of the adapter's 6 tensors\)"
    ):
        open_diffusers(tmp_path / "base", lora=tmp_path / "mixed.safetensors")


def test_patterns_of_alpha_for_names_of_the_original_code_are_refused(tmp_path: Path) -> None:
    base: Any = BY_NAME["WanTransformer3DModel"].save(tmp_path / "base")
    width = base.blocks[0].attn1.to_q.weight.shape[0]
    state = {"lora_A.weight": torch.ones(2, width), "lora_B.weight": torch.ones(width, 2)}
    header = {"lora_adapter_metadata": json.dumps({"lora_alpha": 4, "alpha_pattern": {"self_attn.q": 8}})}
    named = {f"diffusion_model.blocks.0.self_attn.q.{name}": tensor for name, tensor in state.items()}
    save_file(named, tmp_path / "a.safetensors", metadata=header)
    with pytest.raises(ValueError, match=r"has an alpha_pattern in lora_adapter_metadata .*names of the original code"):
        open_diffusers(tmp_path / "base", lora=tmp_path / "a.safetensors", shape=_shape("WanTransformer3DModel"))


def _shape(name: str) -> Any:
    return BY_NAME[name].shape


@pytest.mark.parametrize(
    ("mark", "kind"),
    [
        ("hada_w1_a", "LoHa"),
        ("lokr_w1", "LoKr"),
        ("dora_scale", "DoRA of kohya's scripts"),
        ("lora_mid.weight", "LoCon with a core tensor"),
        ("oft_blocks", "OFT"),
        ("diff", "full differences of LyCORIS"),
    ],
)
def test_adapters_of_other_kinds_are_refused_by_name(mark: str, kind: str, tmp_path: Path) -> None:
    BY_NAME[DIT].save(tmp_path / "base")
    save_file({f"lora_unet_transformer_blocks_0_attn1_to_q.{mark}": torch.ones(2, 2)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=rf"a.safetensors is {kind}, not a plain LoRA .*merge it with the program"):
        open_diffusers(tmp_path / "base", lora=tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_lora_weights": "pissa"}, "started from 'pissa' .*which changes the base model too"),
        ({"layer_replication": [[0, 2]]}, "sets layer_replication in adapter_config.json, which is not supported"),
        ({"peft_type": "LOHA"}, "is a LOHA adapter according to adapter_config.json; only LORA is merged"),
        ({"use_dora": True}, "has no magnitude of DoRA that fits"),
        ({"lora_alpha": None}, "has no lora_alpha in adapter_config.json"),
    ],
)
def test_settings_that_change_what_the_matrices_mean_are_refused(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    peft_folder(tmp_path)
    config = tmp_path / "adapter/adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    with pytest.raises(ValueError, match=rf"adapter_model.safetensors {message}"):
        open_diffusers(tmp_path / "base", lora=tmp_path / "adapter")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {"transformer.nothing.lora_B.weight": torch.ones(2, 2)}, "no place for transformer.nothing.lora_B"),
        (
            lambda s: {n: v for n, v in s.items() if "to_v" not in n},
            r"has no matrices of to_v, which lora_adapter_meta",
        ),
        (lambda s: dict(list(s.items())[:-1]), r"lacks one of the two matrices of transformer_blocks\.\S+; copy or"),
        (
            lambda s: {n: v[:, :5].contiguous() if "_A" in n else v for n, v in s.items()},
            r"does not fit: \S+ has shape .* pass its",
        ),
        (lambda s: {n: v * float("nan") for n, v in s.items()}, r"makes transformer_blocks\.\S+ not finite"),
        (lambda s: s | {"proj_out.bias": torch.ones(16)}, "has proj_out.bias beside its matrices"),
        (lambda s: {"text_encoder.q.lora_B.weight": torch.ones(2)}, "only text encoders; leave --lora out"),
        (
            lambda s: s | {"pos_embed.lora_A.weight": torch.ones(2, 2), "pos_embed.lora_B.weight": torch.ones(2, 2)},
            "which is a",
        ),
    ],
)
def test_adapters_that_do_not_fit_are_refused(change: Any, message: str, tmp_path: Path) -> None:
    _, file = with_adapter(tmp_path)
    rewrite(file, change)
    with pytest.raises(ValueError, match=message) as caught:
        open_diffusers(tmp_path / "base", lora=file)
    assert "\n" not in str(caught.value)


def test_damaged_and_missing_adapters_are_refused(tmp_path: Path) -> None:
    peft_folder(tmp_path)
    file = tmp_path / "adapter/adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-50])
    with pytest.raises(ValueError, match="cannot be applied to DiTTransformer2DModel"):
        open_diffusers(tmp_path / "base", lora=tmp_path / "adapter")
    file.write_bytes(whole)
    (tmp_path / "adapter/adapter_config.json").unlink()
    with pytest.raises(ValueError, match=r"has no adapter_config.json beside it; put it there"):
        open_diffusers(tmp_path / "base", lora=tmp_path / "adapter")
    with pytest.raises(FileNotFoundError, match="there is no adapter at"):
        open_diffusers(tmp_path / "base", lora=tmp_path / "nothing")
