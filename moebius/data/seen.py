"""Which ids of documents have been seen: on disk, so that memory does not grow with a corpus."""

import hashlib
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moebius.errors import DataError

SEEN_NAME = "ids.sqlite"


class SeenIds:
    """The ids of all documents so far, as hashes of 16 bytes.

    It goes on from a number of documents: what a killed preparation had put in after it is left
    out.
    """

    def __init__(self, path: Path, documents: int) -> None:
        self.path = path
        if documents == 0:
            delete_database(path)
        with self._explained():
            self.database = sqlite3.connect(path, isolation_level=None)
            # Losing the last writes is all right: `commit` is followed by the journal's.
            self.database.execute("PRAGMA journal_mode=WAL")
            self.database.execute("PRAGMA synchronous=FULL")
            self.database.execute(
                "CREATE TABLE IF NOT EXISTS seen"
                " (id BLOB PRIMARY KEY, number INTEGER) WITHOUT ROWID"
            )
            self.database.execute("DELETE FROM seen WHERE number >= ?", (documents,))
            self.database.execute("BEGIN")

    def add(self, document_id: str, number: int) -> bool:
        """Put in the id of a document; False where it is there already."""
        digest = hashlib.blake2b(document_id.encode(), digest_size=16).digest()
        insert = "INSERT OR IGNORE INTO seen VALUES (?, ?)"
        with self._explained():
            return self.database.execute(insert, (digest, number)).rowcount == 1

    def commit(self) -> None:
        """Force everything to disk."""
        with self._explained():
            self.database.execute("COMMIT")
            self.database.execute("BEGIN")

    def close(self) -> None:
        """Let go of the file."""
        self.database.close()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise DataError(
                f"data.dir: cannot use '{self.path}': {error}",
                "make room and start again; if that does not help, delete its folder",
            ) from error


def delete_database(path: Path) -> None:
    """Remove it with its log, which would be replayed into a new one."""
    for suffix in ("", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
