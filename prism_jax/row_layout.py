"""Over how many parts of a mesh rows are spread, and which rows go there."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowLayout:
    """The sizes of a run's devices that decide which rows it can compute."""

    row_parts: int  # parts of the mesh, data x fsdp, over which the rows of a microbatch are spread
    token_multiple: int  # of the tokens and patches of a row, as attention reads them
    length_parts: int = 1  # parts of the mesh over which the length of a row is split

    def rows(self, num_rows: int) -> int:
        """Return the rows of a microbatch; -1 is one a part."""
        return self.row_parts if num_rows == -1 else num_rows

    def problems(self, num_rows: int, *sizes: int, name: str, size_names: str) -> list[str]:
        """Return the problems of rows of these numbers of tokens or patches.

        Args:
          name, size_names: of the fields, for the messages.
        """
        found, parts = [], self.row_parts
        if self.rows(num_rows) % parts:
            above = -(-num_rows // parts) * parts
            right = " or ".join(str(n) for n in (above - parts, above) if n)
            found.append(
                f"{name} must be -1, a row on each of the {parts} parts (data x fsdp) of the mesh, "
                f"or a multiple of {parts} such as {right}, got {num_rows}"
            )
        wrong = [size for size in sizes if size % self.token_multiple]
        if wrong:
            multiple = self.token_multiple
            reasons = []
            if self.length_parts > 1:
                reasons.append(f"{self.length_parts} parts along mesh.axes.sequence")
            if multiple > self.length_parts:
                reasons.append("splash attention")
            right = ", ".join(str(-(-size // multiple) * multiple) for size in wrong)
            found.append(
                f"{size_names} must be a multiple of {multiple} for {' of '.join(reasons)}, got "
                f"{', '.join(map(str, wrong))}; {right} would do"
            )
        return found
