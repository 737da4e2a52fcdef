"""The packed rows into which the sequences of a batch are laid, and their static shapes."""

import dataclasses

from models.config import Qwen3VLConfig
from prism_jax import configuration, errors, row_layout
from prism_jax import rows as packed_rows
from prism_jax.rows import Largest, RowShape
from prism_jax.setup import devices as devices_lib

# The name of the rows of a microbatch in a position of the data, see `Rows.num_rows`.
SPLIT = "rows of a microbatch, which a router's term and dropout depend on,"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows(configuration.Section):
    """The packed rows of a batch; their number follows from the largest batch."""

    row_tokens: int
    row_sequences: int  # most sequences in a row
    # Of a microbatch, over all devices; -1: one on each part (data x fsdp) of the mesh. It does not
    # change the training, as a step is laid into as many microbatches as it needs, so it may change
    # on resume. Where it would (a router's term, dropout), the position in the data keeps it, and
    # another number of rows is refused.
    num_rows: int = configuration.free()
    has_shared_prompts: bool  # a prompt stands, and is computed, once for what follows it in a row

    def problems(self) -> list[str]:
        """See `Section`."""
        problems = configuration.at_least(self, 1, "row_tokens", "row_sequences")
        if self.num_rows != -1:
            problems += configuration.at_least(self, 1, "num_rows")
        return problems

    def problems_on(self, layout: row_layout.RowLayout) -> list[str]:
        """See `configuration.TrainingRun`."""
        return layout.problems(
            self.num_rows, self.row_tokens, name="num_rows", size_names="row_tokens"
        )

    def check_router(self, config: Qwen3VLConfig, *, place: str) -> None:
        """Raise InputError for a discriminator that reads a prompt by what follows it."""
        moe = config.text.moe
        if self.has_shared_prompts and moe is not None and moe.router == "segment":
            raise errors.InputError(
                f"{place}.has_shared_prompts must be False for a discriminator whose router goes "
                "by the kind of segment: each kind has its own hidden states of a prompt"
            )

    def shape(
        self,
        largest: Largest,
        devices: devices_lib.Devices,
        *,
        shared_units: int,
        place: str,
        advice: str = "",
    ) -> RowShape:
        """Return the static shapes of a batch, see `rows.row_shape`.

        Args:
          shared_units: consecutive units that have the same prompt.
          place: this section in the configuration, for errors.
          advice: another way out where rows are too short, for the error.

        Raises:
          InputError: the rows are too short, or do not divide over the devices.
        """
        layout = devices.layout()
        problems = self.problems_on(layout)
        if problems:
            raise errors.InputError("; ".join(f"{place}.{problem}" for problem in problems))
        num_rows = layout.rows(self.num_rows)
        return packed_rows.row_shape(
            largest,
            row_tokens=self.row_tokens,
            row_sequences=self.row_sequences,
            microbatch_rows=num_rows,
            patch_multiple=layout.token_multiple,
            shared_units=shared_units if self.has_shared_prompts else None,
            place=place,
            advice=advice,
            own_rows=devices.local_rows(num_rows),
        )
