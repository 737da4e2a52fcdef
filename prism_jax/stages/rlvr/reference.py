"""The reference policy of a KL term, opened only where a coefficient is given."""

import dataclasses

from flax import nnx

from prism_jax import errors
from prism_jax.checkpoints import checksum, pretrained
from prism_jax.setup import devices as devices_lib
from prism_jax.setup import models as setup_models
from prism_jax.stages.rlvr import config as rlvr_config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference:
    """A policy that is not trained."""

    params: nnx.State
    fingerprint: str  # changes when a parameter does


def open_reference(
    options: rlvr_config.Reference,
    model: setup_models.Model,
    devices: devices_lib.Devices,
    start: setup_models.Start,
) -> Reference | None:
    """Load the reference policy into the form of the trained one; None where it is not used.

    By default it is the policy that the run starts from, also in a resumed run.

    Raises:
      InputError: the folder holds no policy of these sizes.
    """
    if not options.is_used:
        return None
    if options.folder is None and model.source.init == "random":
        params = start.make().params
    else:
        source = dataclasses.replace(model.source, init="pretrained", sizes=None)
        if options.folder is not None:
            source = dataclasses.replace(source, folder=options.folder, step=None)
        folder = source.folder
        files = pretrained.Source.of(folder, role="policy").files
        # Log-probs of both are compared token by token, with the rows and shapes of the policy.
        if pretrained.config_of(files)[1] != model.config:
            raise errors.InputError(
                f"config.reference.folder: {folder} has other sizes than the policy"
            )
        params = setup_models.load_params(dataclasses.replace(model, source=source), devices)
    return Reference(params=params, fingerprint=checksum.fingerprint(params))
