"""Which files of a data set are read, into which part each goes, and which folder is its class.

Every file counts: those that are not read are counted by their endings, and a file that belongs to no part is an error.

| source | parts | class of a file |
|---|---|---|
| single files | top folders, where each is a word for a part (`PART_OF`) | the top folder, below that of the part |
| tables (`TABLES`) | words in the names of files, where each has one: `train-00000-of-00002.parquet` | a column |

A folder that holds all files of a part names no class, so the folders in it are the top folders. Links to folders are
followed. Hidden files are left out, and so is what systems and notebooks add.

Source: the rule of torchvision's ImageFolder for classes; the names of parts and shards of the Hugging Face Hub.
"""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from layerprobe.data import metadata
from layerprobe.data.contents import check_file, check_whole_arrow, folders_of, read_text
from layerprobe.files import is_hub_name, one_line, similar_path

# Words for the parts of a data set.
PART_OF = dict.fromkeys(("train", "training", "trainval"), "train")
PART_OF |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")
PART_OF |= dict.fromkeys(("test", "testing", "eval", "evaluation"), "test")
# Endings of files of rows, with the format names of `datasets`.
TABLES = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}
_SHARD = re.compile(r"(?P<part>[\w.]+)-(?P<index>\d{5})-of-(?P<count>\d{5})\b")
# Folders that hold different things about the same items, rather than classes.
_ASPECTS = {"images", "image", "img", "imgs", "masks", "mask", "labels", "annotations", "annotation", "gt", "depth"}
_FOLD = re.compile(r"(fold|part|shard|chunk|batch|split)[ _-]?\d+", re.IGNORECASE)
# Endings of words for parts, as in "trainset" and "test_images".
_PART_SUFFIX = re.compile(r"(?<=[a-z])(set|data|images?|imgs?)$")
_ARCHIVES = {".zip", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar", ".zst"}
# Parts of the names of files that hold known data sets in a format of their own.
_OTHER_FORMATS = {"data_batch_1": "Python pickles of CIFAR", "-ubyte": "idx files of MNIST"}

T = TypeVar("T")


@dataclass(frozen=True)
class Listing:
    """The files of a data set.

    Attributes:
        source: Data set as the user named it.
        form: What it consists of: "items" (single files), "tables", "saved" (by `save_to_disk`) or "hub".
        parts: Files by part, each sorted as strings; empty for "saved" and "hub".
        classes: Class folder of each item, or None for an item that has none. Empty if there are no classes.
        classes_from: Folder of the class folders, relative to the source; empty for the source or the folder of a part.
        annotations: Text files that name the classes of items without a class folder.
        metadata: Files with further columns of the items.
        num_read: Number of files that are read.
        left: Number of files that are not read, by ending; "hidden" for hidden ones.
        empty_folders: Folders beside those of the classes or parts that hold no item.
        folders: Folders that files of the data may lie in, see `folders_of`; empty for "hub".
    """

    source: str
    form: str
    parts: Mapping[str, Sequence[Path]] = field(default_factory=dict)
    classes: Mapping[Path, str | None] = field(default_factory=dict)
    classes_from: str = ""
    annotations: Sequence[Path] = ()
    metadata: Sequence[Path] = ()
    num_read: int = 0
    left: Mapping[str, int] = field(default_factory=dict)
    empty_folders: Sequence[str] = ()
    folders: Sequence[Path] = ()


def list_files(source: str | Path, suffixes: Collection[str], *, data_root: str | Path | None = None) -> Listing:
    """Lists the files of a data set.

    Args:
        source: A file of rows; a folder of such files, of single files or written by `save_to_disk`; or "owner/name" on
            the Hugging Face Hub.
        suffixes: Endings of single files that are items, such as ".png". Arrays (".npy") beside other items are taken
            for features or labels of these, and left.
        data_root: Folder that links and tables of the data may name files in, beside that of the data.

    Raises:
        ValueError: If the source does not exist or holds no such files, the part of a file is not clear, or a table is
            no regular file below these folders.
    """
    listing = _list(source, suffixes, Path(source).expanduser().absolute())
    if listing.form == "hub":
        return listing
    folders = folders_of(source, data_root)
    for file in chain(*listing.parts.values()) if listing.form == "tables" else ():
        check_file(file, folders)
    return replace(listing, folders=folders)


def _list(source: str | Path, suffixes: Collection[str], root: Path) -> Listing:
    if root.is_file():
        if root.suffix.lower() not in TABLES:
            raise ValueError(
                f"{source} is not a .parquet, .arrow or .tar file; pass such a file, or the folder of the items "
                "(with a metadata.csv, if a table names them)"
            )
        return Listing(str(source), "tables", {"train": [root]}, num_read=1)
    if not root.is_dir():
        if is_hub_name(str(source)):
            return Listing(str(source), "hub")
        raise ValueError(
            f"{source} is not a file or folder; pass a path, digits, or owner/name on the Hugging Face Hub"
            f"{similar_path(source)}"
        )
    tree = walk(root)
    if is_saved(root):
        return _listing(source, "saved", tree, read=_saved_files(root))
    items = [file for file in tree.files if file.suffix.lower() in suffixes]
    if {file.suffix.lower() for file in items} > {".npy"}:
        items = [file for file in items if file.suffix.lower() != ".npy"]
    tables = [file for file in tree.files if file.suffix.lower() in TABLES and file.name != "metadata.parquet"]
    # img2dataset writes a .parquet of captions and sizes beside each .tar.
    archives = {file.with_suffix(".parquet") for file in tables if file.suffix == ".tar"}
    tables = [file for file in tables if file not in archives]
    endings = Counter(file.suffix.lower() for file in tables)
    if len(endings) + bool(items) > 1:
        counts = [f"{count} {ending}" for ending, count in (endings + Counter(file.suffix for file in items)).items()]
        raise ValueError(
            f"{source} contains {' and '.join(counts)} files, which are not one data set; pass a folder with one kind"
        )
    if tables:
        return _listing(source, "tables", tree, read=tables, parts=_in_order(_table_parts(root, tables)))
    if not items:
        raise ValueError(_nothing(source, root, tree.files, {*TABLES, *suffixes}))
    return _list_items(source, root, tree, items)


def is_saved(root: Path) -> bool:
    """Returns whether a folder was written by `save_to_disk` of `datasets`."""
    return (root / "dataset_dict.json").is_file() or (root / "state.json").is_file()


@dataclass(frozen=True)
class Tree:
    """Visible files and folders below a folder, sorted as strings, and the number of hidden files."""

    files: Sequence[Path]
    folders: Sequence[Path]
    num_hidden: int


def walk(root: Path) -> Tree:
    """Lists what is below a folder, through links to folders."""
    files: list[Path] = []
    folders: list[Path] = []
    num_hidden = 0
    for path, names, file_names in os.walk(root, followlinks=True, onerror=_refuse):
        folder = Path(path)
        hidden = _is_hidden(folder.relative_to(root).parts)
        # A link to a folder that it lies in has no end.
        above = {folder.resolve(), *folder.resolve().parents}
        names[:] = [name for name in names if not ((folder / name).is_symlink() and (folder / name).resolve() in above)]
        folders += [] if hidden else [folder / name for name in names if not _is_hidden((name,))]
        visible = [] if hidden else [folder / name for name in file_names if not _is_hidden((name,))]
        num_hidden += len(file_names) - len(visible)
        files += visible
    # Sorted as strings like by `datasets`: `Path` would sort "a/b" before "a-b".
    return Tree(sorted(files, key=Path.as_posix), sorted(folders, key=Path.as_posix), num_hidden)


def _refuse(error: OSError) -> None:
    raise ValueError(f"{error.filename} cannot be listed: {error.strerror}; make it readable, or move it elsewhere")


def _is_hidden(names: Iterable[str]) -> bool:
    return any(name.startswith(".") or name in ("__MACOSX", "__pycache__", "Thumbs.db") for name in names)


def count_left(tree: Tree, read: Collection[Path]) -> dict[str, int]:
    """Returns the number of files that are not read, by ending, most frequent first; "hidden" for hidden ones."""
    left = Counter(file.suffix.lower() or file.name for file in sorted(set(tree.files) - set(read)))
    return dict(left.most_common()) | ({"hidden": tree.num_hidden} if tree.num_hidden else {})


def _listing(source: str | Path, form: str, tree: Tree, *, read: Collection[Path], **fields: Any) -> Listing:
    return Listing(str(source), form, num_read=len(read), left=count_left(tree, read), **fields)


def _saved_files(root: Path) -> list[Path]:
    states = [root / "state.json", *root.glob("*/state.json")]
    records = {state: _state(state) for state in states if state.is_file()}
    rows = [state.parent / name for state, names in records.items() for name in names]
    for file in rows:
        check_whole_arrow(check_file(file, folders_of(root)))
    return [*rows, *records, *root.glob("dataset_dict.json"), *root.rglob("dataset_info.json")]


def _state(path: Path) -> list[str]:
    """Names of the files of rows that a `state.json` tells."""
    try:
        return [str(Path(file["filename"])) for file in json.loads(read_text(path))["_data_files"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} names no files of rows ({one_line(error)}); copy the folder again") from error


def _in_order(parts: Mapping[str, T]) -> dict[str, T]:
    """The parts with train, validation and test first."""
    usual = dict.fromkeys(PART_OF.values())
    return {name: parts[name] for name in (*usual, *sorted(parts.keys() - usual.keys())) if name in parts}


def _nothing(source: str | Path, root: Path, files: Sequence[Path], readable: Collection[str]) -> str:
    content = ", ".join(sorted(file.name for file in root.iterdir())[:3]) or "nothing"
    problem = f"{source} contains no {', '.join(sorted(readable))} file but {content}"
    other = next((what for file in files for mark, what in _OTHER_FORMATS.items() if mark in file.name), None)
    if other:
        return f"{problem}; {other} are not read: convert them to .png files in a folder per class, or to .parquet"
    if any(file.suffix.lower() in _ARCHIVES for file in files):
        return f"{problem}; unpack it first"
    return f"{problem}; pass the folder of the data"


# Tables


def _table_parts(root: Path, tables: Sequence[Path]) -> dict[str, list[Path]]:
    """The parts that the names of all tables tell; one part if none of them tells one."""
    named = {file: _table_part(file.relative_to(root)) for file in tables}
    without = [file for file, part in named.items() if part is None]
    if len(without) == len(tables):
        hive = next((folder for file in tables for folder in file.relative_to(root).parts[:-1] if "=" in folder), None)
        if hive:
            raise ValueError(
                f"{root} has values in the names of folders ({hive}); write them as a column of the tables"
            )
        return {"train": list(tables)}
    if without:
        words = next(f"{file.name} ({part})" for file, part in named.items() if part is not None)
        raise ValueError(
            f"{len(without)} of {len(tables)} tables in {root} name no part of the data (first: {without[0].name}) but "
            f"others do (first: {words}); name the part of each, as in train-0.parquet, or of none"
        )
    parts: dict[str, list[Path]] = {}
    for file, part in named.items():
        parts.setdefault(str(part), []).append(file)
    for name, files in parts.items():
        _check_shards(name, files)
    return parts


def _table_part(file: Path) -> str | None:
    """The part that the name of a table tells, or else its folders; the path is relative to the data set."""
    shard = _SHARD.search(file.name)
    if shard and not _words(shard["part"]):
        return shard["part"]
    words = _words(file.stem) or next((found for folder in file.parts[-2::-1] if (found := _words(folder))), set())
    return words.pop() if len(words) == 1 else None


def _words(name: str) -> set[str]:
    # A capital letter begins a word: trainA, TestData.
    words = re.split(r"[^a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower())
    return {PART_OF[word] for word in (_PART_SUFFIX.sub("", word) for word in words) if word in PART_OF}


def _check_shards(part: str, files: Sequence[Path]) -> None:
    """Checks that files named as shards of a number are all there."""
    shards = [match for file in files if (match := _SHARD.search(file.name))]
    names = sorted({match["part"] for match in shards})
    if len(names) > 1:
        raise ValueError(f"{' and '.join(names)} both name the part {part}; pass a folder with the tables of one")
    indices = Counter((match["index"], match["count"]) for match in shards)
    twice = next((index for index, count in indices.items() if count > 1), None)
    if twice is not None:
        raise ValueError(f"shard {twice[0]} of {part} occurs twice below the folder; pass the folder of one data set")
    expected = sum(int(count) for count in {match["count"] for match in shards})
    if len(shards) != expected:
        raise ValueError(
            f"{part} has {len(shards)} of the {expected} shards that their names tell (first: {files[0].name}); copy "
            "the others, or rename those that are there"
        )


# Single files in folders


@dataclass(frozen=True)
class _Part:
    """The items of a part, and the folder that their class folders lie in."""

    folder: Path
    files: Sequence[Path]

    @cached_property
    def top(self) -> Mapping[Path, str | None]:
        """The class folder of each item; None if it lies beside them."""
        below = {file: file.relative_to(self.folder).parts for file in self.files}
        return {file: names[0] if len(names) > 1 else None for file, names in below.items()}

    @cached_property
    def tops(self) -> set[str | None]:
        return set(self.top.values())


def _list_items(source: str | Path, root: Path, tree: Tree, items: Sequence[Path]) -> Listing:
    whole = _inside(_Part(root, items))
    places = _item_parts(whole)
    parts = _without_common_folders(places)
    # macOS writes accents as characters of their own, so one name may have two forms.
    classes = {
        file: top and unicodedata.normalize("NFC", top) for part in parts.values() for file, top in part.top.items()
    }
    names = {name for name in classes.values() if name is not None}
    annotations: list[Path] = []
    for part in parts.values():
        if names and part.tops == {None}:
            annotations += _annotate(part, classes, names, tree.files)
    if len(names) < 2:
        classes = {}
    elif {name.lower() for name in names} <= _ASPECTS:
        raise ValueError(
            f"the folders {' and '.join(sorted(names))} in {source} are no classes but different things about the same "
            "items; pass a folder with one of them"
        )
    sidecars = [file for file in tree.files if file.name in metadata.NAMES]
    if classes and all(_FOLD.fullmatch(name) for name in names):
        if not sidecars:
            raise ValueError(
                f"the folders {' and '.join(sorted(names)[:3])} in {source} number portions of the data and name no "
                "classes; name the class of each file in a metadata.csv, or rename the folders if they are classes"
            )
        classes = {}
    first = next(iter(_in_order(parts).values())).folder.relative_to(root)
    return _listing(
        source,
        "items",
        tree,
        read=[*items, *sidecars, *annotations],
        parts={name: part.files for name, part in _in_order(parts).items()},
        classes=classes,
        classes_from="" if len(first.parts) < 2 and first.name.lower() in ("", *PART_OF) else first.as_posix(),
        annotations=annotations,
        metadata=sidecars,
        empty_folders=_empty_folders(tree, items, {whole.folder, *(part.folder for part in parts.values())}),
    )


def _inside(part: _Part) -> _Part:
    """The part without folders that hold all items, unless they name a part."""
    while len(part.tops) == 1 and (top := next(iter(part.tops))) is not None and top.lower() not in PART_OF:
        part = _Part(part.folder / top, part.files)
    return part


def _item_parts(whole: _Part) -> dict[str, _Part]:
    """The parts that the top folders name, where each of them names one; else one part."""
    by_top: dict[str | None, list[Path]] = {}
    for file in whole.files:
        by_top.setdefault(whole.top[file], []).append(file)
    beside = by_top.pop(None, [])
    tops = sorted(str(top) for top in by_top)
    named = {top: PART_OF[top.lower()] for top in tops if top.lower() in PART_OF}
    hinted = {top: words.pop() for top in tops if len(words := _words(top)) == 1}
    if len(set(hinted.values())) > 1:  # train2017 beside val2017
        named = hinted
    others = [top for top in tops if top not in named]
    if others and len(set(named.values())) > 1:
        raise ValueError(
            f"the folders {' and '.join(named)} in {whole.folder} name parts of the data but {', '.join(others[:3])} "
            f"{'do' if others[1:] else 'does'} not; move these elsewhere, or rename the former if they are classes"
        )
    if others or not named:
        _check_no_parts_in_classes(whole)
        return {"train": whole}
    if beside:
        raise ValueError(
            f"{len(beside)} files beside the folders {' and '.join(named)} belong to no part of the data (first: "
            f"{beside[0].name}); move them into one of these"
        )
    if len(set(named.values())) < len(named):
        raise ValueError(f"two of the folders {', '.join(named)} in {whole.folder} name one part; keep one of them")
    return {part: _Part(whole.folder / top, by_top[top]) for top, part in named.items()}


def _check_no_parts_in_classes(whole: _Part) -> None:
    below = {names[1] for file in whole.files if len(names := file.relative_to(whole.folder).parts) > 2}
    if len({PART_OF.get(name.lower()) for name in below} - {None}) > 1:
        words = sorted(name for name in below if name.lower() in PART_OF)
        raise ValueError(
            f"the folders {' and '.join(words)} lie in class folders of {whole.folder}, so the parts of the data are "
            "not clear; put the class folders into folders train and test"
        )


def _without_common_folders(parts: Mapping[str, _Part]) -> dict[str, _Part]:
    """The parts without folders that hold all items of a part, unless they are a class of another part."""
    parts = dict(parts)
    while True:
        classes = {top for part in parts.values() if len(part.tops) > 1 for top in part.tops}
        deeper = {
            name: _Part(part.folder / top, part.files)
            for name, part in parts.items()
            for top in part.tops
            if len(part.tops) == 1 and top is not None and top not in classes
        }
        if not deeper:
            return parts
        parts |= deeper


def _annotate(
    part: _Part, classes: dict[Path, str | None], names: Collection[str], files: Sequence[Path]
) -> list[Path]:
    """Reads classes from text files of lines "file class ..." beside or above the items, as in Tiny ImageNet."""
    items = {file.name: file for file in part.files}
    read = []
    for text in files:
        if text.suffix != ".txt" or text.parent not in (part.folder, *part.folder.parents):
            continue
        if not text.is_file():  # a pipe
            continue
        rows = [line.split() for line in read_text(text, errors="replace").splitlines()]
        found = {items[row[0]]: row[1] for row in rows if len(row) > 1 and row[0] in items and row[1] in names}
        classes.update(found)
        read += [text] * bool(found)
    return read


def _empty_folders(tree: Tree, items: Sequence[Path], levels: Collection[Path]) -> list[str]:
    holding = {folder for item in items for folder in item.parents}
    return [folder.name for folder in tree.folders if folder.parent in levels and folder not in holding]
