"""The train command as one process of a test; it also writes which rows it reads, and waits less long for the dead.

python tests/train_process.py ROWS ORDER --config=… --workdir=…

ORDER: the devices in the order in which the mesh takes them, such as 0,2,1,3; "" for jax's own.
"""

import sys

from redvillm_jax import train
from redvillm_jax.runtime import distributed

distributed.SILENCE_SECONDS = 10
rows, order = sys.argv.pop(1), sys.argv.pop(1)
to_global, make_mesh = train.to_global, train.make_mesh


def recorded(batch, mesh):
    """Writes one line per step: this host's rows as lists of [video, tokens]."""
    with open(f"{rows}-{train.jax.process_index()}", "a") as file:
        rows_read = zip(batch["videos"].tolist(), batch["token_ids"].tolist(), strict=True)
        print([row for row in rows_read], file=file)
    return to_global(batch, mesh)


def permuted(sizes, devices):
    """The mesh over all devices in the given order."""
    return make_mesh(sizes, [train.jax.devices()[int(i)] for i in order.split(",")])


train.to_global = recorded
if order:
    train.make_mesh = permuted
distributed.command(train.main, saves_when_stopped=True)
