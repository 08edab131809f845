"""The files of a cache: a manifest, and shards that are written atomically.

::

    manifest.json               the layout and the provenance; written once
    shard-RANK-TIME-N.arrow     one record batch: id, view, a digest of the input, and the columns of the layout
    shard-RANK-TIME-N.json      side file: rows, bytes and SHA-256 of the shard; exists only for a complete shard
    head.safetensors, head.json the output head of a cache of head inputs, and its side file

Every JSON file contains a checksum of itself and must be, byte for byte, what this module writes.
"""

import hashlib
import json
import mmap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from safetensors.torch import load, save

from tutelage.errors import CacheError, refusal
from tutelage.files import atomic_file
from tutelage.taps import Head
from tutelage.teachers.cache.columns import Array, Columns, Ragged, prefix_sums
from tutelage.teachers.cache.layout import Layout

FORMAT = 2
MANIFEST = "manifest.json"
HEAD = "head"


class Shard(NamedTuple):
    """A complete shard."""

    path: Path
    rows: int
    size: int
    sha256: str


class ShardData(NamedTuple):
    """Keys and columns of a memory-mapped shard, and where each row of columns of variable width begins."""

    keys: dict[str, Array]
    columns: Columns
    starts: dict[str, Array]
    mapped: mmap.mmap
    address: int


def _damaged(what: str, path: Path, files: str, rows: str = "these rows") -> CacheError:
    return CacheError(what, where=str(path), remedy=f"delete {files}; the next run writes {rows} again")


def _write_file(path: Path, content: bytes | pa.Buffer) -> None:
    with _wrap_os_errors(path.parent), atomic_file(path) as file:
        file.write(content)


@contextmanager
def _wrap_os_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except CacheError:
        raise
    except OSError as error:
        raise CacheError(
            f"cannot be written: {refusal(error)}", where=str(path),
            remedy="free some space or choose another folder, then run again; rows on disk are used",
        ) from error  # fmt: skip


def _sealed(content: Mapping[str, Any]) -> bytes:
    plain = json.dumps(content, indent=1, sort_keys=True, ensure_ascii=True)
    full = {**content, "checksum": hashlib.sha256(plain.encode()).hexdigest()}
    return (json.dumps(full, indent=1, sort_keys=True, ensure_ascii=True) + "\n").encode()


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON with its checksum."""
    _write_file(path, _sealed(content))


def read_sealed(path: Path) -> dict[str, Any]:
    """Read what :func:`write_sealed` wrote; raises :class:`CacheError` if it is missing or damaged."""
    try:
        raw = path.read_bytes()
        content = json.loads(raw)
        content.pop("checksum")
        if _sealed(content) != raw:
            raise ValueError("checksum and content differ")
    except FileNotFoundError:
        raise CacheError("there is no such file", where=str(path), remedy="give the folder of a cache") from None
    except (OSError, ValueError, KeyError, AttributeError, RecursionError) as error:
        what, another = f"the file is damaged: {error}", "delete this cache and write another"
        if path.name == MANIFEST:
            raise CacheError(what, where=str(path), remedy=another) from None
        raise _damaged(what, path, "the file and its shard") from None
    return dict(content)


def write_manifest(folder: Path, layout: Layout, made_from: Mapping[str, Any]) -> None:
    """Write the manifest of a new cache."""
    with _wrap_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_sealed(folder / MANIFEST, {"format": FORMAT, "layout": layout.to_dict(), "made_from": dict(made_from)})


def read_manifest(folder: Path) -> tuple[Layout, dict[str, Any]]:
    """The layout and the provenance of a cache; raises :class:`CacheError` if they cannot be read."""
    content = read_sealed(folder / MANIFEST)
    if content.get("format") != FORMAT:
        raise CacheError(
            f"the cache has format {content.get('format')}, and this version reads {FORMAT}", where=str(folder),
            remedy="write the cache again, or use the version of tutelage that wrote it",
        )  # fmt: skip
    return Layout.from_dict(content["layout"]), dict(content["made_from"])


def has_output(folder: Path) -> bool:
    """Whether the output head is stored completely."""
    return (folder / f"{HEAD}.json").exists()


def write_output(folder: Path, output: Head) -> None:
    """Write the output head, in its own dtype."""
    numbers = {"scale": output.scale, "softcap": output.softcap, "vocabulary": output.vocabulary}
    tensors = {"weight": output.weight} | ({} if output.bias is None else {"bias": output.bias})
    raw = save({name: x.detach().cpu().contiguous() for name, x in tensors.items()})
    _write_file(folder / f"{HEAD}.safetensors", raw)
    write_sealed(folder / f"{HEAD}.json", {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()} | numbers)


def read_output(folder: Path) -> Head:
    """Read what :func:`write_output` wrote; raises :class:`CacheError` if it is missing or damaged."""
    side, path = read_sealed(folder / f"{HEAD}.json"), folder / f"{HEAD}.safetensors"
    raw = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(raw).hexdigest() != side["sha256"]:
        raise _damaged("the output head is missing, or its SHA-256 differs", path, f"it and {HEAD}.json", "both")
    tensors = load(raw)
    weight = tensors["weight"]
    return Head(
        weight.new_empty(0), weight, tensors.get("bias"), side["scale"], side["softcap"], None, side["vocabulary"]
    )


def schema(layout: Layout) -> pa.Schema:
    """The Arrow schema of a shard."""
    fields = [pa.field("id", pa.int64()), pa.field("view", pa.int64()), pa.field("digest", pa.uint64())]
    for name, (width, dtype) in layout.columns().items():
        fields.append(pa.field(name, pa.list_(pa.from_numpy_dtype(dtype), -1 if width is None else width)))
    return pa.schema(fields)


def write_shard(folder: Path, stem: str, layout: Layout, keys: Mapping[str, Array], columns: Columns) -> None:
    """Write a shard, then its side file."""
    arrays = [pa.array(keys[key]) for key in ("id", "view", "digest")]
    for name, (width, _) in layout.columns().items():
        column = columns[name]
        if isinstance(column, Ragged):
            offsets = prefix_sums(column.lengths).astype(np.int32)
            arrays.append(pa.ListArray.from_arrays(pa.array(offsets), pa.array(column.values)))
        else:
            flat = pa.array(np.ascontiguousarray(column).reshape(-1))
            arrays.append(pa.FixedSizeListArray.from_arrays(flat, width))
    batch = pa.record_batch(arrays, schema=schema(layout))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    raw = sink.getvalue()
    _write_file(folder / f"{stem}.arrow", raw)
    content = {"rows": batch.num_rows, "bytes": raw.size, "sha256": hashlib.sha256(raw).hexdigest()}
    write_sealed(folder / f"{stem}.json", content | {"shard": f"{stem}.arrow"})


def complete_shards(folder: Path) -> list[Shard]:
    """Every shard with a side file, by name; raises as :func:`read_side_file`."""
    return [read_side_file(side) for side in side_files(folder)]


def side_files(folder: Path) -> list[Path]:
    """The side files of all complete shards, by name."""
    return sorted(folder.glob("shard-*.json"))


def read_side_file(side: Path) -> Shard:
    """The shard of a side file; raises :class:`CacheError` if one of them is missing or damaged."""
    content = read_sealed(side)
    shard = Shard(side.parent / str(content["shard"]), content["rows"], content["bytes"], content["sha256"])
    if shard.path.stem != side.stem:
        raise CacheError(
            f"the side file names the shard {shard.path.name}", where=str(side), remedy="delete this side file"
        )
    size = shard.path.stat().st_size if shard.path.is_file() else None
    if size != shard.size:
        what = "the shard is missing" if size is None else f"has {size:,} bytes where {shard.size:,} were written"
        raise _damaged(what, shard.path, f"it and {side.name}")
    return shard


def check_shard(shard: Shard) -> None:
    """Raise :class:`CacheError` unless a shard has the SHA-256 that its side file states."""
    with shard.path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 != shard.sha256:
        raise _damaged("the shard is damaged: its SHA-256 differs", shard.path, f"it and {shard.path.stem}.json")


def open_shard(shard: Shard, layout: Layout) -> ShardData:
    """Map a shard into memory. Numbers are read from disk on first access."""
    with shard.path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    batch = pa.ipc.open_file(pa.py_buffer(mapped)).get_batch(0)
    keys = {key: batch.column(key).to_numpy() for key in ("id", "view", "digest")}
    columns: Columns = {}
    starts = {}
    for name, (width, _) in layout.columns().items():
        array = batch.column(name)
        values = array.values.to_numpy()
        if width is None:
            offsets = array.offsets.to_numpy()
            columns[name], starts[name] = Ragged(values, np.diff(offsets)), offsets[:-1].copy()
        else:
            columns[name] = values.reshape(batch.num_rows, width)
    return ShardData(keys, columns, starts, mapped, np.frombuffer(mapped, dtype=np.uint8).ctypes.data)
