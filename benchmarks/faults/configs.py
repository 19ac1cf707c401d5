"""Mutated configurations: beside weights, in headers of weights, in --config files, and options themselves.

Every mutation of a good file must be refused in one line or do no harm: no traceback, no hang, no absurd allocation.
"""

# ruff: noqa: E501 (tables of cases)
from __future__ import annotations

import copy
import json
import math
import random
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from outcome import Case, Result, run_cases

HOSTILE: tuple[Any, ...] = (
    *(0, -1, 1, 2, 3, 7, 10**9, 10**12, 2**63, 2**70, 10**30, -(10**12), 0.5, -0.0, 1e308, math.nan, math.inf, -math.inf),
    *(None, True, False, "", "0", "8", "x", "nan", "a" * 5000, "\x1b[31mred\x1b[0m", "\u202egnp.exe", "line\nline", "\0"),
    *([], [1], [0], [[]], [None], [10**9] * 3, list(range(2000)), {}, {"a": 1}, {"": {"": {}}}, "../../etc/passwd"),
    *("/dev/zero", "__import__('os')", "${jndi:ldap://x}", "\ud800"),
)  # fmt: skip


def mutated(tree: Any, rng: random.Random) -> tuple[Any, str]:
    """Returns a tree with one to three changes, and what was changed."""
    tree = json.loads(json.dumps(tree))
    done = [_change(tree, rng) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
    return tree, "; ".join(done)


def _places(tree: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    keys = tree.keys() if isinstance(tree, dict) else range(min(len(tree), 20)) if isinstance(tree, list) else ()
    if len(at) > 40:  # What an earlier change nested deeply is changed near its top.
        return
    for key in list(keys):
        yield (*at, key)
        yield from _places(tree[key], (*at, key))


def _change(tree: Any, rng: random.Random) -> str:
    places = list(_places(tree))
    if not places:
        return "nothing"
    *parents, key = rng.choice(places)
    holder = tree
    for parent in parents:
        holder = holder[parent]
    name = ".".join(map(str, (*parents, key)))
    how = rng.choice(("value", "value", "value", "value", "number", "number", "remove", "add", "deep", "swap"))
    old = holder[key]
    if how == "remove":
        del holder[key]
    elif how == "add" and isinstance(holder, dict):
        holder[rng.choice(("", "x", "\x1b[2J", "a" * 5000, "__class__", "_class_name", "auto_map", "quantization_config"))] = (
            _hostile(rng)
        )  # fmt: skip
    elif how == "deep":
        holder[key] = _deep(old, rng.choice((3, 50, 300)), rng.random() < 0.5)
    elif how == "number" and isinstance(old, (int, float)) and not isinstance(old, bool):
        holder[key] = rng.choice(
            (-old, old + 1, old * 2, old // 2 if isinstance(old, int) else old / 2, old * 10**6, float(old))
        )
    elif how == "swap":
        *others, other = rng.choice(places)
        source = tree
        try:
            for parent in others:
                source = source[parent]
            holder[key] = json.loads(json.dumps(source[other]))
        except (KeyError, IndexError, TypeError):
            holder[key] = None
    else:
        holder[key] = _hostile(rng)
    return f"{how} {name[:60]}"


def _hostile(rng: random.Random) -> Any:
    return copy.deepcopy(rng.choice(HOSTILE))  # Later changes of the tree must not change the choices.


def _deep(value: Any, depth: int, lists: bool) -> Any:
    for _ in range(depth):
        value = [value] if lists else {"a": value}
    return value


def encoded(tree: Any, rng: random.Random) -> tuple[bytes, str]:
    """Returns a tree as JSON, sometimes damaged as a file."""
    text = json.dumps(tree)
    kind = rng.choice(
        ("",) * 14 + ("cut", "UTF-16", "BOM", "junk", "empty", "twice", "deep", "digits", "flip", "latin")
    )
    if kind == "cut":
        return text[: rng.randrange(len(text) + 1)].encode(), kind
    if kind == "UTF-16":
        return text.encode("utf-16"), kind
    if kind == "BOM":
        return text.encode("utf-8-sig"), kind
    if kind == "junk":
        return rng.randbytes(rng.choice((1, 100, 10000))), kind
    if kind == "empty":
        return rng.choice((b"", b"\n", b"null", b"[]", b"3", b'"text"', b"NaN")), kind
    if kind == "twice":
        return (text[:-1] + ", " + text[1:]).encode(), kind
    if kind == "deep":
        return b'{"a":' * 100000 + b"1", kind
    if kind == "digits":
        return text.replace("1", "1" * 6000, 1).encode(), kind
    if kind == "flip":
        raw = bytearray(text.encode())
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        return bytes(raw), kind
    if kind == "latin":
        return text.encode() + b"\xe9\xff", kind
    return text.encode(), kind


# Good folders


class Models:
    """Tiny checkpoints, written once into a folder."""

    def __init__(self, folder: Path) -> None:
        import diffusers
        import torch

        from layerprobe.backbones import SiTConfig, new_sit
        from layerprobe.checkpoints import save_checkpoint

        self.folder = folder
        config = SiTConfig(shape=(1, 8, 8), patch_size=4, hidden_size=8, depth=2, num_heads=2, num_classes=3)
        backbone = new_sit(config, seed=0)
        (folder / "own").mkdir(parents=True)
        save_checkpoint(
            folder / "own" / "model.safetensors",
            backbone,
            backbone.module.state_dict(),
            training={"steps": 3, "label_drop": 0.1},
        )
        (folder / "sit").mkdir()
        torch.save({"ema": backbone.module.state_dict()}, folder / "sit" / "model.pt")
        arguments = {
            "model": "SiT-XL/2",
            "num_heads": 2,
            "hidden_size": 8,
            "depth": 2,
            "num_classes": 3,
            "path_type": "Linear",
        }
        arguments |= {"prediction": "velocity", "patch_size": 4, "class_dropout_prob": 0.1, "in_channels": 1}
        arguments |= {"network": {"num_heads": 2, "layers": [1, 2]}}
        (folder / "sit" / "args.json").write_text(json.dumps(arguments))
        (folder / "sharded").mkdir()
        from safetensors.torch import save_file

        names = list(backbone.module.state_dict())
        halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
        for file, half in halves.items():
            save_file({name: backbone.module.state_dict()[name].clone() for name in half}, folder / "sharded" / file)
        weight_map = {name: file for file, half in halves.items() for name in half}
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (folder / "sharded" / "model.safetensors.index.json").write_text(json.dumps(index))
        dit = diffusers.DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=2, sample_size=4,
            patch_size=2, num_embeds_ada_norm=3, norm_num_groups=2, upcast_attention=False,
        )  # fmt: skip
        self._pipeline("dit", "transformer", dit, diffusers.DDIMScheduler())
        unet = diffusers.UNet2DModel(
            sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(4, 8), norm_num_groups=2,
            down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"), attention_head_dim=4,
        )  # fmt: skip
        self._pipeline("unet", "unet", unet, diffusers.DDPMScheduler())
        sd3 = diffusers.SD3Transformer2DModel(
            sample_size=4, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=4, num_attention_heads=2,
            joint_attention_dim=8, caption_projection_dim=8, pooled_projection_dim=8, out_channels=4, pos_embed_max_size=8,
        )  # fmt: skip
        self._pipeline("sd3", "transformer", sd3, diffusers.FlowMatchEulerDiscreteScheduler())
        self._pipeline("edm", "unet", unet, diffusers.EDMEulerScheduler())
        vae = diffusers.AutoencoderKL(
            in_channels=1,
            out_channels=1,
            block_out_channels=(4,),
            norm_num_groups=2,
            latent_channels=1,
            layers_per_block=1,
        )
        vae.save_pretrained(folder / "vae")
        adapter = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["to_q"], "use_rslora": False}
        (folder / "adapter").mkdir()
        (folder / "adapter" / "adapter_config.json").write_text(json.dumps(adapter))
        q = "base_model.model.transformer_blocks.0.attn1.to_q"
        save_file(
            {f"{q}.lora_A.weight": torch.ones(2, 8), f"{q}.lora_B.weight": torch.ones(8, 2)},
            folder / "adapter" / "adapter_model.safetensors",
        )

    def _pipeline(self, name: str, component: str, model: Any, scheduler: Any) -> None:
        folder = self.folder / name
        model.save_pretrained(folder / component)
        scheduler.save_pretrained(folder / "scheduler")
        index = {
            "_class_name": "DiffusionPipeline",
            "_diffusers_version": "0.30",
            component: ["diffusers", type(model).__name__],
        }
        index |= {"scheduler": ["diffusers", type(scheduler).__name__], "text_encoder": [None, None]}
        (folder / "model_index.json").write_text(json.dumps(index))


# Files to mutate: group, folder of the model, file, arguments of the command.
JSON_FILES = (
    ("arguments", "sit", "args.json", ["inspect", "sit/model.pt"]),
    ("arguments", "sit", "args.json", ["inspect", "sit/model.pt", "--family", "sit", "--num-heads", "2"]),
    (
        "weights index",
        "sharded",
        "model.safetensors.index.json",
        ["inspect", "sharded", "--family", "sit", "--num-heads", "2"],
    ),
    ("model_index.json", "dit", "model_index.json", ["inspect", "dit"]),
    ("model_index.json", "sd3", "model_index.json", ["inspect", "sd3"]),
    ("denoiser", "dit", "transformer/config.json", ["inspect", "dit"]),
    ("denoiser", "sd3", "transformer/config.json", ["inspect", "sd3"]),
    ("denoiser", "unet", "unet/config.json", ["inspect", "unet"]),
    ("denoiser", "unet", "unet/config.json", ["inspect", "unet/unet"]),
    ("scheduler", "dit", "scheduler/scheduler_config.json", ["inspect", "dit"]),
    ("scheduler", "unet", "scheduler/scheduler_config.json", ["inspect", "unet"]),
    ("scheduler", "sd3", "scheduler/scheduler_config.json", ["inspect", "sd3"]),
    ("scheduler", "edm", "scheduler/scheduler_config.json", ["inspect", "edm"]),
    ("adapter", "adapter", "adapter_config.json", ["inspect", "dit", "--lora", "adapter"]),
    ("autoencoder", "vae", "config.json", ["inspect", "--data", "digits", "--vae", "vae"]),
)


def in_json(models: Models, entry: tuple[str, str, str, list[str]], seed: int) -> Case:
    group, name, file, arguments = entry
    rng = random.Random(seed)
    tree, change = mutated(json.loads((models.folder / name / file).read_text()), rng)
    raw, kind = encoded(tree, rng)

    def prepare(folder: Path) -> Sequence[str]:
        for part in {
            name,
            *(a.partition("/")[0] for a in arguments[1:] if (models.folder / a.partition("/")[0]).is_dir()),
        }:
            shutil.copytree(models.folder / part, folder / part)
        (folder / name / file).write_bytes(raw)
        return arguments

    right = ("ok", "refused", "missing") if group == "weights index" else ("ok", "refused")
    return Case(group, f"{name}/{file} seed {seed}: {change} {kind}", prepare, right)


def in_yaml(models: Models, seed: int) -> Case:
    import yaml

    rng = random.Random(seed)
    tree, change = mutated(json.loads((models.folder / "sit" / "args.json").read_text()), rng)
    raw, kind = yaml_of(tree, rng)
    if raw is None:
        try:
            raw = yaml.safe_dump(tree, allow_unicode=False).encode("utf-8", "replace")
        except RecursionError:  # of PyYAML; JSON is YAML too
            raw = json.dumps(tree).encode()

    def prepare(folder: Path) -> Sequence[str]:
        shutil.copytree(models.folder / "sit", folder / "sit")
        (folder / "sit" / "args.json").unlink()
        (folder / "sit" / rng.choice(("hparams.yaml", "config.yaml"))).write_bytes(raw)
        return ["inspect", "sit/model.pt", "--family", "sit", "--num-heads", "2"]

    return Case("YAML beside weights", f"seed {seed}: {change} {kind}", prepare)


YAML = {
    "keys of numbers": b"1: a\n2: b\nnum_heads: 2\n",
    "keys of lists": b"? [1, 2]\n: 3\n",
    "key of null": b"~: 3\nseed: 1\n",
    "key of a date": b"2020-01-01: 3\n",
    "key of a truth": b"yes: 3\nseed: 1\n",
    "bomb": b"a: &a [x,x,x,x,x,x,x,x,x]\n" + b"".join(
        b"%c: &%c [%s]\n" % (98 + i, 98 + i, b",".join([b"*%c" % (97 + i)] * 9)) for i in range(12)
    ),
    "itself": b"a: &a [*a]\n",
    "itself in a dictionary": b"&a\nseed: *a\n",
    "deep": b"seed: " + b"[" * 20000,
    "deep dictionary": b"{a: " * 5000,
    "python object": b"seed: !!python/object/apply:os.system ['touch x']\n",
    "unknown tag": b"seed: !evil 3\n",
    "two documents": b"seed: 1\n---\nseed: 2\n",
    "twice": b"seed: 1\nseed: 2\n",
    "tab": b"\tseed: 1\n",
    "list": b"- 1\n- 2\n",
    "text": b"text",
    "number": b"3",
    "merge": b"<<: 3\n",
    "merge of itself": b"a: &a\n  <<: *a\n",
    "NUL": b"seed: \0\n",
    "UTF-16": "seed: 1\n".encode("utf-16"),
    "BOM": "seed: 1\n".encode("utf-8-sig"),
    "junk": bytes(range(256)),
    "sexagesimal": b"seed: 190:20:30\n",
    "many digits": b"seed: " + b"9" * 6000 + b"\n",
    "bad date": b"seed: 2020-99-99\n",
    "binary": b"seed: !!binary '%%%'\n",
    "set": b"seed: !!set {a, b}\n",
    "float": b"seed: 1.5\n",
    "infinite": b"seed: .inf\n",
    "escape": b'"\\e[31mx": 3\n',
    "alias that is not there": b"seed: *nothing\n",
    "empty": b"",
}  # fmt: skip


def yaml_of(tree: Any, rng: random.Random) -> tuple[bytes | None, str]:
    kind = rng.choice([*YAML, *[""] * len(YAML)])
    return YAML.get(kind), kind


def in_header(models: Models, seed: int) -> Case:
    """Mutates the record in the header of layerprobe's own file, or the header itself."""
    rng = random.Random(seed)
    raw = (models.folder / "own" / "model.safetensors").read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    head, body = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    if rng.random() < 0.6:
        record, change = mutated(json.loads(head["__metadata__"]["layerprobe"]), rng)
        text, kind = encoded(record, rng)
        head["__metadata__"]["layerprobe"] = text.decode("utf-8", "replace")
        new, group = json.dumps(head).encode(), "record of own checkpoints"
    else:
        head, change = mutated(head, rng)
        new, kind = encoded(head, rng)
        group = "header of safetensors"
    new += b" " * (-len(new) % 8)
    length = len(new) if rng.random() < 0.95 else rng.choice((0, 2**40, 2**63, len(new) - 1, len(new) + 9))
    content = struct.pack("<Q", length) + new + body

    def prepare(folder: Path) -> Sequence[str]:
        (folder / "model.safetensors").write_bytes(content)
        return ["inspect", "model.safetensors"]

    return Case(group, f"seed {seed}: {change} {kind}", prepare)


PROBE = ["probe", "digits", "--data", "digits", "--out", "run", "--dry-run"]
TRAIN = ["train", "--data", "digits", "--out", "run", "--steps", "2", "--dry-run"]
COMMANDS = {"probe": PROBE, "train": TRAIN, "extract": ["extract", *PROBE[1:]]}


def options_of(command: str) -> list[str]:
    """The flags of a command that take a value."""
    import typer

    from layerprobe.cli.main import app

    parameters = typer.main.get_command(app).commands[command].params  # type: ignore[attr-defined]
    left = ("--out", "--config", "--model", "--data", "--help", "--dry-run", "--analysis")
    flags = [p.opts[0] for p in parameters if not getattr(p, "is_flag", False)]
    return [flag for flag in flags if flag.startswith("--") and flag not in left]


NUMBERS = (
    "0",
    "-1",
    "1",
    "3",
    "1000000000",
    "999999999999999999999",
    "-5",
    "nan",
    "inf",
    "-inf",
    "1e308",
    "1e-320",
    "0.5",
    "x",
    "",
)
TEXTS = (
    "",
    "x",
    "\x1b[31mred",
    "\u202eabc",
    "a" * 5000,
    "1,2",
    "nan,inf",
    ",",
    "0.1,0.1",
    "1:2",
    "blocks.*",
    "../../x",
    "(((",
    "\n",
    "é",
)


def with_options(command: str, seed: int) -> Case:
    rng = random.Random(seed)
    flags = options_of(command)
    given: list[str] = []
    for flag in rng.sample(flags, rng.choice((1, 1, 2, 3))):
        given += [flag, rng.choice(NUMBERS if rng.random() < 0.6 else TEXTS)]
    name = f"{command} {' '.join(ascii(g)[1:-1][:40] for g in given)}"
    return Case("options", name, lambda folder: [*COMMANDS[command], *given])


def with_config(command: str, seed: int) -> Case:
    """A --config file, in TOML or YAML."""
    import yaml

    rng = random.Random(seed)
    flags = [flag.removeprefix("--") for flag in options_of(command)]
    values: dict[Any, Any] = {flag: _hostile(rng) for flag in rng.sample(flags, rng.choice((1, 1, 2)))}
    if rng.random() < 0.1:
        values[rng.choice(("", "x", "\x1b[2J", "config", "help", "dry-run", "a" * 5000))] = 1
    change = ", ".join(ascii(f"{key}={value}")[1:-1][:50] for key, value in values.items())
    special, kind = yaml_of(values, rng) if rng.random() < 0.4 else (None, "")
    if special is not None:
        suffix, raw = rng.choice((".yaml", ".toml")), special
    elif rng.random() < 0.5:
        suffix, raw = ".yaml", yaml.safe_dump(values).encode("utf-8", "replace")
    else:
        suffix, raw = ".toml", toml(values).encode("utf-8", "replace")
        if rng.random() < 0.1:
            raw, kind = rng.choice(
                ((raw * 2, "twice"), (raw[:-3], "cut"), (b"a = " + b"[" * 20000, "deep"), (raw + b"\xff", "latin"))
            )

    def prepare(folder: Path) -> Sequence[str]:
        (folder / f"c{suffix}").write_bytes(raw)
        return [*COMMANDS[command], "--config", f"c{suffix}"]

    return Case("--config", f"{command} {suffix} seed {seed}: {kind or change}", prepare)


def toml(values: dict[Any, Any]) -> str:
    def text(value: Any) -> str:
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, (int, float)):
            return str(value)
        if isinstance(value, list):
            return f"[{', '.join(map(text, value))}]"
        if isinstance(value, dict):
            return "{" + ", ".join(f"{json.dumps(str(k))} = {text(v)}" for k, v in value.items()) + "}"
        return json.dumps(value if value is not None else "none")

    return "".join(f"{json.dumps(str(key))} = {text(value)}\n" for key, value in values.items())


def cases(models: Models, mutations: int, seed: int) -> Iterator[Case]:
    rng = random.Random(seed)
    makers: list[Callable[[int], Case]] = [partial(in_json, models, entry) for entry in JSON_FILES]
    makers += [partial(in_header, models)] * 3 + [partial(in_yaml, models)] * 2
    makers += [partial(maker, command) for maker in (with_options, with_config) for command in COMMANDS] * 2
    for i in range(mutations):
        yield makers[i % len(makers)](rng.randrange(10**9))


def run(count: int, seed: int) -> Iterator[Result]:
    """Runs this many mutations."""
    with tempfile.TemporaryDirectory() as folder:
        yield from run_cases(cases(Models(Path(folder)), count, seed), batch=40)
