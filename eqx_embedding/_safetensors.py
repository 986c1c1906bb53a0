"""Reads and writes tables as safetensors files, https://github.com/huggingface/safetensors."""

import contextlib
import difflib
import functools
import io
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from ._inputs import as_float_dtype
from ._table import EmbeddingTable, find_row_axis, RowAxis


# The names of input embeddings in common architectures
INPUT_EMBEDDINGS = (
    "transformer.wte.weight",  # GPT-2
    "wte.weight",
    "model.embed_tokens.weight",  # Llama, Mistral, Qwen, Gemma
    "embed_tokens.weight",
    "bert.embeddings.word_embeddings.weight",  # BERT
    "embeddings.word_embeddings.weight",
    "shared.weight",  # T5
    "model.decoder.embed_tokens.weight",  # OPT
    "gpt_neox.embed_in.weight",  # GPT-NeoX, Pythia
    "embed_in.weight",
)

METADATA = "eqx_embedding"
# The dtypes of tables, by their names in a file
DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
COPIED_AT_ONCE = 2**20  # how many numbers are read at a time
DEFAULT_NAMES = ("vocabulary", "embedding")


def load_safetensors(
    path: str | os.PathLike[str],
    name: str | None = None,
    *,
    axis_names: tuple[str, ...] = DEFAULT_NAMES,
    bias: str | None = None,
    dtype: DTypeLike | None = None,
) -> EmbeddingTable:
    """Reads one table from a safetensors file or a model directory. Other tensors are not read.

    ```python
    table = load_safetensors("path/to/model")                        # the input embeddings
    head = load_safetensors("path/to/model", "lm_head.weight")       # of an untied model
    ```

    An untied model has a second table for the output, `lm_head.weight` (in GPT-NeoX
    `embed_out.weight`): store the two tables in two fields. A tied model has no such tensor, so the
    second line is a `ValueError`: store the first table once.

    **Arguments:**

    - `path`: a `.safetensors` file, or a directory with a `model.safetensors` or, for a model in
        several files, a `model.safetensors.index.json`.
    - `name`: the tensor. Defaults to `None`: the table in a file written by
        [`eqx_embedding.save_safetensors`][], or the input embeddings of a model, by their names in
        GPT-2, Llama, Mistral, Qwen, Gemma, BERT, T5, OPT and GPT-NeoX.
    - `axis_names`: a name for each axis of the tensor. `"vocabulary"` is the axis indexed by
        tokens, or the first one if none has that name. Defaults to `("vocabulary", "embedding")`.
        With the default, the names and sizes in a file written by
        [`eqx_embedding.save_safetensors`][] are used instead.
    - `bias`: the tensor with the bias of the table, one number for each row, such as
        `"lm_head.bias"`. Defaults to `None`: the bias in a file written by
        [`eqx_embedding.save_safetensors`][], if it has one, and otherwise no bias.
    - `dtype`: the dtype of the embeddings and the bias. Defaults to `None`, which keeps the dtypes
        of the file: float16, bfloat16, float32, or, in JAX's 64-bit mode, float64.

    **Returns:**

    An [`eqx_embedding.EmbeddingTable`][]. Loading takes little more memory than the table itself.
    On CPUs this memory belongs to NumPy, and XLA does not overwrite it: the first update of the
    donated table copies it, later ones do not.

    **Raises:**

    - `FileNotFoundError` if the file, the model in a directory, or a file named by its index is
        missing; `PermissionError` if it may not be read.
    - `ValueError` if a file is incomplete, not a safetensors file, or cut short while it is read;
        if an index names a file outside of the directory.
    - `ValueError` if no tensor has that name; without a name, if none or several of the
        known names are there.
    - `ValueError` if the metadata of a file describe a tensor that it no longer has. The table may
        have been renamed: then its padding rows would become tokens, and its bias would be lost.
    - `ValueError` if a tensor has another dtype; if it does not have an axis for each name; if the
        bias does not have one number for each row; if `axis_names` disagree with those in the
        file; if `dtype` cannot hold a number of the tensor, such as 1e5 in float16; and for float64
        outside of JAX's 64-bit mode.
    - `ImportError` if the package safetensors is not installed.
    """
    path = Path(path)
    with contextlib.ExitStack() as stack:
        # Another program may replace a file between the reads of two tensors
        open_once = functools.cache(lambda file: stack.enter_context(_open(file)))
        files = _find_files(path, open_once)
        name = _choose_name(path, files, open_once) if name is None else name
        tensor = _find_tensor(path, files, name, open_once)
        layout = _saved_layout(tensor, axis_names) or _given_layout(tensor, axis_names)
        bias = layout.bias if bias is None else bias
        found = None if bias is None else _find_tensor(path, files, bias, open_once)
        embeddings = _read(tensor, dtype, layout.shape, layout.row_axis)
        bias_array = None if found is None else _read(found, dtype, found.shape)
    return EmbeddingTable(
        embeddings, layout.axis_names, layout.vocabulary_axis, layout.padding_rows, bias_array
    )


def save_safetensors(
    table: EmbeddingTable, path: str | os.PathLike[str], name: str = "embeddings"
) -> None:
    """Writes a table to a safetensors file. An old file is replaced as a whole or not at all.

    The tensor has the shape `(rows, product of embedding sizes)`, padding rows included, as other
    programs expect it. The bias, if there is one, is a second tensor of shape `(rows,)`. The
    metadata hold the names and sizes of all axes, so that [`eqx_embedding.load_safetensors`][]
    returns the same table, bit for bit.

    The new file is written to a temporary folder beside the old one, flushed to disk, and then
    moved to its place. If the process is killed, the old file does not change. Then the folder
    `<50 letters of the file name>.<random>.partial` may remain, and can be deleted.

    **Arguments:**

    - `table`: the [`eqx_embedding.EmbeddingTable`][].
    - `path`: the file. It is replaced if it exists. A symbolic link to a file, even a missing one,
        is replaced, not what it points to. The directory must exist.
    - `name`: the name of the tensor. Defaults to `"embeddings"`. The bias of `"lm_head.weight"` is
        called `"lm_head.bias"`; for a name that does not end in `.weight`, `.bias` is appended.

    **Raises:**

    - `ValueError` for a stacked table; for a table without arrays, or with arrays of a dtype that
        [`eqx_embedding.load_safetensors`][] does not read; and for the name `"__metadata__"`.
    - `FileNotFoundError` if the directory does not exist; `IsADirectoryError` if `path` is one.
    - `shutil.SpecialFileError`, which is an `OSError`, if `path` is a device, a named pipe or a
        socket, or a symbolic link to one, such as `/dev/stdout`.
    - `OSError` if the file cannot be written, for example because the disk is full.
    - `ImportError` if the package safetensors is not installed.
    """
    path, safetensors = Path(path), _import_safetensors()
    if name == "__metadata__":  # safetensors would write a broken file
        raise ValueError("the safetensors format reserves the name '__metadata__'.")
    table._check_arrays("Save one of its tables at a time.")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory: give the name of a file in it.")
    # /dev/stdout is a link to /proc, which may lead to a regular file
    is_stream = path.is_symlink() and path.readlink().is_relative_to("/proc")
    if is_stream or (path.exists() and not path.is_file()):
        raise shutil.SpecialFileError(
            f"{path} is a device, a named pipe or a socket: give the name of a regular file."
        )
    tensors, layout = _as_tensors(table, name)
    with tempfile.TemporaryDirectory(".partial", path.name[:50] + ".", path.parent) as folder:
        new, blank = Path(folder, "new"), Path(folder, "blank")
        try:
            safetensors.numpy.save_file(tensors, new, {METADATA: json.dumps(layout)})
        except safetensors.SafetensorError as error:  # such as a full disk
            code = re.search(r"os error (\d+)", str(error))
            raise OSError(int(code[1]) if code else None, str(error), str(path)) from None
        # safetensors makes a file that only its owner can read
        blank.touch()
        shutil.copymode(path if path.exists() else blank, new)
        with open(new, "rb") as file:
            os.fsync(file.fileno())
        os.replace(new, path)


class File(NamedTuple):
    """An open safetensors file."""

    stream: io.BufferedReader
    start: int  # of the first tensor, in bytes
    header: dict[str, Any]  # the dtype, shape and place of each tensor
    metadata: dict[str, str]


class Tensor(NamedTuple):
    """A tensor of a file, which is not read yet."""

    name: str
    file: File
    shape: tuple[int, ...]
    dtype: np.dtype
    about: str  # for error messages


class Layout(NamedTuple):
    """The axes of a table, and its padding and bias."""

    axis_names: tuple[str, ...]
    shape: tuple[int, ...]
    vocabulary_axis: str
    padding_rows: int = 0
    bias: str | None = None  # the name of another tensor
    row_axis: RowAxis = RowAxis(0)  # where the first axis of the tensor goes


Open = Callable[[Path], File]


def _as_tensors(table: EmbeddingTable, name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The tensors of a file, and the layout to store in its metadata."""
    rows = table._row_axis.move_first(np.asarray(table.embeddings))
    tensors = {name: rows.reshape(len(rows), -1)}
    bias_name = None
    if table.bias is not None:
        bias_name = name.removesuffix(".weight") + ".bias"
        tensors[bias_name] = np.asarray(table.bias)
    for tensor in tensors.values():
        if tensor.dtype.name not in DTYPES.values():
            raise ValueError(
                f"a table of {tensor.dtype.name} cannot be saved: convert it to "
                f"{' or '.join(DTYPES.values())}."
            )
    layout = {
        "name": name,
        "axes": dict(zip(table.axis_names, table.embeddings.shape)),
        "vocabulary_axis": table.vocabulary_axis,
        "padding_rows": table.padding_rows,
        "bias": bias_name,
    }
    # safetensors ignores the strides of an array
    return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, layout


def _import_safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError:
        raise ImportError(
            "load_safetensors and save_safetensors need the package safetensors: pip install "
            "safetensors, or pip install 'eqx_embedding[safetensors]'."
        ) from None
    return safetensors


@contextlib.contextmanager
def _open(path: Path) -> Iterator[File]:
    safetensors = _import_safetensors()
    if not path.is_file():  # a named pipe would wait for a writer
        raise FileNotFoundError(
            f"cannot find the file {path}. Nothing is downloaded here: "
            "huggingface_hub.snapshot_download downloads a model and returns its directory."
        )
    with open(path, "rb") as stream:
        try:
            # Only checks: the pages that its tensors map would count as memory of the process
            with safetensors.safe_open(path, framework="numpy"):
                pass
        except safetensors.SafetensorError as error:
            raise ValueError(
                f"{path} is not a whole safetensors file ({error}). It has another format, or was "
                f"cut short after {path.stat().st_size} bytes."
            ) from None
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
        metadata = header.pop("__metadata__", None) or {}
        yield File(stream, 8 + size, header, metadata)


def _find_files(path: Path, open_once: Open) -> dict[str, Path]:
    """The file that holds each tensor."""
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if not path.is_dir() or single.is_file():
        path = single if path.is_dir() else path
        return dict.fromkeys(open_once(path).header, path)
    if not index.is_file():
        others = sorted(file.name for file in path.glob("*.safetensors") if file.is_file())
        raise FileNotFoundError(
            f"the directory {path} has neither {single.name} nor {index.name}."
            + (f" Give one of its files: {', '.join(others)}." if others else "")
        )
    try:
        files = json.loads(index.read_text("utf-8"))["weight_map"]
        places = {file: path / file for file in files.values()}
        for file in places.values():
            if path not in file.parents or ".." in file.relative_to(path).parts:
                raise ValueError(f"it names the file {file}, outside of the directory")
        files = {name: places[file] for name, file in files.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(
            f'{index} is not the index of a model: it should be JSON with a "weight_map" from '
            f"names of tensors to files ({type(error).__name__}: {error})."
        ) from None
    return files


def _choose_name(path: Path, files: dict[str, Path], open_once: Open) -> str:
    """The tensor to load if the caller does not name one."""
    if len({*files.values()}) == 1:
        metadata = open_once(next(iter(files.values()))).metadata
        layout = _parse(metadata)
        if isinstance(layout.get("name"), str) and layout["name"] in files:
            return layout["name"]
        saved = [name for name in files if name != layout.get("bias")]
        if METADATA in metadata and len(saved) == 1:
            return saved[0]
    found = [name for name in INPUT_EMBEDDINGS if name in files]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"{path} has several tables: give the name of one of {found}.")
    similar = [
        name
        for name in files
        if re.search(r"embed|wte|shared|emb\.", name)
        and not re.search("position|norm|type|bias", name, re.IGNORECASE)
    ]
    shown = (similar or list(files))[:10]
    raise ValueError(
        f"none of the {len(files)} tensors in {path} has a known name of input embeddings."
        + (f" Give a name, such as {', '.join(map(repr, shown))}." if shown else "")
    )


def _find_tensor(path: Path, files: dict[str, Path], name: str, open_once: Open) -> Tensor:
    if name not in files:
        # one of each layer, and each expert, of which there may be many
        kinds = {re.sub(r"\d+", "0", other): other for other in reversed(files)}
        near = difflib.get_close_matches(name, kinds.values(), n=5, cutoff=0.0)
        raise ValueError(
            f"{path} has no tensor {name!r}. Of its {len(files)} tensors, the nearest names are "
            f"{', '.join(map(repr, near)) or 'none'}."
        )
    about = f"tensor {name!r} of {files[name]}"
    file = open_once(files[name])
    if name not in file.header:
        raise ValueError(
            f"the index in {path} says that {name!r} is in {files[name].name}, but it is not. "
            "The directory mixes two models, or its index is out of date."
        )
    kind, shape = file.header[name]["dtype"], tuple(file.header[name]["shape"])
    if kind not in DTYPES:
        raise ValueError(f"{about} has dtype {kind}, expected {' or '.join(DTYPES.values())}.")
    return Tensor(name, file, shape, jnp.dtype(DTYPES[kind]), about)


def _read(
    tensor: Tensor,
    dtype: DTypeLike | None,
    shape: tuple[int, ...],
    row_axis: RowAxis = RowAxis(0),
) -> jax.Array:
    """The tensor in another dtype and shape, with its first axis moved."""
    wanted = as_float_dtype("embeddings", "dtype", tensor.dtype if dtype is None else dtype)
    if wanted == np.float64 and not jax.config.read("jax_enable_x64"):
        raise ValueError(
            f"{tensor.about} would be float64, which JAX has only in its 64-bit mode: use "
            "dtype=jnp.float32, or call jax.config.update('jax_enable_x64', True)."
        )
    array = _empty(shape, wanted)
    rows = array.reshape(-1) if row_axis == RowAxis(0) else row_axis.move_first(array)
    step = max(1, COPIED_AT_ONCE // math.prod(rows.shape[1:]))
    largest = float(jnp.finfo(wanted).max)
    stream, start, header, _ = tensor.file
    stream.seek(start + header[tensor.name]["data_offsets"][0])
    # In blocks, because a whole array of another dtype or order would double the peak of memory
    for i in range(0, len(rows), step):
        part = rows[i : i + step]
        block = np.fromfile(stream, tensor.dtype, part.size)
        if block.size < part.size:
            raise ValueError(f"{tensor.about} was cut short while it was read.")
        block = block.reshape(part.shape)
        with np.errstate(over="ignore"):
            part[...] = block
        # A float8 may have NaN, but no infinity; a float4 has neither
        tests = () if tensor.dtype == wanted else (np.isinf, np.isnan)
        differs = any(np.any(test(part) != test(block)) for test in tests)
        if differs or (jnp.finfo(wanted).bits < 8 and np.any(np.abs(block) > largest)):
            raise ValueError(
                f"{tensor.about} has numbers that {wanted.name} cannot hold: load it in another "
                "dtype."
            )
    return jax.device_put(array, may_alias=True)


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array that JAX on a CPU uses in place: it copies those that are not aligned."""
    size = math.prod(shape) * dtype.itemsize
    buffer = np.empty(size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size].view(dtype).reshape(shape)


def _given_layout(tensor: Tensor, axis_names: tuple[str, ...]) -> Layout:
    """The layout of a tensor that another program saved."""
    shape = tensor.shape
    if len(shape) != len(axis_names):
        advice = (
            " Load it with two names, and then split its embedding axis: EmbeddingTable("
            'table.embeddings.reshape(-1, heads, features), ("vocabulary", "heads", '
            '"features")).'
        )
        raise ValueError(
            f"{tensor.about} has {len(shape)} axes, {shape}, but {len(axis_names)} are named: "
            f"axis_names={axis_names}." + (advice if 2 == len(shape) < len(axis_names) else "")
        )
    first = axis_names[0] if axis_names else "vocabulary"
    return Layout(axis_names, shape, "vocabulary" if "vocabulary" in axis_names else first)


def _saved_layout(tensor: Tensor, axis_names: tuple[str, ...]) -> Layout | None:
    """The layout that `save_safetensors` stored for this tensor, or `None`."""
    shape, metadata, saved = tensor.shape, tensor.file.metadata, _parse(tensor.file.metadata)
    described = saved.get("name", tensor.name)
    if METADATA in metadata and described not in list(tensor.file.header):
        raise ValueError(
            f"the metadata {METADATA!r} in the file of {tensor.about} say which rows of the tensor "
            f"{described!r} are padding, but the file has no such tensor, only "
            f"{', '.join(map(repr, list(tensor.file.header)[:10]))}. If the tensor was renamed, "
            "save the table again under its new name, save_safetensors(table, path, name), or "
            "write that name to the metadata. If the table is gone, remove these metadata."
        )
    if METADATA not in metadata or described != tensor.name:
        return None
    try:
        axes, vocabulary_axis = dict(saved["axes"]), saved["vocabulary_axis"]
        rows, padding_rows, bias = axes[vocabulary_axis], saved["padding_rows"], saved["bias"]
        are_integers = {type(number) for number in (*axes.values(), padding_rows)} == {int}
        fits = are_integers and min(axes.values()) > 0
        fits = fits and shape == (rows, math.prod(axes.values()) // rows)
        fits = fits and isinstance(bias, str | None)
    except (ValueError, TypeError, KeyError):
        fits, axes, vocabulary_axis, padding_rows, bias = False, {}, "", 0, None
    if not fits:
        raise ValueError(
            f"the metadata of {tensor.about} does not fit its shape {shape}: "
            f"{metadata[METADATA]}. The file was changed after it was saved."
        )
    names = tuple(axes)
    if axis_names not in (DEFAULT_NAMES, names):
        raise ValueError(
            f"{tensor.about} was saved with axis_names={names}, which disagree with "
            f"axis_names={axis_names}. Leave them out, and rename the axes of the loaded table."
        )
    row_axis = find_row_axis(names, vocabulary_axis)
    return Layout(names, tuple(axes.values()), vocabulary_axis, padding_rows, bias, row_axis)


def _parse(metadata: dict[str, str]) -> dict[str, Any]:
    """The metadata that `save_safetensors` stored, or an empty dict if it is unreadable."""
    try:
        saved = json.loads(metadata[METADATA])
    except (ValueError, KeyError, RecursionError):
        return {}
    return saved if isinstance(saved, dict) else {}
