"""Unique ids for the rows of a data set; many data sets repeat an id for all rows of a picture."""

import hashlib

from prism_jax.data import records


class Ids:
    """The ids of a data set's rows so far, and the digests that identify equal rows."""

    def __init__(self):
        self._used: set[str] = set()
        self._numbers: dict[str, int] = {}
        self._firsts: dict[bytes, int] = {}

    def admit(self, row_id: str, row_digest: bytes, index: int) -> str:
        """Return the row's id, with a number appended if another row has the same id.

        Raises:
          RowError: an earlier row has the same id and content.
        """
        key = hashlib.sha256(row_id.encode() + row_digest).digest()[:16]
        first = self._firsts.setdefault(key, index)
        if first != index:
            raise records.RowError("duplicate", f"the same as row {first + 1} of the data set")
        unique = row_id
        while unique in self._used:
            number = self._numbers[row_id] = self._numbers.get(row_id, 1) + 1
            unique = f"{row_id}#{number}"
        self._used.add(unique)
        return unique
