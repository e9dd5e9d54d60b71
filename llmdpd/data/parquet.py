"""Reading parquet files of strangers with pyarrow (an optional extra: `pip install 'llmdpd[lerobot]'`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmdpd.data.content import EXPANSION, FREE
from llmdpd.data.trajectories import check_finite
from llmdpd.errors import InputError, located
from llmdpd.utils.extras import extra
from llmdpd.utils.files import check_regular


def read_table(path: Path, columns: Sequence[str] | None = None) -> Any:
    """A file as `pyarrow.Table`: all columns, or those of `columns` that it has.

    Raises InputError where the file is missing, cut off, damaged or no parquet, and where pyarrow can't be imported.
    """
    with located(path), extra("lerobot"):
        import pyarrow.parquet as parquet
    check_regular(path, "a parquet file")
    try:
        # Not `read_table`, which takes names of folders such as "date=1" for columns.
        with parquet.ParquetFile(path) as file:
            _check_size(file.metadata, path)
            table = file.read(columns=None if columns is None else list(columns))
            table.validate(full=True)
    except InputError:
        raise
    except Exception as error:  # pyarrow raises its own, and OSError, ValueError and TypeError in its Python part
        found = f"{path.stat().st_size} bytes; {type(error).__name__}: {error}"[:300]
        problem = "not a parquet file, or one that is cut off or damaged"
        raise InputError(problem, path=path, found=found, expected="a whole parquet file") from None
    return table


def _check_size(metadata: Any, path: Path) -> None:
    size, limit = metadata.num_rows * metadata.num_columns * 8, FREE + EXPANSION * path.stat().st_size
    if size > limit:
        problem, found = "more numbers than such a file can hold", f"{metadata.num_rows:,} rows"
        raise InputError(problem, path=path, found=found, expected=f"at most {limit:,} bytes")


def read_numbers(table: Any, name: str, width: int, path: Path) -> NDArray[np.float32]:
    """A column of numbers or of lists of `width` numbers, f32 [N, width].

    Raises InputError where it is absent, of another type or width, and for missing values, NaN and Inf.
    """
    with extra("lerobot"):
        import pyarrow as arrow
    parts = [np.zeros((0, width), np.float32)]
    for chunk in _column(table, name, path).chunks:
        values = chunk.storage if isinstance(chunk, arrow.ExtensionArray) else chunk
        _check_present(values, name, path)
        lists = isinstance(values, (arrow.ListArray, arrow.LargeListArray, arrow.FixedSizeListArray))
        lengths = np.unique(values.value_lengths().to_numpy(zero_copy_only=False)) if lists else np.array([1])
        if any(length != width for length in lengths):
            found, expected = f"{', '.join(map(str, lengths[:4]))} numbers a step", f"{width} a step"
            raise InputError("wrong width", path=path, field=name, found=found, expected=expected)
        numbers = values.flatten() if lists else values
        _check_present(numbers, name, path)
        kind = numbers.type
        if not (arrow.types.is_integer(kind) or arrow.types.is_floating(kind) or arrow.types.is_boolean(kind)):
            raise InputError("not numbers", path=path, field=name, found=f"type {kind}", expected="real numbers")
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes Inf, which is refused
            parts.append(numbers.to_numpy(zero_copy_only=False).astype(np.float32).reshape(-1, width))
    joined = np.concatenate(parts)
    check_finite(joined, name, str(path))
    return joined


def read_integers(table: Any, name: str, path: Path) -> NDArray[np.int64]:
    """A column of whole numbers, i64 [N]. Raises InputError where it is absent, of another type, or lacks values."""
    with extra("lerobot"):
        import pyarrow as arrow
    column = _column(table, name, path)
    if not arrow.types.is_integer(column.type):
        found = f"type {column.type}"
        raise InputError("not whole numbers", path=path, field=name, found=found, expected="whole numbers")
    _check_present(column, name, path)
    return np.asarray(column.to_numpy(), np.int64)


def _column(table: Any, name: str, path: Path) -> Any:
    count = table.column_names.count(name)
    if count != 1:
        found = ", ".join(table.column_names) if count == 0 else f"{count} of this name"
        raise InputError("a column is missing", path=path, field=name, found=found, expected="one such column")
    return table.column(name)


def _check_present(values: Any, name: str, path: Path) -> None:
    if values.null_count:
        raise InputError(
            "missing values", path=path, field=name, found=f"{values.null_count} nulls", expected="numbers"
        )
