"""The function `open_database` opens an SQLite database for the server's data."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

from jamba_server.engine.errors import ConfigError


def open_database(path: Path | None, schema: str, version: int) -> sqlite3.Connection:
    """Opens or creates the database `path`, with a write-ahead log. If `path` is None, the database is in memory.

    `schema` has the SQL statements that create the tables, separated by semicolons. `version` is the version of the
    tables, which the file has as its `user_version`. Raises ConfigError if the file cannot be used or has tables of
    another version.
    """
    try:
        if path is not None:
            # Only the server's user may read the file, because it contains conversations.
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        connection = sqlite3.connect(path or ":memory:", isolation_level=None, check_same_thread=False)
    except (OSError, sqlite3.Error) as error:
        raise ConfigError(f"The database {path} cannot be opened: {error}.") from error
    try:
        _prepare(connection, path, schema, version)
    except sqlite3.Error as error:
        connection.close()
        raise ConfigError(f"The database {path} cannot be used: {error}.") from error
    except ConfigError:
        connection.close()
        raise
    return connection


def _prepare(connection: sqlite3.Connection, path: Path | None, schema: str, version: int) -> None:
    run = connection.execute
    run("PRAGMA foreign_keys = ON")
    run("PRAGMA secure_delete = ON")  # SQLite overwrites deleted conversations in the file with zeros
    run("PRAGMA journal_mode = WAL")
    run("PRAGMA synchronous = NORMAL")  # with the write-ahead log, nothing is lost if the process crashes
    [[found]] = run("PRAGMA user_version").fetchall()
    [[tables]] = run("SELECT count(*) FROM sqlite_schema").fetchall()
    if tables and found != version:
        raise ConfigError(f"The database {path} has version {found} and not {version}; move the file away.")
    if not tables:
        create_tables(connection, schema, version)


def create_tables(connection: sqlite3.Connection, schema: str, version: int) -> None:
    """Creates the tables, unless another server that uses the same file has created them meanwhile."""
    with connection:
        connection.execute("BEGIN IMMEDIATE")
        if connection.execute("PRAGMA user_version").fetchone() == (version,):
            return
        for statement in schema.split(";"):
            connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {version}")
