"""What the project takes from parts of jax that are private or experimental: nothing else imports those.

Splash attention's parts are in `redvillm_jax.modules.splash`, jax's last words in `abort_filter`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax._src import distributed, hardware_utils
from jax.experimental import mesh_utils, multihost_utils, topologies

CHECKED = {"jax": "0.10.2"}  # the version that this file was last run with
SIGTERM_NOTICE = "RECEIVED_PREEMPTION_NOTICE"  # the key under which jax's preemption service says so to all


# ---- devices


def num_tpu_chips() -> int:
    """How many TPU chips this machine has, without opening them."""
    return hardware_utils.num_available_tpu_chips_and_device_id()[0]


def order_devices(shape: Sequence[int], devices: Sequence[jax.Device]) -> np.ndarray:
    """Devices in an array of this shape, neighbours in it being neighbours in the torus.

    jax.make_mesh splits an axis of the torus over two axes of the mesh on v5e alone, and refuses it elsewhere.
    """
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def described_devices(topology: str, **options: Any) -> list[Any]:
    """Devices of a TPU slice to compile for, on a machine that has libtpu and need not have a TPU."""
    return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices)


# ---- the store of texts that process 0 keeps for all processes of a run


def is_connected() -> bool:
    """Whether this process is one of a run of several."""
    return distributed.global_state.client is not None


def process() -> tuple[int, int]:
    """This process's number and how many there are; asking jax's public functions could wait for the others."""
    return distributed.global_state.process_id, distributed.global_state.num_processes


def look_up(key: str) -> str:
    """What a process has said to all under a name; "" if nothing, or if process 0 is gone (`abort_filter` says so)."""
    try:
        return distributed.global_state.client.key_value_try_get(key)
    except jax.errors.JaxRuntimeError:
        return ""


def tell_all(key: str, text: str) -> None:
    """Says a text to all under a name. Raises JaxRuntimeError if there is one already, or process 0 is gone."""
    distributed.global_state.client.key_value_set(key, text)


# ---- what all processes do together


def allgather(value: Any, *, tiled: bool = False) -> Any:
    """The values of all processes as a numpy array, with a first axis for the processes unless `tiled`."""
    return multihost_utils.process_allgather(value, tiled=tiled)


def wait_for_all(what: str) -> None:
    """Returns when every process has come here; `what` names the place."""
    multihost_utils.sync_global_devices(what)


def asks_to_stop() -> Callable[[int], bool]:
    """A function of the step: whether SIGTERM has come to any process, the same answer for all after a step."""
    return multihost_utils.reached_preemption_sync_point
