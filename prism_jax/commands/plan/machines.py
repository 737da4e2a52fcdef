"""The machines that a plan is made for: TPU topologies by name, and GPUs."""

import dataclasses
import math
import re

from prism_jax import errors

_TOPOLOGY = re.compile(r"(v5e|v5p|v6e|tpu7x):(\d+(?:x\d+)+)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """A kind of device. All figures are of a JAX device; a chip of tpu7x is two of them.

    `hbm_gib` is what the compiler of libtpu 0.0.42.1 lets a program use. The others are peaks of
    the makers' pages, not measured: cloud.google.com/tpu/docs/{v5e,v5p,v6e,tpu7x}.
    """

    hbm_gib: float
    teraflops: float  # bfloat16
    terabytes: float  # a second, from memory
    link_gigabytes: float  # a second, one way, over all links to other devices
    num_dimensions: int = 0
    devices_per_chip: int = 1
    most_chips_of_a_host: int = 8  # a larger slice has hosts of 4 chips
    gcloud: str = ""  # the accelerator type, without the number
    units_per_chip: int = 1  # that the number of the type counts
    runtime: str = ""  # gcloud's --version
    host_gigabytes: float = 0.0  # memory of a host with 4 chips


GENERATIONS = {
    "v5e": Generation(
        hbm_gib=15.75,
        teraflops=197,
        terabytes=0.819,
        link_gigabytes=200,
        num_dimensions=2,
        gcloud="v5litepod",
        runtime="v2-alpha-tpuv5-lite",
        host_gigabytes=192,
    ),
    "v5p": Generation(
        hbm_gib=95.74,
        teraflops=459,
        terabytes=2.765,
        link_gigabytes=600,
        num_dimensions=3,
        most_chips_of_a_host=4,
        gcloud="v5p",
        units_per_chip=2,
        runtime="v2-alpha-tpuv5",
        host_gigabytes=448,
    ),
    "v6e": Generation(
        hbm_gib=31.25,
        teraflops=918,
        terabytes=1.64,
        link_gigabytes=400,
        num_dimensions=2,
        gcloud="v6e",
        runtime="v2-alpha-tpuv6e",
        host_gigabytes=720,
    ),
    "tpu7x": Generation(
        hbm_gib=94.75,
        teraflops=1153,
        terabytes=3.69,
        link_gigabytes=300,
        num_dimensions=3,
        devices_per_chip=2,
        most_chips_of_a_host=4,
        gcloud="tpu7x",
        units_per_chip=1,
        runtime="",
        host_gigabytes=960,
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """Devices of one kind."""

    name: str  # "v5p:2x4x4", or "4 GPUs"
    generation: Generation
    num_chips: int
    num_slices: int
    is_tpu: bool

    @property
    def num_devices(self) -> int:
        """Return the JAX devices of all slices."""
        return self.num_chips * self.generation.devices_per_chip * self.num_slices

    @property
    def chips_per_host(self) -> int:
        """Return the chips that a host has."""
        most = self.generation.most_chips_of_a_host
        return self.num_chips if self.num_chips <= most else 4

    @property
    def num_hosts(self) -> int:
        """Return the hosts of all slices."""
        return self.num_slices * max(1, self.num_chips // self.chips_per_host)

    def gcloud_type(self) -> str:
        """Return the accelerator type that gcloud knows, or how else to ask for the machine."""
        kind = self.generation
        if not self.is_tpu:
            return self.name
        if not kind.runtime:
            return f"{kind.gcloud}, through GKE alone (launch/gke.sh)"
        return f"{kind.gcloud}-{self.num_chips * kind.units_per_chip} (runtime {kind.runtime})"


def tpu(text: str, *, num_slices: int) -> Machine:
    """Return the machine of a topology such as v5p:2x4x4.

    Raises:
      InputError: there is no such topology.
    """
    match = _TOPOLOGY.fullmatch(text)
    if match is None:
        raise errors.InputError(
            f"--topology={text}: must be KIND:AxB or KIND:AxBxC with KIND one of "
            f"{', '.join(GENERATIONS)}, such as v5e:4x4, v5p:2x4x4, v6e:2x4, tpu7x:2x2x1"
        )
    kind, sides = GENERATIONS[match[1]], [int(side) for side in match[2].split("x")]
    if len(sides) != kind.num_dimensions or min(sides) < 1 or num_slices < 1:
        raise errors.InputError(
            f"--topology={text}: {match[1]} has {kind.num_dimensions} dimensions, each at least 1"
        )
    machine = Machine(
        name=text,
        generation=kind,
        num_chips=math.prod(sides),
        num_slices=num_slices,
        is_tpu=True,
    )
    if machine.num_chips > kind.most_chips_of_a_host and machine.num_chips % 4:
        raise errors.InputError(f"--topology={text}: {machine.num_chips} chips are not whole hosts")
    return machine


def gpus(number: int, hbm_gigabytes: float) -> Machine:
    """Return `number` GPUs of one host; speeds are those measured on an H100 80GB."""
    if number < 1 or not hbm_gigabytes > 0:
        raise errors.InputError(
            f"--gpus and --hbm must be positive, got {number} and {hbm_gigabytes}"
        )
    # What a driver leaves of 80 GB is 78 GiB of 80: the rest is kept for code and handles.
    kind = Generation(
        hbm_gib=hbm_gigabytes * 0.975,
        teraflops=747,
        terabytes=2.92,
        link_gigabytes=450,
        host_gigabytes=0.0,
    )
    name = f"{number} x GPU of {hbm_gigabytes:g} GB"
    return Machine(name=name, generation=kind, num_chips=number, num_slices=1, is_tpu=False)
