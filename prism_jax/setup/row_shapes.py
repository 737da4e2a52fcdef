"""The packed rows into which the sequences of a batch are laid, and their static shapes."""

import dataclasses

from models.config import Qwen3VLConfig
from prism_jax import batches, configuration, errors
from prism_jax import rows as packed_rows
from prism_jax.rows import Largest, RowShape
from prism_jax.setup import devices as devices_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows(configuration.Section):
    """The packed rows of a batch; their number follows from the largest batch."""

    row_tokens: int
    row_sequences: int  # most sequences in a row
    num_rows: int  # of a microbatch, over all devices
    has_shared_prompts: bool  # a prompt stands, and is computed, once for what follows it in a row

    def problems(self) -> list[str]:
        """See `Section`."""
        return configuration.at_least(self, 1, "row_tokens", "row_sequences", "num_rows")

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
        # Splash attention works on blocks of 128 tokens, so rows are rounded up to whole blocks.
        is_splash = devices.attention == "splash"
        if self.num_rows % devices.row_parts() or (is_splash and self.row_tokens % 128):
            raise errors.InputError(
                f"{place}.num_rows must divide over {devices.row_parts()} parts of the mesh, and "
                f"row_tokens by 128 for splash attention, got {self.num_rows}, {self.row_tokens}"
            )
        return packed_rows.row_shape(
            largest,
            row_tokens=self.row_tokens,
            row_sequences=self.row_sequences,
            microbatch_rows=self.num_rows,
            patch_multiple=128 if is_splash else 1,
            shared_units=shared_units if self.has_shared_prompts else None,
            place=place,
            advice=advice,
            own_rows=tuple(batches.local_rows(self.num_rows, devices.mesh, devices.rules)),
        )
