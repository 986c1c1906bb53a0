"""Tables in and out of safetensors files, https://github.com/huggingface/safetensors."""

import difflib
import json
import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from ._numbers import as_float_dtype
from ._table import EmbeddingTable
from ._tokens import as_array


# What the usual architectures call their input embeddings.
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
# The dtypes of embeddings, and their names in a file.
DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}
DEFAULT_NAMES = ("vocabulary", "embedding")


def load_safetensors(
    path: str | os.PathLike[str],
    name: str | None = None,
    *,
    axis_names: tuple[str, ...] = DEFAULT_NAMES,
    dtype: DTypeLike | None = None,
) -> EmbeddingTable:
    """Reads one table, and only that tensor's bytes, from a safetensors file or a model directory.

    ```python
    table = load_safetensors("path/to/model")                        # the input embeddings
    head = load_safetensors("path/to/model", "lm_head.weight")       # of an untied model
    ```

    A model is untied if it has a table of its own for the output, `lm_head.weight` (in GPT-NeoX
    `embed_out.weight`): then both lines above give a table, to be stored in two fields. In a tied
    one the second line is a `ValueError`, for there is no such tensor: store the first table once.

    **Arguments:**

    - `path`: a `.safetensors` file, or a directory with a `model.safetensors` or, for a model in
        several files, a `model.safetensors.index.json`.
    - `name`: the tensor. Defaults to `None`: the one of a file by
        [`eqx_embedding.save_safetensors`][], or the input embeddings, by the names that they have
        in GPT-2, Llama, Mistral, Qwen, Gemma, BERT, T5, OPT and GPT-NeoX.
    - `axis_names`: a name for each axis of the tensor. `"vocabulary"` is the axis that is indexed
        by tokens, or the first if none is called that. A file by
        [`eqx_embedding.save_safetensors`][] knows its names and sizes, which hold whenever these
        are left at their default.
    - `dtype`: the dtype of the embeddings. Defaults to `None`, which is that of the file: float16,
        bfloat16, float32, or in JAX's 64-bit mode float64.

    **Returns:**

    An [`eqx_embedding.EmbeddingTable`][].

    **Raises:**

    A `FileNotFoundError` if the file, the model in a directory, or a file that its index names is
    missing; a `PermissionError` if it may not be read. A `ValueError` if a file is not whole or not
    safetensors; for a name that is not there; without a name if none or several of the known names
    are there; for an index that names a file outside of the directory; for a tensor that is not of
    these dtypes or has another number of axes than `axis_names`; for `axis_names` which disagree
    with those in the file; and for float64 outside of the 64-bit mode. An `ImportError` without the
    package safetensors.
    """
    if not axis_names:
        raise ValueError("axis_names must have a name for the vocabulary at least, got ().")
    path = Path(path)
    files = _files_of_tensors(path)
    if not files:
        raise ValueError(f"{path} has no tensors.")
    if name is None:
        name = _choose(path, files)
    if name not in files:
        near = difflib.get_close_matches(name, files, n=5, cutoff=0.0)
        raise ValueError(
            f"{path} has no tensor {name!r}. Of its {len(files)} tensors, the nearest names are "
            f"{', '.join(map(repr, near))}."
        )
    with _open(files[name]) as file:
        if name not in file.keys():
            raise ValueError(
                f"the index in {path} says that {name!r} is in {files[name].name}, which does not "
                "have it. The directory mixes two models, or its index is out of date."
            )
        about = f"tensor {name!r} of {files[name]}"
        stored = file.get_slice(name)
        shape, kind = tuple(stored.get_shape()), stored.get_dtype()
        if kind not in DTYPES.values():
            raise ValueError(f"{about} is of {kind}: embeddings are {' or '.join(DTYPES)}.")
        layout = _layout(file.metadata(), name, shape, axis_names, about)
        if layout is None and len(shape) != len(axis_names):
            advice = (
                " Load it with two names, and give the embedding its axes: EmbeddingTable("
                'table.embeddings.reshape(-1, heads, features), ("vocabulary", "heads", '
                '"features")).'
            )
            raise ValueError(
                f"{about} has {len(shape)} axes, {shape}, but {len(axis_names)} are named: "
                f"axis_names={axis_names}." + (advice if 2 == len(shape) < len(axis_names) else "")
            )
        array = file.get_tensor(name)

    wanted = as_float_dtype("embeddings", "dtype", array.dtype if dtype is None else dtype)
    if wanted == np.float64 and not jax.config.read("jax_enable_x64"):
        raise ValueError(
            f"{about} would be float64, which JAX has in its 64-bit mode only: give "
            "dtype=jnp.float32, or jax.config.update('jax_enable_x64', True)."
        )
    if layout is None:
        vocabulary_axis = "vocabulary" if "vocabulary" in axis_names else axis_names[0]
        return EmbeddingTable(jnp.asarray(array, wanted), axis_names, vocabulary_axis)
    sizes, vocabulary_axis, padding_rows = layout
    axis = list(sizes).index(vocabulary_axis)
    rest = [size for name, size in sizes.items() if name != vocabulary_axis]
    array = np.moveaxis(array.reshape(-1, *rest), 0, axis)
    return EmbeddingTable(jnp.asarray(array, wanted), tuple(sizes), vocabulary_axis, padding_rows)


def save_safetensors(
    table: EmbeddingTable, path: str | os.PathLike[str], name: str = "embeddings"
) -> None:
    """Writes a table to a safetensors file, which is replaced whole or not at all.

    The tensor has the shape `(rows, product of embedding sizes)`, as other programs expect it,
    padding rows included. The names and sizes of all axes stand in the metadata, so that
    [`eqx_embedding.load_safetensors`][] gives the same table back, bit for bit.

    The new file is written and synchronised to disk in a temporary folder beside the old one, then
    put in its place. A process that is killed meanwhile leaves the old file as it was and that
    folder, `<50 letters of the file name>.<random>.partial`, which may be deleted.

    **Arguments:**

    - `table`: the [`eqx_embedding.EmbeddingTable`][].
    - `path`: the file. It is replaced if it exists, as is a symbolic link, and not what it points
        to. Its directory must exist.
    - `name`: the name of the tensor. Defaults to `"embeddings"`.

    **Raises:**

    A `ValueError` for a stacked table, one without an array or with an array of a dtype that
    [`eqx_embedding.load_safetensors`][] does not read, and for the name `"__metadata__"`. A
    `FileNotFoundError` if there is no such directory, an `IsADirectoryError` if `path` is one. An
    `ImportError` without the package safetensors.
    """
    path, save_file = Path(path), _library().numpy.save_file
    if name == "__metadata__":  # the file would be broken
        raise ValueError("the safetensors format keeps the name '__metadata__' for itself.")
    if not isinstance(table.embeddings, jax.Array | np.ndarray):
        raise ValueError(
            "there are no embeddings to save: in their place the table has "
            f"{type(table.embeddings).__name__}."
        )
    if table.embeddings.dtype.name not in DTYPES:
        raise ValueError(
            f"embeddings of {table.embeddings.dtype.name} cannot be saved: convert them to "
            f"{' or '.join(DTYPES)}."
        )
    axis = table._vocabulary_position("Save one of its tables at a time.")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory: give the name of a file in it.")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"there is no directory {path.parent} to write {path.name} to.")
    rows = np.moveaxis(np.asarray(as_array("embeddings", table.embeddings)), axis, 0)
    about = {
        "name": name,
        "axes": dict(zip(table.axis_names, table.embeddings.shape)),
        "vocabulary_axis": table.vocabulary_axis,
        "padding_rows": table.padding_rows,
    }
    with tempfile.TemporaryDirectory(".partial", path.name[:50] + ".", path.parent) as folder:
        new, blank = Path(folder, "new"), Path(folder, "blank")
        # safetensors writes what lies in memory, whatever the strides say
        tensor = np.ascontiguousarray(rows.reshape(len(rows), -1))
        save_file({name: tensor}, new, {METADATA: json.dumps(about)})
        blank.touch()  # has the usual permissions, which `new` need not have
        shutil.copymode(path if path.exists() else blank, new)
        with open(new, "rb") as file:
            os.fsync(file.fileno())
        os.replace(new, path)


def _library() -> Any:
    try:
        import safetensors.numpy
    except ImportError:
        raise ImportError(
            "load_safetensors and save_safetensors need the package safetensors: pip install "
            "safetensors, or pip install 'eqx_embedding[safetensors]'."
        ) from None
    return safetensors


def _open(path: Path) -> Any:
    library = _library()
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    with open(path, "rb"):  # safetensors would say that a file which may not be read is not there
        pass
    try:
        return library.safe_open(path, framework="numpy")
    except library.SafetensorError as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}). It is of another kind, or was cut "
            f"short: it has {path.stat().st_size} bytes."
        ) from None


def _files_of_tensors(path: Path) -> dict[str, Path]:
    """The file that holds each tensor."""
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if not path.is_dir() or single.is_file():
        path = single if path.is_dir() else path
        with _open(path) as file:
            return dict.fromkeys(file.keys(), path)
    if not index.is_file():
        others = sorted(file.name for file in path.glob("*.safetensors") if file.is_file())
        raise FileNotFoundError(
            f"the directory {path} has neither {single.name} nor {index.name}."
            + (f" Give one of its files: {', '.join(others)}." if others else "")
        )
    try:
        files = json.loads(index.read_text("utf-8"))["weight_map"]
        files = {name: path / file for name, file in files.items()}
        for name, file in files.items():
            if path not in file.parents or ".." in file.relative_to(path).parts:
                raise ValueError(f"{name!r} is said to be in {file}, outside of the directory")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f'{index} is not the index of a model: it should be JSON with a "weight_map" from '
            f"tensors to files ({type(error).__name__}: {error})."
        ) from None
    return files


def _choose(path: Path, files: dict[str, Path]) -> str:
    """The tensor to load if nobody says which."""
    if len(files) == 1:
        [(name, file)] = files.items()
        with _open(file) as opened:
            if METADATA in (opened.metadata() or {}):
                return name
    found = [name for name in INPUT_EMBEDDINGS if name in files]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"{path} has several tables: give the name of one, {found}.")
    similar = [name for name in files if any(part in name for part in ("embed", "wte", "emb."))]
    shown = (similar or list(files))[:10]
    raise ValueError(
        f"none of the {len(files)} tensors of {path} has a name known for input embeddings. Give a "
        f"name, such as {', '.join(map(repr, shown))}."
    )


def _layout(
    metadata: dict[str, str] | None,
    name: str,
    shape: tuple[int, ...],
    axis_names: tuple[str, ...],
    about: str,
) -> tuple[dict[str, int], str, int] | None:
    """Sizes of the axes, vocabulary axis and padding rows as `save_safetensors` noted them."""
    if metadata is None or METADATA not in metadata:
        return None
    try:
        noted = json.loads(metadata[METADATA])
        axes, vocabulary_axis = dict(noted["axes"]), noted["vocabulary_axis"]
        rows, padding_rows = axes[vocabulary_axis], noted["padding_rows"]
        whole = {type(number) for number in (*axes.values(), padding_rows)} == {int}
        fits = whole and rows > 0 and shape == (rows, math.prod(axes.values()) // rows)
        if noted["name"] != name:
            return None
    except (ValueError, TypeError, KeyError):
        fits, axes, vocabulary_axis, padding_rows = False, {}, "", 0
    if not fits:
        raise ValueError(
            f"the metadata of {about} does not fit its shape {shape}: {metadata[METADATA]}. The "
            "file was changed after it was saved."
        )
    if axis_names not in (DEFAULT_NAMES, tuple(axes)):
        raise ValueError(
            f"{about} was saved with axis_names={tuple(axes)}, which disagree with "
            f"axis_names={axis_names}. Leave them out, and rename the axes of the table."
        )
    return axes, vocabulary_axis, padding_rows
