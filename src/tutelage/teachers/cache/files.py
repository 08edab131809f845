"""The files of a cache: a manifest, and shards that appear whole or not at all.

::

    manifest.json               what is kept, and what it was made from; written once
    shard-RANK-TIME-N.arrow     one record batch: id, view, a digest of the input, and the columns of the layout
    shard-RANK-TIME-N.json      its rows, its bytes and its SHA-256; there only once the shard is complete
    head.safetensors, head.json the output head, of a cache that keeps what goes into it, and the same of that

Every JSON file holds a checksum of itself and must be, byte for byte, what this module writes.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
from safetensors.torch import load, save

from tutelage.errors import CacheError, refusal
from tutelage.teachers.cache.columns import Array, Columns, Ragged
from tutelage.teachers.cache.layout import Layout, OutputLayer

FORMAT = 2
MANIFEST = "manifest.json"
HEAD = "head"
DRAFT = ".tmp-"


class Shard(NamedTuple):
    """A complete shard."""

    path: Path
    rows: int
    size: int
    sha256: str


@contextmanager
def wrap_os_errors(path: Path) -> Iterator[None]:
    """Turn an operating system's refusal into a :class:`CacheError`."""
    try:
        yield
    except CacheError:
        raise
    except OSError as error:
        raise CacheError(
            f"cannot be written: {refusal(error)}", where=str(path),
            remedy="what is there stays valid: make room or choose another folder, then go on",
        ) from error  # fmt: skip


@contextmanager
def _appearing(path: Path) -> Iterator[BinaryIO]:
    """A file that is at ``path`` whole or not at all: a draft, synced, then renamed."""
    draft = path.with_name(f"{DRAFT}{os.getpid()}-{path.name}")
    with wrap_os_errors(path.parent):
        try:
            with draft.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            draft.replace(path)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise


# JSON that knows itself ----------------------------------------------------------------------------------


def _sealed(content: Mapping[str, Any]) -> bytes:
    plain = json.dumps(content, indent=1, sort_keys=True, ensure_ascii=True)
    whole = {**content, "checksum": hashlib.sha256(plain.encode()).hexdigest()}
    return (json.dumps(whole, indent=1, sort_keys=True, ensure_ascii=True) + "\n").encode()


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON with its checksum."""
    with _appearing(path) as file:
        file.write(_sealed(content))


def read_sealed(path: Path) -> dict[str, Any]:
    """What :func:`write_sealed` wrote.

    Raises:
        CacheError: missing, or not byte for byte what was written.
    """
    try:
        raw = path.read_bytes()
        content = json.loads(raw)
        content.pop("checksum")
        if _sealed(content) != raw:
            raise ValueError("its checksum is not that of its content")
    except FileNotFoundError:
        raise CacheError("there is no such file", where=str(path), remedy="is this the folder of a cache?") from None
    except (OSError, ValueError, KeyError, AttributeError, RecursionError) as error:
        raise CacheError(
            f"is damaged: {error}", where=str(path), remedy="delete it with its shard; these rows are written again"
            if path.name != MANIFEST else "this cache cannot be trusted: write another",
        ) from None  # fmt: skip
    return dict(content)


def write_manifest(folder: Path, layout: Layout, made_from: Mapping[str, Any]) -> None:
    """Write the manifest of a new cache."""
    with wrap_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_sealed(folder / MANIFEST, {"format": FORMAT, "layout": layout.to_dict(), "made_from": dict(made_from)})


def read_manifest(folder: Path) -> tuple[Layout, dict[str, Any]]:
    """What a cache keeps and what it was made from.

    Raises:
        CacheError: no cache, a damaged manifest, or one of another version.
    """
    content = read_sealed(folder / MANIFEST)
    if content.get("format") != FORMAT:
        raise CacheError(
            f"is of format {content.get('format')}, this version reads {FORMAT}", where=str(folder),
            remedy="write it again, or use the version that wrote it",
        )  # fmt: skip
    return Layout.from_dict(content["layout"]), dict(content["made_from"])


# The output head -------------------------------------------------------------------------------------------


def has_output(folder: Path) -> bool:
    """Whether the output head is there, whole."""
    return (folder / f"{HEAD}.json").exists()


def write_output(folder: Path, output: OutputLayer) -> None:
    """Write the output head, in its own type of numbers."""
    numbers = {"scale": output.scale, "softcap": output.softcap}
    tensors = {
        name: x.detach().cpu().contiguous()
        for name, x in (("weight", output.weight), ("bias", output.bias))
        if x is not None
    }
    raw = save(tensors)
    with _appearing(folder / f"{HEAD}.safetensors") as file:
        file.write(raw)
    write_sealed(folder / f"{HEAD}.json", {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()} | numbers)


def read_output(folder: Path) -> OutputLayer:
    """What :func:`write_output` wrote.

    Raises:
        CacheError: missing, or not what was written.
    """
    known, path = read_sealed(folder / f"{HEAD}.json"), folder / f"{HEAD}.safetensors"
    raw = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(raw).hexdigest() != known["sha256"]:
        raise CacheError(
            "is missing or does not hold what was written", where=str(path),
            remedy=f"delete it and {HEAD}.json; it is written again",
        )  # fmt: skip
    tensors = load(raw)
    return OutputLayer(tensors["weight"], tensors.get("bias"), known["scale"], known["softcap"])


# Shards ----------------------------------------------------------------------------------------------------


def schema(layout: Layout) -> pa.Schema:
    """Arrow's schema of a shard."""
    fields = [pa.field("id", pa.int64()), pa.field("view", pa.int64()), pa.field("digest", pa.uint64())]
    for name, (width, dtype) in layout.widths().items():
        fields.append(pa.field(name, pa.list_(pa.from_numpy_dtype(dtype), width)))
    for name, dtype in layout.ragged().items():
        fields.append(pa.field(name, pa.list_(pa.from_numpy_dtype(dtype))))
    return pa.schema(fields)


def write_shard(folder: Path, name: str, layout: Layout, keys: Mapping[str, Array], columns: Columns) -> Shard:
    """Write a shard and, once it is on disk under its name, its side file."""
    arrays = [pa.array(keys[key]) for key in ("id", "view", "digest")]
    for column, (width, _) in layout.widths().items():
        values = columns[column]
        assert isinstance(values, np.ndarray)
        flat = pa.array(np.ascontiguousarray(values).reshape(-1))
        arrays.append(pa.FixedSizeListArray.from_arrays(flat, width))
    for column in layout.ragged():
        ragged = columns[column]
        assert isinstance(ragged, Ragged)
        offsets = np.zeros(len(ragged.lengths) + 1, dtype=np.int32)
        np.cumsum(ragged.lengths, out=offsets[1:])
        arrays.append(pa.ListArray.from_arrays(pa.array(offsets), pa.array(ragged.values)))
    batch = pa.record_batch(arrays, schema=schema(layout))
    path = folder / f"{name}.arrow"
    with _appearing(path) as file:
        sink = _Hashed(file)
        with pa.ipc.new_file(pa.PythonFile(sink, mode="w"), batch.schema) as writer:
            writer.write_batch(batch)
    shard = Shard(path, batch.num_rows, sink.size, sink.digest.hexdigest())
    write_sealed(
        folder / f"{name}.json", {"rows": shard.rows, "bytes": shard.size, "sha256": shard.sha256, "shard": path.name}
    )
    return shard


class _Hashed:
    """A file that hashes what is written to it."""

    closed = False

    def __init__(self, file: Any) -> None:
        self.file, self.digest, self.size = file, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        self.digest.update(data)
        self.size += len(data)
        return int(self.file.write(data))

    def flush(self) -> None:
        self.file.flush()

    def tell(self) -> int:
        return self.size

    def close(self) -> None:
        """The file stays open: it is synced first."""


def complete_shards(folder: Path) -> list[Shard]:
    """Every shard with a side file, by name.

    Raises:
        CacheError: a damaged side file, or a shard that is missing or of another size.
    """
    return [_shard(folder, side, read_sealed(side)) for side in sorted(folder.glob("shard-*.json"))]


def _shard(folder: Path, side: Path, known: Mapping[str, Any]) -> Shard:
    shard = Shard(folder / str(known["shard"]), known["rows"], known["bytes"], known["sha256"])
    if shard.path.stem != side.stem:
        raise CacheError(f"is of another shard, {known['shard']}", where=str(side), remedy="delete it")
    size = shard.path.stat().st_size if shard.path.is_file() else None
    if size != shard.size:
        raise CacheError(
            "is missing" if size is None else f"has {size:,} bytes where {shard.size:,} were written",
            where=str(shard.path), remedy=f"delete it and {side.name}; these rows are written again",
        )  # fmt: skip
    return shard


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_shard(shard: Shard) -> None:
    """Raise :class:`CacheError` unless a shard holds the bytes that were written."""
    if checksum(shard.path) != shard.sha256:
        raise CacheError(
            "does not hold what was written: its SHA-256 differs", where=str(shard.path),
            remedy=f"delete it and {shard.path.with_suffix('.json').name}; these rows are written again",
        )  # fmt: skip


def open_shard(shard: Shard, layout: Layout) -> tuple[dict[str, Array], Columns, mmap.mmap]:
    """Keys and columns of a shard, and its memory map: nothing is read until it is asked for."""
    with shard.path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    batch = pa.ipc.open_file(pa.py_buffer(mapped)).get_batch(0)
    keys = {key: batch.column(key).to_numpy() for key in ("id", "view", "digest")}
    columns: Columns = {}
    for name, (width, _) in layout.widths().items():
        columns[name] = batch.column(name).values.to_numpy().reshape(batch.num_rows, width)
    for name in layout.ragged():
        array = batch.column(name)
        offsets = array.offsets.to_numpy()
        columns[name] = Ragged(array.values.to_numpy(), np.diff(offsets))
    return keys, columns, mapped


def hash_keys(ids: Array, views: Array) -> Array:
    """One number for each (id, view)."""
    with np.errstate(over="ignore"):
        mixed = ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= views.view(np.uint64) if views.dtype == np.int64 else views.astype(np.uint64)
        mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
        out: Array = mixed ^ (mixed >> np.uint64(32))
    return out
