"""Wraps the private and experimental parts of jax that the project uses; no other module imports them.

Two exceptions: `redvillm_jax.modules.splash` imports splash attention, `abort_filter` reads jax's abort messages.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax._src import distributed, hardware_utils
from jax.experimental import mesh_utils, multihost_utils, topologies

CHECKED = {"jax": "0.10.2"}  # the version that this file was checked with
SIGTERM_NOTICE = "RECEIVED_PREEMPTION_NOTICE"  # jax's preemption service sets this key for all processes


# ---- devices


def num_tpu_chips() -> int:
    """Counts the TPU chips of this machine without opening them."""
    return hardware_utils.num_available_tpu_chips_and_device_id()[0]


def order_devices(shape: Sequence[int], devices: Sequence[jax.Device]) -> np.ndarray:
    """Arranges devices in an array of this shape, so that neighbours in it are neighbours in the torus.

    jax.make_mesh does not serve: it splits an axis of the torus over two axes of the mesh on v5e alone.
    """
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def described_devices(topology: str, **options: Any) -> list[Any]:
    """Returns the devices of a TPU slice to compile for; the machine needs libtpu but no TPU."""
    return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices)


# ---- the key-value store that process 0 keeps for all processes of a run


def is_connected() -> bool:
    """Returns whether this process belongs to a run of several."""
    return distributed.global_state.client is not None


def process() -> tuple[int, int]:
    """Returns this process's number and the count of processes; jax's public functions could wait for the others."""
    return distributed.global_state.process_id, distributed.global_state.num_processes


def look_up(key: str) -> str:
    """Returns the text under a key; "" if there is none, or if process 0 is gone (`abort_filter` reports that)."""
    try:
        return distributed.global_state.client.key_value_try_get(key)
    except jax.errors.JaxRuntimeError:
        return ""


def tell_all(key: str, text: str) -> None:
    """Stores a text under a key. Raises JaxRuntimeError if the key has a text, or process 0 is gone."""
    distributed.global_state.client.key_value_set(key, text)


# ---- collective operations


def allgather(value: Any, *, tiled: bool = False) -> Any:
    """Gathers the values of all processes in a numpy array, with a first axis for the processes unless `tiled`."""
    return multihost_utils.process_allgather(value, tiled=tiled)


def wait_for_all(what: str) -> None:
    """Waits until every process calls it with the same `what`."""
    multihost_utils.sync_global_devices(what)


def asks_to_stop() -> Callable[[int], bool]:
    """Returns asked(step): whether SIGTERM came to any process; all processes get the same answer for a step."""
    return multihost_utils.reached_preemption_sync_point
