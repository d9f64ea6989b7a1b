"""Which ids of documents have been seen: on disk, so that memory does not grow with a corpus."""

import hashlib
import sqlite3
from pathlib import Path

from moebius.errors import DataError


class SeenIds:
    """The ids of all documents so far, as hashes of 16 bytes.

    It goes on from a number of documents: what a killed preparation had put in after it is left
    out.
    """

    def __init__(self, path: Path, documents: int) -> None:
        self.path = path
        if documents == 0:
            self._remove()
        try:
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
        except sqlite3.Error as error:
            raise DataError(
                f"data.dir: cannot use '{path}': {error}", "delete the folder"
            ) from None

    def add(self, document_id: str, number: int) -> bool:
        """Put in the id of a document; False where it is there already."""
        digest = hashlib.blake2b(document_id.encode(), digest_size=16).digest()
        row = (digest, number)
        return self.database.execute("INSERT OR IGNORE INTO seen VALUES (?, ?)", row).rowcount == 1

    def commit(self) -> None:
        """Force everything to disk."""
        self.database.execute("COMMIT")
        self.database.execute("BEGIN")

    def close(self) -> None:
        """Let go of the file."""
        self.database.close()

    def delete(self) -> None:
        """Close, and remove the files."""
        self.close()
        self._remove()

    def _remove(self) -> None:
        """The log, too: it would be replayed into a new database."""
        for suffix in ("", "-wal", "-shm"):
            self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)
