"""TPU slices by their usual names, and the rates of TPU chips and GPUs."""

import dataclasses
import glob
import math
import os
from typing import Any

import jax

from data_pipeline.common.errors import UserError
from redvillm_jax.runtime import jax_private


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published rates of one chip.

    device_kind: jax's name of it. peak_flops: bf16, per second. hbm: bytes. hbm_bandwidth, link_bandwidth (one link,
    one direction): bytes per second. clock: Hz, of the compiler's cycle estimates. scoped_vmem: KiB that the compiler
    may use for the tiles of one operation; None: its default, 16 MiB, with which matrix units of some chips wait.
    """

    kind: str
    device_kind: str
    peak_flops: float
    hbm: float
    hbm_bandwidth: float
    link_bandwidth: float
    clock: float
    scoped_vmem: int | None


CHIPS = {
    "v4": Chip("v4", "TPU v4", 275e12, 32 * 2**30, 1228e9, 45e9, 1.05e9, None),
    "v5e": Chip("v5e", "TPU v5 lite", 197e12, 16 * 2**30, 819e9, 45e9, 1.5e9, None),
    "v5p": Chip("v5p", "TPU v5", 459e12, 95 * 2**30, 2765e9, 90e9, 1.75e9, 32768),
    "v6e": Chip("v6e", "TPU v6 lite", 918e12, 32 * 2**30, 1640e9, 90e9, 1.75e9, None),
}
GPU_PEAKS = {  # dense bf16 flops per second; the first name that is part of device_kind counts
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
}
CORES_IN_NAME = {"v4": 2, "v5e": 1, "v5p": 2, "v6e": 1}  # v4-32 and v5p-32 count cores: 16 chips
SIZES = {  # chips -> grid, as Google Cloud offers them
    "v4": {4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4), 64: (4, 4, 4)},
    "v5e": {4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)},
}
SIZES |= {"v5p": SIZES["v4"], "v6e": SIZES["v5e"]}
NAMES = tuple(f"{kind}-{chips * CORES_IN_NAME[kind]}" for kind in CHIPS for chips in SIZES[kind])


QUIET_LIBTPU = {  # libtpu then does not look for a TPU, and logs nothing
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v4-8",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}
COMPILE_ONLY = QUIET_LIBTPU | {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}  # and takes no lock on a TPU
TPU_NODES = ("/dev/accel*", "/dev/vfio/[0-9]*")


def quiet_without_tpu() -> None:
    """Silences libtpu on a machine without a TPU; call it before jax looks for devices.

    Does nothing on a machine with a TPU, or if the user has set one of the variables.
    """
    if jax_private.num_tpu_chips() or any(map(glob.glob, TPU_NODES)):
        return
    if not any(name in os.environ for name in QUIET_LIBTPU if name != "TPU_SKIP_MDS_QUERY"):  # jax sets this one itself
        os.environ.update(QUIET_LIBTPU)


def peak_flops(device: Any) -> float | None:
    """Returns the bf16 flops per second of a device, None if they are not known."""
    known = {chip.device_kind: chip.peak_flops for chip in CHIPS.values()}
    if device.platform == "tpu":
        return known.get(device.device_kind)
    return next((peak for name, peak in GPU_PEAKS.items() if name in device.device_kind), None)


def compiler_options(device: Any) -> dict[str, str]:
    """Returns the XLA options for compiling a train step for this device."""
    vmem = {chip.device_kind: chip.scoped_vmem for chip in CHIPS.values()}.get(device.device_kind)
    return {"xla_tpu_scoped_vmem_limit_kib": str(vmem)} if vmem else {}


def parse_topology(name: str) -> tuple[Chip, tuple[int, ...]]:
    """Returns the chip and the grid of a slice such as "v5e-16". Raises UserError for an unknown slice."""
    if name not in NAMES:
        raise UserError(f"--topology={name}: unknown, expected one of {', '.join(NAMES)}")
    kind, size = name.split("-")
    return CHIPS[kind], SIZES[kind][int(size) // CORES_IN_NAME[kind]]


def tpu_devices(name: str) -> list[Any]:
    """Returns the devices of a slice, one per chip, to compile for; the machine needs libtpu but no TPU.

    From then on, jax computes on the CPU in this process, and libtpu does not look for a TPU. Raises UserError without
    libtpu.
    """
    os.environ.update(COMPILE_ONLY)
    jax.config.update("jax_platforms", "cpu")
    chip, grid = parse_topology(name)
    options: dict[str, Any] = {}
    if chip.kind == "v4":  # without it each of a chip's two cores is a device
        bounds = (2, 2, 1)
        options = {"chip_config_name": "megacore", "chips_per_host_bounds": bounds, "num_slices": 1}
        options["wrap"] = (False,) * 3
    try:
        devices = jax_private.described_devices(f"{chip.kind}:{'x'.join(map(str, grid))}", **options)
    except Exception as error:
        reason = " ".join(str(error).split())[:150]
        raise UserError(f"the TPU compiler cannot be used ({reason}); pip install -e '.[tpu]' brings it") from None
    if len(devices) != math.prod(grid):
        raise UserError(f"--topology={name}: libtpu describes {len(devices)} devices, expected {math.prod(grid)}")
    return devices
