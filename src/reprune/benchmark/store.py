"""`Store`: records as JSON lines in a folder, queried with DuckDB."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import ValidationError

from reprune.benchmark.extra import needed
from reprune.benchmark.record import COLUMNS, Record, rows
from reprune.benchmark.settings import model_digest, settings_digest
from reprune.benchmark.spec import FORMAT
from reprune.errors import DataError
from reprune.files import atomic_file, check_writable
from reprune.results import from_json, to_json

ARROW = {"VARCHAR": pa.string(), "BIGINT": pa.int64(), "DOUBLE": pa.float64()}


class Store:
    """A folder of records.

    `store.json` names the format; `records.jsonl` holds one record a line, appended whole under a
    lock, so that several sweeps can share a store; `models/` keeps trained models by the key of
    their spec. The last record of a key counts. A last line that was cut off (a machine that lost
    power) is left alone and does not count.

    Args:
        path: the folder; made on the first `add` where it is not there.

    Raises:
        DataError: the folder was written by a newer version, or is no store.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.lines = self.path / "records.jsonl"
        if self.path.exists() and not self.path.is_dir():
            raise DataError(f"{self.path} is a file; expected the folder of a store")
        head = self.path / "store.json"
        if not head.exists():
            if self.lines.exists():
                raise DataError(f"{self.path} has records but no store.json, so it is no store")
            return
        try:
            found = json.loads(head.read_text("utf-8"))["format"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{head} is damaged: expected {{'format': {FORMAT}}}") from error
        if found != FORMAT:
            raise DataError(
                f"{self.path} was written in format {found}, this version of reprune knows format "
                f"{FORMAT}; it is left as it is: use the version that wrote it, or another store"
            )

    def check(self) -> None:
        """Raises `OutputError` if records cannot be added."""
        check_writable(self.lines, folder=False)

    @property
    def models(self) -> Path:
        """Where trained models are kept."""
        return self.path / "models"

    def records(self) -> dict[str, Record]:
        """All records by key, in the order in which their keys came first.

        Those of methods, attacks or trainings whose defaults are others now are left out: they are
        of other experiments.

        Raises:
            DataError: a line that is no record; the message names it.
        """
        if not self.lines.exists():
            return {}
        found: dict[str, Record] = {}
        *whole, _cut_off = self.lines.read_text("utf-8").split("\n")
        for number, line in enumerate(whole, 1):
            try:
                record = from_json(Record, json.loads(line))
            except (ValueError, ValidationError) as error:
                raise DataError(f"{self.lines}, line {number} is no record: {error}") from error
            found[record.key] = record
        now: dict[str, str | None] = {}
        return {key: record for key, record in found.items() if _current(record, now)}

    def add(self, records: Iterable[Record]) -> None:
        """Append records; each line is written whole or not at all, whoever else writes."""
        text = "".join(
            json.dumps(to_json(record), allow_nan=False, ensure_ascii=False) + "\n"
            for record in records
        )
        self.path.mkdir(parents=True, exist_ok=True)
        with self.locked("records"):
            head = self.path / "store.json"
            if not head.exists():
                with atomic_file(head) as new:
                    new.write_text(json.dumps({"format": FORMAT}) + "\n", "utf-8")
            with self.lines.open("ab+") as lines:
                if lines.tell():
                    lines.seek(-1, os.SEEK_END)
                    if lines.read(1) != b"\n":  # after a crash in the middle of a line
                        self._drop_cut_off()
                lines.write(text.encode())
                lines.flush()
                os.fsync(lines.fileno())

    def _drop_cut_off(self) -> None:
        whole = self.lines.read_bytes().rpartition(b"\n")
        os.truncate(self.lines, len(whole[0]) + len(whole[1]))

    @contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """Alone among all processes that use this store; waits."""
        with self._lock(name):
            yield

    @contextmanager
    def claim(self, key: str) -> Iterator[bool]:
        """Whether the experiment is ours while the block runs; false if another sweep has it.

        The claim of a process that died is void.
        """
        timeout = needed("filelock").Timeout
        lock = self._lock(key)
        try:
            lock.acquire(blocking=False)
        except timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def _lock(self, name: str) -> Any:
        folder = self.path / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        return needed("filelock").FileLock(folder / f"{name}.lock", thread_local=False)

    def table(self) -> pa.Table:
        """All records as an Arrow table of `COLUMNS`."""
        flat = rows(list(self.records().values()))
        columns = {name: [one[name] for one in flat] for name in COLUMNS}
        schema = pa.schema([(name, ARROW[kind]) for name, kind in COLUMNS.items()])
        return pa.table(columns, schema=schema)

    def query(self, sql: str, parameters: Iterable[Any] = ()) -> list[dict[str, Any]]:
        """Rows of an SQL query over the table `records`, see `COLUMNS`.

        Example:
            >>> import tempfile
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     Store(folder).query("SELECT method, avg(asr) FROM records GROUP BY method")
            []

        Raises:
            DataError: SQL that DuckDB refuses; the message is its own.
            MissingDependencyError: DuckDB is not installed.
        """
        duckdb = needed("duckdb")
        with duckdb.connect(config={"enable_external_access": "false"}) as connection:
            connection.register("records", self.table())
            try:
                result = connection.execute(sql, list(parameters))
                names = [column[0] for column in result.description or ()]
                return [dict(zip(names, one, strict=True)) for one in result.fetchall()]
            except duckdb.Error as error:
                raise DataError(f"the query failed: {error}") from error


def _current(record: Record, now: dict[str, str | None]) -> bool:
    """Whether the method of a record, and its model, still have the settings they were made by.

    `now` keeps what the same method with the same changes has, and the same model.
    """
    spec = record.experiment
    method = json.dumps([spec.task, spec.method, spec.settings], sort_keys=True)
    ways: dict[str, tuple[str, Callable[[], str | None]]] = {
        "settings": (method, lambda: settings_digest(spec)),
        "model": (spec.model.key, lambda: model_digest(spec.model)),
    }
    for name, (same, digest) in ways.items():
        made = record.made.get(name)
        if made is not None:
            if same not in now:
                now[same] = digest()
            if made != now[same]:
                return False
    return True
