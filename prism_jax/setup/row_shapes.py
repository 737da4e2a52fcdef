"""The packed rows into which the sequences of a batch are laid, and their static shapes."""

import dataclasses

from prism_jax import configuration, errors, row_layout
from prism_jax import rows as packed_rows
from prism_jax.rows import Largest, RowShape
from prism_jax.setup import devices as devices_lib

# The name of the rows of a microbatch in a position of the data, see `Rows.num_rows`.
SPLIT = "rows of a microbatch, which a router's term and dropout depend on,"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows(configuration.Section):
    """Say into which packed rows sequences are laid; how many follows from the largest batch."""

    row_tokens: int
    row_sequences: int  # most sequences in a row
    # Of a microbatch, over all devices; -1: one on each part (data x fsdp) of the mesh. It does not
    # change what a step learns from, which is laid into as many microbatches as it needs, so it may
    # change on resume. Where it would change the training (a router's term, dropout), the position
    # in the data keeps it, and another number of rows is refused.
    num_rows: int = configuration.free()

    def problems(self) -> list[str]:
        """See `Section`."""
        found = configuration.at_least(self, 1, "row_tokens", "row_sequences")
        if self.num_rows != -1:
            found += configuration.at_least(self, 1, "num_rows")
        return found

    def problems_on(self, layout: row_layout.RowLayout) -> list[str]:
        """See `configuration.TrainingRun`."""
        return layout.problems(
            self.num_rows, self.row_tokens, name="num_rows", size_names="row_tokens"
        )

    def shape(
        self, largest: Largest, devices: devices_lib.Devices, *, place: str, advice: str = ""
    ) -> RowShape:
        """Return the static shapes of a batch.

        Args:
          place: this section in the configuration, for errors.
          advice: another way out where rows are too short, for the error.

        Raises:
          InputError: the rows are too short, or do not divide over the devices.
        """
        layout = devices.layout()
        problems = self.problems_on(layout)
        if problems:
            raise errors.InputError("; ".join(f"{place}.{problem}" for problem in problems))
        return packed_rows.row_shape(
            largest,
            row_tokens=self.row_tokens,
            row_sequences=self.row_sequences,
            microbatch_rows=layout.rows(self.num_rows),
            patch_multiple=layout.token_multiple,
            place=place,
            advice=advice,
        )
