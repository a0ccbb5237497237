"""Every mesh of every TPU slice that `plan` knows, on described devices: none of them is needed."""

from types import SimpleNamespace

import pytest

from data_pipeline.common.errors import UserError
from redvillm_jax.runtime.chips import NAMES, tpu_devices
from redvillm_jax.runtime.sharding import AXES, batch_sharding, local_rows, make_mesh, num_batch_shards

ROWS = 2  # on each device


def shapes(count: int) -> list[tuple[int, int, int]]:
    """All (data, fsdp, tensor) that multiply to a power of two."""
    sizes = [2**i for i in range(count.bit_length())]
    return [(count // (fsdp * tensor), fsdp, tensor) for tensor in sizes for fsdp in sizes if fsdp * tensor <= count]


@pytest.mark.parametrize("name", NAMES)
def test_every_process_reads_the_rows_of_its_devices(name):
    devices = tpu_devices(name)
    for shape in shapes(len(devices)):
        mesh = make_mesh(dict(zip(AXES, shape, strict=True)), devices)
        assert mesh.devices.shape == shape and set(mesh.devices.flat) == set(devices)
        rows = ROWS * num_batch_shards(mesh)
        held = batch_sharding(mesh).devices_indices_map((rows,))
        parts = mesh.devices.reshape(-1, shape[2])  # (parts of a batch, copies)
        all_read = set()
        for process in {device.process_index for device in devices}:
            own = [device for device in devices if device.process_index == process]
            read = local_rows(mesh, rows, own)
            mine = [part for part, copies in enumerate(parts) if any(device in own for device in copies)]
            assert read == [ROWS * part + i for part in mine for i in range(ROWS)], (shape, process)
            for device in own:  # `to_global` takes them by the place of a part among those of the process
                part = held[device][0].indices(rows)[0] // ROWS
                first = ROWS * mine.index(part)
                assert read[first : first + ROWS] == list(range(rows)[held[device][0]])
            all_read |= set(read)
        assert all_read == set(range(rows))


def test_chips_of_two_slices_are_refused():
    chips = [SimpleNamespace(platform="tpu", slice_index=i // 4) for i in range(8)]
    with pytest.raises(UserError, match="belong to 2 TPU slices, expected one"):
        make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, chips)
