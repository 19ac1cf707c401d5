from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny_mdm import ACTIONS, ARGS, DEPTH, FEATURES, FRAMES, TEXT, WIDTH, opened, state_dict, table
from torch import Tensor

from layerprobe.backbones.base import layer_shapes
from layerprobe.backbones.mdm import build_mdm, recognize_mdm
from layerprobe.capture import capture
from layerprobe.noise.schedules import DDPM, schedule_from_name


def reference(tensors: dict[str, Tensor], x: Tensor, t: Tensor, extra: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The published network, one motion at a time in float64: x_0 and what each block gives for the frames.

    `extra` is what the condition adds to the first token, shape (B, D).
    """
    w = {name: tensor.double() for name, tensor in tensors.items()}

    def linear(name: str, v: Tensor) -> Tensor:
        return v @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name: str, v: Tensor) -> Tensor:
        v = (v - v.mean(-1, keepdim=True)) / (v.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
        return v * w[f"{name}.weight"] + w[f"{name}.bias"]

    places, heads = table(1000), ARGS["num_heads"]
    assert isinstance(heads, int)
    motions, blocks = [], []
    for motion, time, added in zip(x.double(), t.tolist(), extra.double(), strict=True):
        first = linear("embed_timestep.time_embed.0", places[time])
        first = linear("embed_timestep.time_embed.2", first * first.sigmoid()) + added
        v = torch.cat([first[None], linear("input_process.poseEmbedding", motion.T)]) + places[: FRAMES + 1]
        outputs = []
        for i in range(DEPTH):
            name = f"seqTransEncoder.layers.{i}"
            qkv = v @ w[f"{name}.self_attn.in_proj_weight"].T + w[f"{name}.self_attn.in_proj_bias"]
            mixed = []
            for q, k, value in zip(*(part.chunk(heads, -1) for part in qkv.chunk(3, -1)), strict=True):
                mixed.append((q @ k.T / math.sqrt(WIDTH // heads)).softmax(-1) @ value)
            v = norm(f"{name}.norm1", v + linear(f"{name}.self_attn.out_proj", torch.cat(mixed, -1)))
            hidden = linear(f"{name}.linear1", v)
            hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
            v = norm(f"{name}.norm2", v + linear(f"{name}.linear2", hidden))
            outputs.append(v[1:])
        motions.append(linear("output_process.poseFinal", v[1:]).T)
        blocks.append(torch.stack(outputs))
    return torch.stack(motions), list(torch.stack(blocks, 1))


def motions(n: int = 3) -> Tensor:
    return torch.randn(n, FEATURES, FRAMES, generator=torch.Generator().manual_seed(1))


CONDITIONS = {
    "no text": ("text", None),
    "text": ("text", torch.randn(3, TEXT, generator=torch.Generator().manual_seed(2))),
    "no action": ("action", None),
    "action": ("action", torch.tensor([3, 0, 1])),
    "unconditional": ("none", None),
}


@pytest.mark.parametrize("level", [0.2, 0.8])
@pytest.mark.parametrize(("kind", "condition"), CONDITIONS.values(), ids=CONDITIONS)
def test_output_and_blocks_equal_the_published_network(kind: str, condition: Tensor | None, level: float) -> None:
    tensors, x = state_dict(kind), motions()
    backbone, levels = opened(tensors), torch.full((3,), level)
    extra = torch.zeros(3, WIDTH)
    if kind == "text":  # "No text" is the zero vector, and the bias stays.
        text = torch.zeros(3, TEXT) if condition is None else condition
        extra = text @ tensors["embed_text.weight"].T + tensors["embed_text.bias"]
    elif condition is not None:
        extra = tensors["embed_action.action_embedding"][condition]
    expected, blocks = reference(tensors, x, backbone.schedule.native_time(levels), extra)
    with torch.no_grad(), capture(backbone.module, backbone.layers, tokens=backbone.tokens) as outputs:
        output = backbone.predict(x, levels, condition)
    # Float32 against float64: the output is of order 1.
    assert torch.allclose(output.double(), expected, atol=1e-5, rtol=0)
    assert tuple(outputs) == tuple(f"seqTransEncoder.layers.{i}" for i in range(DEPTH))
    for tokens, block in zip(outputs.values(), blocks, strict=True):
        assert tokens.shape == (3, FRAMES, WIDTH)
        assert torch.allclose(tokens.double(), block, atol=1e-5, rtol=0)


def test_the_condition_and_the_time_reach_every_frame() -> None:
    backbone, x = opened(state_dict("action")), motions(1).expand(2, -1, -1)
    with torch.no_grad():
        by_action = backbone(x, torch.full((2,), 0.5), torch.tensor([0, 1]))
        by_time = backbone.predict(x, torch.tensor([0.3, 0.6]))
    for output in (by_action, by_time):
        assert float((output[0] - output[1]).abs().amax(0).min()) > 1e-3


@pytest.mark.parametrize(
    "layer",
    ["input_process.poseEmbedding", "output_process.poseFinal", "output_process.poseFinal:input"]
    + [f"seqTransEncoder.layers.1{part}" for part in ("", ":input", ".self_attn", ".linear2", ".norm1")],
)
def test_tokens_are_the_frames_of_one_motion(layer: str) -> None:
    """Batch first, without the condition's token: what the network gives sequence first."""
    backbone, x = opened(state_dict()), motions()

    def tokens(x: Tensor) -> Tensor:
        with torch.no_grad(), capture(backbone.module, [layer], tokens=backbone.tokens) as outputs:
            backbone.predict(x, torch.full((len(x),), 0.4))
        return outputs[layer]

    together = tokens(x)
    assert together.shape[:2] == (3, FRAMES)
    alone = torch.cat([tokens(x[i : i + 1]) for i in range(3)])
    assert torch.allclose(together, alone, atol=1e-5, rtol=0)
    assert layer_shapes(backbone, [layer])[layer][0] == FRAMES


def test_a_frame_stays_at_its_place() -> None:
    backbone, x = opened(state_dict()), motions(1)
    changed = x.clone()
    changed[..., 2] += 1
    layer = "input_process.poseEmbedding"
    found = []
    for motion in (x, changed):
        with torch.no_grad(), capture(backbone.module, [layer], tokens=backbone.tokens) as outputs:
            backbone.predict(motion, torch.full((1,), 0.4))
        found.append(outputs[layer][0])
    different = (found[0] - found[1]).abs().amax(1)
    assert (different > 1e-3).tolist() == [frame == 2 for frame in range(FRAMES)]


def test_it_is_known_by_its_names() -> None:
    assert recognize_mdm(state_dict())
    assert recognize_mdm({n: t for n, t in state_dict().items() if not n.startswith("seqTransEncoder")})
    assert not recognize_mdm({"x_embedder.proj.weight": torch.zeros(1)})


def test_the_text_encoder_in_the_file_is_named_as_unused() -> None:
    surplus = {"clip_model.logit_scale": torch.ones(()), "embed_target_cond.mlp.0.weight": torch.ones(2, 2)}
    backbone, wanted, unused = build_mdm(state_dict() | surplus, args=ARGS, shape=(FEATURES, FRAMES))
    assert unused == tuple(surplus)
    assert wanted.keys() == backbone.module.state_dict().keys()
    # What is not known is left in, so that whoever loads the file meets it.
    strange = build_mdm(state_dict() | {"strange": torch.ones(1)}, args=ARGS, shape=(FEATURES, FRAMES))[1]
    assert "strange" in strange


def test_positions_that_a_file_lacks_are_the_published_ones() -> None:
    tensors = {name: tensor for name, tensor in state_dict().items() if not name.endswith("pe")}
    with torch.device("meta"):  # as a caller may that builds networks without weights
        backbone, wanted, _ = build_mdm(tensors, args=ARGS, shape=(FEATURES, FRAMES))
    assert int(backbone.schedule.native_time(torch.tensor(0.5))) == 495
    # Float32 sines of angles up to 4999.
    assert torch.allclose(wanted["sequence_pos_encoder.pe"][:, 0].double(), table(5000), atol=1e-3, rtol=0)


def test_what_the_file_and_the_arguments_tell() -> None:
    backbone = opened(state_dict(), shape=None)
    assert (backbone.shape, backbone.num_classes, backbone.prediction) == ((FEATURES, 196), 0, "x0")
    assert int(backbone.schedule.native_time(torch.tensor(0.5))) == 495  # of 1000 cosine steps, where log-SNR is 0
    assert opened(state_dict("action"), num_classes=ACTIONS).num_classes == ACTIONS
    never = {"cond_mask_prob": 0.0}
    assert (
        opened(state_dict(), args=ARGS | never).assumptions[0].startswith("the network was never trained without a con")
    )
    assert opened(state_dict("none"), args=ARGS | never).assumptions == ()
    assert opened(state_dict(), args=ARGS | {"cond_mask_prob": 0.1}).assumptions == ()
    silent = {name: value for name, value in ARGS.items() if name != "cond_mask_prob"}
    assert (
        opened(state_dict(), args=silent).assumptions[0].startswith("no file states that the network was trained with")
    )


def test_the_official_heads_where_the_arguments_say_nothing() -> None:
    backbone = opened(state_dict(), args={key: value for key, value in ARGS.items() if key != "num_heads"})
    assert backbone.module.config.num_heads == 4  # type: ignore[union-attr]
    assert "4 as in the official code; pass --num-heads" in backbone.assumptions[0]
    assert opened(state_dict(), num_heads=2).module.config.num_heads == 2  # type: ignore[union-attr]


@pytest.mark.parametrize("steps", [1000, 50])
def test_the_schedules_of_the_training(steps: int) -> None:
    cosine = opened(state_dict(), args=ARGS | {"diffusion_steps": steps}).schedule
    assert isinstance(cosine, DDPM)
    assert len(cosine.betas) == steps
    assert torch.equal(cosine.betas, DDPM.from_name("cosine", steps).betas)
    linear = opened(state_dict(), args=ARGS | {"diffusion_steps": steps, "noise_schedule": "linear"}).schedule
    assert isinstance(linear, DDPM)
    # Stretched so that fewer steps end as noisy: 0.1 ... 20 divided by the number of steps.
    assert linear.betas[[0, -1]].tolist() == pytest.approx([0.1 / steps, 20 / steps])
    for schedule in ("ddpm-linear", schedule_from_name("ddpm-linear")):
        given = opened(state_dict(), args={}, schedule=schedule, prediction="eps", num_heads=2)
        assert (given.schedule.name, given.prediction) == ("ddpm-linear", "eps")


def without(prefix: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state_dict().items() if not name.startswith(prefix)}


BAD: dict[str, tuple[dict[str, Tensor], dict[str, Any], str]] = {
    "decoder": (
        without("seqTransEncoder"),
        {"args": ARGS | {"arch": "trans_dec"}},
        "arch is trans_dec.*only trans_enc",
    ),
    "prefix": (state_dict(), {"args": ARGS | {"context_len": 20}}, "a prefix of the motion"),
    "velocities": (
        state_dict() | {"input_process.velEmbedding.weight": torch.zeros(WIDTH, FEATURES)},
        {},
        "also takes velocities",
    ),
    "no arguments": (state_dict(), {"args": {}, "num_heads": 2}, "put the training's args.json beside it"),
    "no frames": (
        state_dict(),
        {"args": ARGS | {"dataset": "mine"}, "shape": None},
        "pass it in --shape, such as 5,196",
    ),
    "other features": (state_dict(), {"shape": (6, 7)}, "takes 5 features per frame, not --shape 6,7"),
    "an image": (state_dict(), {"shape": (5, 7, 7)}, "pass --shape 5,FRAMES"),
    "too long": (state_dict(), {"shape": (5, 1000)}, "1000 frames are more than the 999"),
    "no frame": (state_dict(), {"shape": (5, 0)}, "must be at least 1"),
    "classes": (state_dict("action"), {"num_classes": 3}, "has 4 actions, not 3"),
    "heads": (state_dict(), {"args": ARGS | {"num_heads": 3}}, "does not divide into 3 heads; pass --num-heads"),
    "other heads": (state_dict(), {"num_heads": 1}, "args.json has num_heads = 2, not 1; leave --num-heads out"),
    "another width": (
        state_dict(),
        {"args": ARGS | {"latent_dim": 512}},
        "have latent_dim = 512, but the weights show",
    ),
    "arguments": (
        state_dict(),
        {"args": ARGS | {"num_heads": "two"}},
        "num_heads = 'two', which is not a valid number",
    ),
    "time": (state_dict(), {"schedule": schedule_from_name("flow")}, "last time of linear is 1; pass the --schedule"),
    "steps": (state_dict(), {"args": ARGS | {"diffusion_steps": 2000}}, "a table of 1000 times, .* is 1999"),
    "damaged": (state_dict() | {"embed_text.weight": torch.zeros(3)}, {}, r"embed_text.weight has shape \(3,\)"),
}


@pytest.mark.parametrize(("tensors", "options", "message"), BAD.values(), ids=BAD)
def test_what_cannot_be_opened_is_said(tensors: dict[str, Tensor], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        opened(tensors, **options)
    assert "\n" not in str(error.value)
