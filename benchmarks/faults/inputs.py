"""Hostile and damaged data sets: every sample is read, and what is damaged must be refused in one line.

The named cases are lies, traps and bombs that somebody thought of; the random ones cut or change bytes of good files.
A cut file must be refused, a changed one must be refused or read.
"""

# ruff: noqa: E501 (tables of cases)
from __future__ import annotations

import io
import json
import os
import random
import socket
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from outcome import WRONG_CODE, Case, Result, run_cases

N = 24  # items of a data set
Damage = Callable[[Path], Sequence[str] | None]  # makes a data set in a folder; returns options beside --data


# Good data sets, each of N items of two classes.


def picture(seed: int, kind: str = "png", size: int = 8) -> bytes:
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 255, (size, size, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def header(shape: object, dtype: str = "<f4", body: bytes = b"\0" * 64, fortran: object = False) -> bytes:
    """A .npy file whose header says what is passed."""
    text = repr({"descr": dtype, "fortran_order": fortran, "shape": shape}).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + body


def wav(seed: int, frames: int = 3000) -> bytes:
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, np.random.default_rng(seed).uniform(-0.5, 0.5, frames), 8000, format="WAV")
    return file.getvalue()


def sound(seed: int, kind: str) -> bytes:
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, np.random.default_rng(seed).uniform(-0.5, 0.5, 3000), 8000, format=kind)
    return file.getvalue()


def clip(seed: int) -> bytes:
    return npy(np.random.default_rng(seed).normal(size=(12, 5, 3)).astype(np.float32))


BVH = """HIERARCHY
ROOT hip
{{
  OFFSET 0 0 0
  CHANNELS 6 Xposition Yposition Zposition Zrotation Xrotation Yrotation
  JOINT leg
  {{
    OFFSET 0 -1 0
    CHANNELS 3 Zrotation Xrotation Yrotation
    End Site
    {{
      OFFSET 0 -1 0
    }}
  }}
}}
MOTION
Frames: {frames}
Frame Time: 0.03
{values}
"""


def bvh(seed: int, frames: int = 6) -> bytes:
    rows = np.random.default_rng(seed).normal(size=(6, 9)).round(3)
    return BVH.format(frames=frames, values="\n".join(" ".join(map(str, row)) for row in rows)).encode()


def gif(seed: int) -> bytes:
    from PIL import Image

    rng = np.random.default_rng(seed)
    frames = [Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)) for _ in range(5)]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    return file.getvalue()


def film(seed: int, kind: str) -> bytes:
    import av

    file = io.BytesIO()
    with av.open(file, "w", format=kind) as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 16
        for pixels in np.random.default_rng(seed).integers(0, 255, (8, 16, 16, 3), np.uint8):
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels)):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return file.getvalue()


def tree(folder: Path, ending: str, make: Callable[[int], bytes]) -> None:
    for i in range(N):
        file = folder / "ab"[i % 2] / f"{i:03}.{ending}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(make(i))


def images(folder: Path) -> None:
    tree(folder, "png", picture)


def table(folder: Path, cells: list[dict[str, object]] | None = None) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    cells = cells or [{"bytes": picture(i), "path": f"{i}.png"} for i in range(N)]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    columns = {"image": pa.array(cells, kind), "label": pa.array([i % 2 for i in range(len(cells))])}
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), folder / "train.parquet", row_group_size=8)
    return folder / "train.parquet"


def arrow(folder: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    content = pq.read_table(table(folder))
    (folder / "train.parquet").unlink()
    with pa.OSFile(str(folder / "train.arrow"), "wb") as sink, pa.ipc.new_stream(sink, content.schema) as writer:
        writer.write_table(content, max_chunksize=6)
    return folder / "train.arrow"


def archive(folder: Path, mode: str = "w", more: Sequence[tuple[tarfile.TarInfo, bytes]] = ()) -> Path:
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / "train.tar", mode) as tar:
        for i in range(N):
            for ending, content in (("png", picture(i)), ("cls", str(i % 2).encode())):
                member = tarfile.TarInfo(f"{i:03}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        for member, content in more:
            tar.addfile(member, io.BytesIO(content) if content else None)
    return folder / "train.tar"


def saved(folder: Path) -> Path:
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    Dataset.from_dict(
        {"image": [{"bytes": picture(i), "path": None} for i in range(N)], "label": [0, 1] * (N // 2)}
    ).save_to_disk(str(folder))
    return folder / "data-00000-of-00001.arrow"


def moments(folder: Path) -> Path:
    """Latents as REPA writes them."""
    (folder / "vae-sd" / "00").mkdir(parents=True)
    labels = []
    for i in range(N):
        (folder / "vae-sd" / f"00/{i:03}.npy").write_bytes(npy(np.random.default_rng(i).normal(size=(8, 4, 4))))
        labels.append([f"00/{i:03}.npy", i % 2])
    (folder / "vae-sd" / "dataset.json").write_text(json.dumps({"labels": labels}))
    return folder / "vae-sd" / "00" / "000.npy"


def shards(folder: Path, **tensors: object) -> Path:
    """Latents as LightningDiT writes them."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    content = {"latents": torch.randn(N, 4, 4, 4), "labels": torch.arange(N) % 2} | tensors
    save_file(content, folder / "latents_rank00_shard000.safetensors")
    torch.save({"mean": torch.zeros(1, 4, 1, 1), "std": torch.ones(1, 4, 1, 1)}, folder / "latents_stats.pt")
    return folder / "latents_rank00_shard000.safetensors"


def pairs(folder: Path) -> Path:
    """Latents as fast-DiT writes them."""
    for kind in ("features", "labels"):
        (folder / f"x_{kind}").mkdir(parents=True)
    for i in range(N):
        (folder / "x_features" / f"{i}.npy").write_bytes(npy(np.random.default_rng(i).normal(size=(1, 4, 4, 4))))
        (folder / "x_labels" / f"{i}.npy").write_bytes(npy(np.array([i % 2])))
    return folder / "x_features" / "0.npy"


def first_of(make: Callable[[Path], object], name: str) -> Callable[[Path], Path]:
    def made(folder: Path) -> Path:
        make(folder)
        return folder / name

    return made


# A data set, and the file in it that is damaged, with the options beside --data.
GOOD: dict[str, tuple[Callable[[Path], Path], tuple[str, ...]]] = {
    "png": (first_of(images, "a/000.png"), ()),
    **{
        kind: (first_of(partial(tree, ending=kind, make=partial(picture, kind=kind)), f"a/000.{kind}"), ())
        for kind in ("jpeg", "webp", "bmp", "gif", "tiff", "ppm")
    },
    "npy images": (
        first_of(partial(tree, ending="npy", make=lambda i: npy(np.full((8, 8, 3), i, np.uint8))), "a/000.npy"),
        (),
    ),
    "wav": (first_of(partial(tree, ending="wav", make=wav), "a/000.wav"), ()),
    "flac": (first_of(partial(tree, ending="flac", make=partial(sound, kind="FLAC")), "a/000.flac"), ()),
    "ogg": (first_of(partial(tree, ending="ogg", make=partial(sound, kind="OGG")), "a/000.ogg"), ()),
    "mp3": (first_of(partial(tree, ending="mp3", make=partial(sound, kind="MP3")), "a/000.mp3"), ()),
    "npy motion": (first_of(partial(tree, ending="npy", make=clip), "a/000.npy"), ()),
    "bvh": (first_of(partial(tree, ending="bvh", make=bvh), "a/000.bvh"), ()),
    "gif video": (first_of(partial(tree, ending="gif", make=gif), "a/000.gif"), ("size=8", "modality=video")),
    "mp4": (first_of(partial(tree, ending="mp4", make=partial(film, kind="mp4")), "a/000.mp4"), ("size=8",)),
    "mkv": (first_of(partial(tree, ending="mkv", make=partial(film, kind="matroska")), "a/000.mkv"), ("size=8",)),
    "avi": (first_of(partial(tree, ending="avi", make=partial(film, kind="avi")), "a/000.avi"), ("size=8",)),
    "parquet": (table, ()),
    "arrow": (arrow, ()),
    "tar": (archive, ()),
    "tar.gz as tar": (partial(archive, mode="w:gz"), ()),
    "saved": (saved, ()),
    "latents repa": (moments, ()),
    "latents lightningdit": (shards, ()),
    "latents fast-dit": (pairs, ()),
}


# Named cases


def replaced(good: str, content: bytes | Callable[[], bytes]) -> Damage:
    def make(folder: Path) -> Sequence[str]:
        build, options = GOOD[good]
        build(folder).write_bytes(content() if callable(content) else content)
        return options

    return make


def with_node(good: str, node: Callable[[Path], object]) -> Damage:
    """Replaces a file by a device, a pipe, a link, a folder."""

    def make(folder: Path) -> Sequence[str]:
        build, options = GOOD[good]
        file = build(folder)
        file.unlink()
        node(file)
        return options

    return make


def outside_file(file: Path, name: str = "x.bin") -> Path:
    """A good copy of the item outside of the data set."""
    target = file.parents[2] / "outside" / name
    target.parent.mkdir(exist_ok=True)
    target.write_bytes(picture(0) if file.suffix == ".png" else wav(0))
    return target


def bind(file: Path) -> None:
    os.chdir(file.parent)  # the path of a socket is short
    socket.socket(socket.AF_UNIX).bind(file.name)


def sparse(size: int, file: Path) -> None:
    with file.open("wb") as stream:
        stream.truncate(size)


NODES: dict[str, Callable[[Path], object]] = {
    "link to /dev/zero": lambda file: file.symlink_to("/dev/zero"),
    "link to /dev/stdin": lambda file: file.symlink_to("/dev/stdin"),
    "link to /etc/passwd": lambda file: file.symlink_to("/etc/passwd"),
    "link out of the folder": lambda file: file.symlink_to(outside_file(file)),
    "relative link out of the folder": lambda file: file.symlink_to(os.path.relpath(outside_file(file), file.parent)),
    "dangling link": lambda file: file.symlink_to("nowhere"),
    "link to itself": lambda file: file.symlink_to(file.name),
    "pipe": os.mkfifo,
    "socket": bind,
    "folder with that name": lambda file: (file.mkdir(), (file / "inner.txt").write_text("x")),
    "a terabyte of zeros": partial(sparse, 2**40),
    "no permission": lambda file: (file.write_bytes(b"x"), file.chmod(0)),
}


def bomb_png(side: int) -> bytes:
    import zlib

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    pixels = zlib.compress(b"\0" * (2**24), 9)
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def bomb_zip(name: str = "arr.npy", size: int = 2**31) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as zipped, zipped.open(name, "w", force_zip64=True) as member:
        member.write(header((size // 4,), body=b""))
        for _ in range(size // 2**24):
            member.write(b"\0" * 2**24)
    return file.getvalue()


def paths(*given: str) -> Damage:
    def make(folder: Path) -> None:
        cells: list[dict[str, object]] = [{"bytes": picture(i), "path": f"{i}.png"} for i in range(N)]
        outside = folder.parent / "outside.png"
        outside.write_bytes(picture(0))
        for row, path in enumerate(given):
            cells[row] = {"bytes": None, "path": path.replace("OUTSIDE", str(outside))}
        table(folder, cells)

    return make


def sound_paths(path: str) -> Damage:
    def make(folder: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        folder.mkdir()
        (folder.parent / "outside.wav").write_bytes(wav(0))
        for i in range(N):
            (folder / f"{i}.wav").write_bytes(wav(i))
        cells = [{"bytes": None, "path": f"{folder}/{i}.wav"} for i in range(N)]
        cells[0] = {"bytes": None, "path": path.replace("OUTSIDE", str(folder.parent / "outside.wav"))}
        kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        pq.write_table(pa.table({"audio": pa.array(cells, kind)}), folder / "train.parquet")
        for i in range(N):
            (folder / f"{i}.wav").rename(folder / f"{i}.bin")

    return make


def sidecar(name: str, content: str | bytes) -> Damage:
    def make(folder: Path) -> None:
        images(folder)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return make


def member(name: str, content: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def in_archive(*more: tuple[tarfile.TarInfo, bytes]) -> Damage:
    def make(folder: Path) -> None:
        archive(folder, more=more)

    return make


def lying_wav(**fields: int) -> bytes:
    values = {"riff": 36 + 8000, "format": 1, "channels": 1, "rate": 8000, "bits": 16, "data": 8000} | fields
    block = values["channels"] * values["bits"] // 8
    return (
        b"RIFF" + struct.pack("<I", values["riff"]) + b"WAVEfmt " + struct.pack("<IHHIIHH", 16, values["format"],
        values["channels"], values["rate"], values["rate"] * block & 0xFFFFFFFF, block & 0xFFFF, values["bits"])
        + b"data" + struct.pack("<I", values["data"]) + bytes(8000)
    )  # fmt: skip


def with_shards(**tensors: Callable[[], object]) -> Damage:
    def make(folder: Path) -> None:
        shards(folder, **{name: tensor() for name, tensor in tensors.items()})

    return make


def with_json(content: str | bytes) -> Damage:
    def make(folder: Path) -> None:
        moments(folder)
        raw = content.encode() if isinstance(content, str) else content
        (folder / "vae-sd" / "dataset.json").write_bytes(raw)

    return make


def changed_state(name: str, content: str) -> Damage:
    def make(folder: Path) -> None:
        saved(folder)
        (folder / name).write_text(content)

    return make


def named_labels(label: int | float) -> Damage:
    def make(folder: Path) -> None:
        moments(folder)
        file = folder / "vae-sd" / "dataset.json"
        labels = json.loads(file.read_text())["labels"]
        labels[0][1] = label
        file.write_text(json.dumps({"labels": labels}))

    return make


def long_joint_list(folder: Path) -> None:
    tree(folder, "bvh", bvh)
    joints = "".join(f"JOINT j{i}\n{{\nOFFSET 0 0 0\nCHANNELS 0\n" for i in range(20000)) + "}" * 20000
    text = f"HIERARCHY\nROOT r\n{{\nOFFSET 0 0 0\nCHANNELS 1 Xrotation\n{joints}\n}}\nMOTION\nFrames: 20000\nFrame Time: 1\n"
    (folder / "a" / "000.bvh").write_text(text + "1 " * 20000)


def named() -> Iterator[tuple[str, str, Damage]]:
    """The cases that must be refused: group, name, damage."""
    for good in ("png", "wav", "npy motion", "bvh", "parquet", "tar", "latents repa"):
        for name, node in NODES.items():
            if name == "folder with that name" and good != "parquet":
                continue  # told as an empty folder
            if name == "no permission" and os.getuid() == 0:
                continue  # root may read it
            if "out of the folder" in name and good not in ("png", "wav"):
                continue
            yield "nodes", f"{good}: {name}", with_node(good, node)
    for good in GOOD:
        yield "empty", f"{good}: zero bytes", replaced(good, b"")
        yield "junk", f"{good}: random bytes", replaced(good, np.random.default_rng(0).bytes(5000))
    for name, content in {
        "huge shape": header((10**12, 3)),
        "huge float shape": header((10**6, 10**6, 10**6), "<f8"),
        "shape beyond 64 bits": header((2**70, 3)),
        "negative shape": header((-4, 15)),
        "float shape": header((4.0, 15)),
        "shape of text": header(("4", 15)),
        "fewer values than there are": header((2, 3)),
        "object type": header((4,), "|O"),
        "record type": header((4,), [("a", "<f4"), ("b", "<f4")]),  # type: ignore[arg-type]
        "text type": header((4,), "<U4"),
        "time type": header((4, 2), "<M8[ns]"),
        "complex type": header((4, 2), "<c8"),
        "unknown type": header((4, 2), "<q77"),
        "header that is no dictionary": b"\x93NUMPY\x01\x00\x05\x00(1,2)",
        "deep header": b"\x93NUMPY\x01\x00" + struct.pack("<H", 9000) + b"(" * 9000,
        "header of four gigabytes": b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**32 - 1) + b"{",
        "version 9": b"\x93NUMPY\x09\x00\x00\x00",
        "NaN": npy(np.full((12, 5, 3), np.nan, np.float32)),
        "infinite": npy(np.full((12, 5, 3), np.inf, np.float32)),
        "no frames": npy(np.zeros((0, 15), np.float32)),
        "beyond float32": npy(np.full((12, 5, 3), 1e300)),
    }.items():
        yield "npy", f"motion: {name}", replaced("npy motion", content)
        if name not in ("no frames",):
            yield "npy", f"latents: {name}", replaced("latents repa", content)
            yield "npy", f"images: {name}", replaced("npy images", content)
    yield "bombs", "npz of 2 GB in 2 MB", lambda folder: _npz(folder, bomb_zip())
    yield "bombs", "png of 60000 x 60000", replaced("png", lambda: bomb_png(60000))
    yield "bombs", "png of 12000 x 12000", replaced("png", lambda: bomb_png(12000))
    yield "bombs", "ppm of 10**9 x 10**9", replaced("ppm", b"P6\n1000000000 1000000000\n255\n" + bytes(100))
    yield "bombs", "gif video of 65535 x 65535", replaced("gif video", lambda: _gif_of(65535))
    yield "bombs", "npz of many arrays", lambda folder: _npz(folder, _many_arrays())
    yield "bombs", "bvh of 20000 joints and frames", long_joint_list
    for name, changes in {
        "4 GB of data": {"data": 0xFFFFFFF0, "riff": 0xFFFFFFF0},
        "twice the data": {"data": 16000, "riff": 16036},
        "65535 channels": {"channels": 65535},
        "no channel": {"channels": 0},
        "rate 0": {"rate": 0},
        "rate 4294967291": {"rate": 4294967291},
        "0 bits": {"bits": 0},
        "unknown format": {"format": 0x7777},
    }.items():
        yield "wav", name, replaced("wav", lying_wav(**changes))
    yield "wav", "NaN", replaced("wav", _nan_wav)
    for name, text in {
        "10**9 frames": bvh(0, 10**9).decode(),
        "more frames than rows": bvh(0, 7).decode(),
        "fewer frames than rows": bvh(0, 5).decode(),
        "10**9 channels": bvh(0).decode().replace("CHANNELS 6", "CHANNELS 1000000000"),
        "negative channels": bvh(0).decode().replace("CHANNELS 6", "CHANNELS -6"),
        "no number of channels": bvh(0).decode().replace("CHANNELS 6", "CHANNELS six"),
        "no offset": bvh(0).decode().replace("OFFSET 0 0 0", "OFFSET a b c"),
        "offset before the root": bvh(0).decode().replace("ROOT hip\n{", "OFFSET 1 2 3 ROOT hip\n{"),
        "deep": "HIERARCHY\n" + "ROOT a\n{\n" * 50000,
        "NaN": bvh(0).decode().replace("Frame Time: 0.03\n", "Frame Time: 0.03\nnan ", 1),
    }.items():
        yield "bvh", name, replaced("bvh", text.encode())
    for path in (
        *("/dev/zero", "/dev/stdin", "/etc/passwd", "../../etc/passwd", "OUTSIDE", "../outside.png", "~/x.png"),
        *("file:///etc/passwd", "http://localhost:9/x.png", "/proc/self/environ", "x\0y.png", "", "a" * 5000),
        "zip://x.png::/etc/passwd",
    ):
        yield "paths in tables", f"image {path[:20]!r}", paths(path)
    for path in ("/dev/zero", "OUTSIDE", "/etc/passwd", "../outside.wav"):
        yield "paths in tables", f"audio {path}", sound_paths(path)
    good_csv = "file_name,label\n" + "".join(f"{'ab'[i % 2]}/{i:03}.png,{i % 2}\n" for i in range(N))
    for name, content in {
        "cell of a megabyte": good_csv.replace(",0", "," + "x" * 2**20, 1),
        "NUL": good_csv.replace(",0", ",\0", 1),
        "UTF-16": good_csv.encode("utf-16"),
        "junk": bytes(range(256)) * 8,
        "file /etc/passwd": good_csv + "/etc/passwd,1\n",
        "file ../../x": good_csv + "../../x,1\n",
        "integer of 5000 digits": good_csv.replace(",0", "," + "9" * 5000),
        "too many cells": good_csv.replace(",0", ",0,1,2", 1),
        "other columns": "name\nx\n",
        "unbalanced quote": good_csv.replace(",0", ',"0', 1),
        "a file twice": good_csv + "a/000.png,1\n",
    }.items():
        yield "metadata.csv", name, sidecar("metadata.csv", content)
    good_json = "".join(json.dumps({"file_name": f"{'ab'[i % 2]}/{i:03}.png", "label": i % 2}) + "\n" for i in range(N))
    for name, content in {
        "deep": good_json + "[" * 100000 + "\n",
        "list": good_json + "[1, 2]\n",
        "file of number": good_json + '{"file_name": 3}\n',
        "file of list": good_json + '{"file_name": ["a"]}\n',
        "UTF-16": good_json.encode("utf-16"),
        "integer beyond 64 bits": good_json.replace('"label": 0', f'"label": {"9" * 30}', 1),
        "integer of 5000 digits": good_json.replace('"label": 0', f'"label": {"9" * 5000}', 1),
        "label of dictionary": good_json.replace('"label": 0', '"label": {"a": 1}', 1),
        "label of two kinds": good_json.replace('"label": 0', '"label": "x"', 1),
        "lone surrogate": good_json.replace('"label": 0', '"label": "\\ud800"'),
        "NaN label": good_json.replace('"label": 0', '"label": NaN'),
        "infinite label": good_json.replace('"label": 0', '"label": Infinity'),
        "a file twice": good_json + '{"file_name": "a/000.png", "label": 1}\n',
    }.items():
        if name == "NaN label":
            continue  # a missing label, of which all rows of a part may be
        yield "metadata.jsonl", name, sidecar("metadata.jsonl", content)
    for name, more in {
        "a member twice": [member("000.png", picture(9))],
        "a sample in two places": [member("000.json", b"{}")],
        "link to /etc/passwd": [
            member("900.png", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
            member("900.cls", b"1"),
        ],
        "hard link": [member("900.png", type=tarfile.LNKTYPE, linkname="000.png"), member("900.cls", b"1")],
        "device": [member("900.png", type=tarfile.CHRTYPE, devmajor=1, devminor=5), member("900.cls", b"1")],
        "pipe": [member("900.png", type=tarfile.FIFOTYPE), member("900.cls", b"1")],
        "name ../../x": [member("../../900.png", picture(1)), member("../../900.cls", b"1")],
        "label of a sample missing": [member("900.png", picture(1))],
        "image of a sample missing": [member("900.cls", b"1")],
        "empty member": [member("900.png", b""), member("900.cls", b"1")],
        "deep json": [member("900.png", picture(1)), member("900.cls", b"1"), member("900.json", b"[" * 100000)],
    }.items():
        if name != "name ../../x":
            yield "tar", name, in_archive(*more)
    yield "tar", "sparse member of a terabyte", lambda folder: _sparse_tar(folder)
    for name, label in {"negative": -1, "beyond 64 bits": 2**70, "10**15": 10**15, "half": 0.5, "true": True}.items():
        yield "latents", f"repa label {name}", named_labels(label)
    for name, content in {
        "list": "[]", "no labels": "{}", "junk": b"\xff\xfe\0", "deep": "[" * 100000, "labels of text": '{"labels": "abc"}',
        "triples": '{"labels": [["a", 1, 2]]}', "number": '{"labels": 5}', "infinite": '{"labels": [["00/000.npy", Infinity]]}',
    }.items():  # fmt: skip
        yield "latents", f"repa dataset.json {name}", with_json(content)
    import torch

    for name, tensors in {
        "half labels": {"labels": lambda: torch.full((N,), 0.5)},
        "NaN labels": {"labels": lambda: torch.full((N,), torch.nan)},
        "huge label": {"labels": lambda: torch.full((N,), 10**15)},
        "NaN latents": {"latents": lambda: torch.full((N, 4, 4, 4), torch.nan)},
        "integer latents": {"latents": lambda: torch.ones(N, 4, 4, 4, dtype=torch.int8)},
        "fewer labels": {"labels": lambda: torch.arange(N - 1)},
        "labels of two columns": {"labels": lambda: torch.zeros(N // 2, 2, dtype=torch.long)},
        "no latents": {"latents": lambda: torch.zeros(0, 4, 4, 4), "labels": lambda: torch.zeros(0, dtype=torch.long)},
    }.items():
        yield "latents", f"lightningdit {name}", with_shards(**tensors)
    for name, file, content in (
        ("state deep", "state.json", "[" * 100000),
        ("state list", "state.json", "[]"),
        ("state of file /etc/passwd", "state.json", '{"_data_files": [{"filename": "/etc/passwd"}]}'),
        ("state of files of number", "state.json", '{"_data_files": [{"filename": 3}]}'),
        ("state without files", "state.json", '{"_data_files": []}'),
        ("state of text", "state.json", '{"_data_files": "abc"}'),
        ("info deep", "dataset_info.json", "[" * 100000),
        ("info of other columns", "dataset_info.json", '{"features": {"x": {"dtype": "int64", "_type": "Value"}}}'),
        ("info of unknown type", "dataset_info.json", '{"features": {"image": {"_type": "Evil"}}}'),
    ):
        yield "saved", name, changed_state(file, content)


def _npz(folder: Path, content: bytes) -> None:
    tree(folder, "npz", lambda i: _zipped(clip(i)))
    (folder / "a" / "000.npz").write_bytes(content)


def _zipped(content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as zipped:
        zipped.writestr("arr.npy", content)
    return file.getvalue()


def _many_arrays() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as zipped:
        for i in range(20000):
            zipped.writestr(f"{'name' * 5}{i}.npy", b"")
    return file.getvalue()


def _gif_of(side: int) -> bytes:
    content = bytearray(gif(0))
    content[6:10] = struct.pack("<HH", side, side)
    return bytes(content)


def _nan_wav() -> bytes:
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, np.full(3000, np.nan), 8000, format="WAV", subtype="FLOAT")
    return file.getvalue()


def _sparse_tar(folder: Path) -> None:
    """An archive with a member of the old GNU kind of sparse files, of which almost nothing is stored."""
    info = tarfile.TarInfo("900.png")
    info.type = tarfile.GNUTYPE_SPARSE
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[386:398], block[398:410] = b"00000000000\0", b"00000000000\0"
    block[483:495] = b"\x80" + (2**40).to_bytes(11, "big")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    path = archive(folder)
    content = path.read_bytes()
    end = N * 2 * 1024
    path.write_bytes(content[:end] + bytes(block) + content[end:])


# Running


def read_all(arguments: Sequence[str]) -> None:
    """Reads every sample of a data set."""
    from layerprobe.data import DataSource

    source, *options = arguments
    values = dict(option.split("=") for option in options)
    splits = DataSource(source, **{k: int(v) if v.isdigit() else v for k, v in values.items()}).load()
    rows = 0
    for samples in (splits.train, splits.validation, splits.test):
        for start in range(0, len(samples), 64):
            rows += len(samples.batch(range(start, min(start + 64, len(samples)))).x)
    print(f"{rows} samples")
    if rows != N:
        raise SystemExit(WRONG_CODE)


def case(group: str, name: str, damage: Damage, right: tuple[str, ...]) -> Case:
    def prepare(folder: Path) -> Sequence[str]:
        here = Path.cwd()
        data = folder / "data"
        options = damage(data) or ()
        os.chdir(here)
        return [str(data), *options]

    return Case(group, name, prepare, right=right, work=read_all)


def cut(good: str, share: float, folder: Path) -> Sequence[str]:
    build, options = GOOD[good]
    file = build(folder)
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    return options


def flipped(good: str, seed: int, folder: Path) -> Sequence[str]:
    rng = random.Random(seed)
    build, options = GOOD[good]
    file = build(folder)
    content = bytearray(file.read_bytes())
    for _ in range(rng.choice((1, 1, 4, 30))):
        # Headers decide most.
        at = rng.randrange(min(len(content), 128) if rng.random() < 0.5 else len(content))
        content[at] = rng.choice((0, 255, content[at] ^ (1 << rng.randrange(8)), rng.randrange(256)))
    file.write_bytes(bytes(content))
    return options


def cases(num_random: int, seed: int) -> Iterator[Case]:
    for good, (build, options) in GOOD.items():
        yield case("good", good, lambda folder, build=build, options=options: (build(folder), options)[1], ("ok",))
    for group, name, damage in named():
        yield case(group, name, damage, ("refused",))
    rng = random.Random(seed)
    for i in range(num_random):
        good = list(GOOD)[i % len(GOOD)]
        # The last bytes of some formats hold nothing that is missed.
        share = rng.uniform(0.02, 0.95)
        yield case("cut", f"{good} at {share:.3f}", partial(cut, good, share), ("refused",))
        number = rng.randrange(10**6)
        yield case("flipped", f"{good} seed {number}", partial(flipped, good, number), ("ok", "refused"))


def run(num_random: int, seed: int) -> Iterator[Result]:
    """Runs the named cases, this many cut files and as many changed ones."""
    yield from run_cases(cases(num_random, seed))
