"""Estimates memory traffic and time of one decoding step of a 7B base on a TPU, by its compiler; needs no TPU.

python benchmarks/decode_cost.py [--topology=v5e-4] [--family=llava] [--batches=1,32] [--slots=704]

Compiles `Inference`'s decoding loop in bf16, weights and heads split over all chips of the slice (`tensor`), and reads
its HLO: how much of the cache a step reads and writes, the compiler's own estimate of the step's time, and the time
that the memory's bandwidth alone needs to read the weights and the cache once. Collectives are not charged.
"""

import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.variants import print_table
from configs.demo import family_config
from data_pipeline.common.cli import Parser
from data_pipeline.common.errors import UserError, run
from redvillm_jax.model.settings import model_settings, plain_config
from redvillm_jax.planning.hlo_cost import Instruction, Unpriced, num_bytes, parse, trip_count
from redvillm_jax.runtime.chips import Chip, parse_topology, tpu_devices

NEW_TOKENS = 256


def main(argv: list[str]) -> None:
    parser = Parser("python benchmarks/decode_cost.py", __doc__)
    parser.add_argument("--topology", default="v5e-4", help="slice, e.g. v5e-4 or v5p-8 (v5e-4)")
    parser.add_argument("--family", default="llava", help="which image LLM (llava)")
    parser.add_argument("--batches", default="1,32", help="rows decoded at once (1,32)")
    parser.add_argument("--slots", type=int, default=704, help=f"of the cache, {NEW_TOKENS} for the answer (704)")
    flags = parser.parse_args(argv)
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", flags.batches):
        raise UserError(f"--batches={flags.batches}: expected numbers from 1 on, separated by commas")
    if flags.slots <= NEW_TOKENS:
        raise UserError(f"--slots={flags.slots}: expected more than {NEW_TOKENS}")
    chip, _ = parse_topology(flags.topology)
    devices = tpu_devices(flags.topology)
    print(f"{flags.family} 7B, bf16, on {len(devices)} {chip.kind} chips, tensor={len(devices)}; GB and ms of a chip")
    print_table([line(flags.family, devices, chip, int(rows), flags.slots) for rows in flags.batches.split(",")])


def line(family: str, devices: list[Any], chip: Chip, rows: int, slots: int) -> dict[str, str]:
    """A row of the table."""
    hlo, weights, cache = compile_decode(family, devices, rows, slots)
    step, call = walk(hlo, math.prod(cache), chip)
    held = 4 * math.prod(cache)  # keys and values in bf16
    return {
        "rows": str(rows),
        "weights": f"{weights / 1e9:.2f}",
        "cache": f"{held / 1e9:.2f}",
        "read of it": f"{step['read'] / 1e9:.2f}",
        "written": f"{step['written'] / 1e9:.4f}",
        "copied": f"{step['copied'] / 1e9:.2f}",
        "ms a step": f"{1000 * step['seconds']:.1f}",
        "bandwidth alone": f"{1000 * (weights + held) / chip.hbm_bandwidth:.1f}",
        "ms once a call": f"{1000 * call['seconds']:.1f}",
    }


def compile_decode(family: str, devices: list[Any], rows: int, slots: int) -> tuple[str, float, tuple[int, ...]]:
    """The optimized HLO, and of a chip: bytes of the weights that a step reads, and the shape of its keys."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from redvillm_jax.bases.contract import load_family
    from redvillm_jax.inference.engine import Inference
    from redvillm_jax.inference.generate import Decoding
    from redvillm_jax.inference.sampler import Sampling
    from redvillm_jax.model.base_folder import sized_base
    from redvillm_jax.model.build import load_model
    from redvillm_jax.planning.programs import bytes_per_chip
    from redvillm_jax.runtime.sharding import make_mesh

    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": -1}, devices)
    base = sized_base(family, next(iter(load_family(family).SIZES)))
    switches = plain_config(family_config(family))

    def array(shape: tuple[int, ...], dtype: Any, *spec: str | None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))

    with jax.set_mesh(mesh):
        model = load_model(base, model_settings(switches), mesh, dtype=jnp.bfloat16, parts=("projector", "llm"))
        inference = Inference(model, mesh, jnp.bfloat16, [0])
        keys = jax.eval_shape(lambda: model.llm.init_cache(rows, slots, jnp.bfloat16))[0]
        cache = array(keys.shape, keys.dtype, None, None, "tensor")
        random = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
        state = Decoding(
            cache=(cache, cache),
            prompt=array((rows, slots), bool),
            length=array((rows,), jnp.int32),
            seen=array((rows, base.config.vocab_size), bool),
            keys=array(random.shape, random.dtype),
            ids=array((rows, NEW_TOKENS), jnp.int32),
            current=array((rows,), jnp.int32),
            finite=array((rows,), bool),
            step=array((), jnp.int32),
        )
        arguments = (inference.weights, state, Sampling(), inference.stop_ids, np.int32(NEW_TOKENS))
        compiled = inference._decode.lower(*arguments).compile()
    state = nnx.state(model.llm)
    looked_up = max(  # of the embedding only the rows of the last tokens are read
        (leaf for leaf in jax.tree.leaves(state) if leaf.shape[0] == base.config.vocab_size), key=lambda leaf: leaf.size
    )
    weights = bytes_per_chip(state) - bytes_per_chip(looked_up)
    return compiled.as_text(), weights, cache.sharding.shard_shape(cache.shape)


def walk(hlo: str, cache_size: int, chip: Chip) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes of the cache that are read, written and copied, and seconds: of a step, and of a call beside its steps."""
    computations, entry = parse(hlo)
    shapes = {i.name: i.shape for instructions in computations.values() for i in instructions}
    step = dict.fromkeys(("read", "written", "copied", "seconds"), 0.0)
    call = dict(step)

    def is_cache(shape: str) -> bool:
        found = re.match(r"bf16\[([\d,]+)\]", shape)
        return bool(found) and math.prod(map(int, found.group(1).split(","))) == cache_size

    def instructions(name: str, times: int, into: dict[str, float]) -> Iterator[tuple[Instruction, int, dict]]:
        for i in computations[name]:
            if i.opcode == "while":
                try:
                    yield from instructions(i.called("body"), times * trip_count(computations, i), into)
                except Unpriced:  # the loop over steps, whose length is not known
                    yield from instructions(i.called("body"), times, step)
                continue
            yield i, times, into
            if i.opcode == "fusion":
                yield from instructions(i.called("calls"), times, into)

    for i, times, into in instructions(entry, 1, call):
        into["seconds"] += times * (i.cycles or 0) / chip.clock
        if i.opcode == "dynamic-update-slice" and is_cache(i.shape):
            into["written"] += times * num_bytes(shapes[i.operands[1]])
        elif i.opcode == "dynamic-slice" and is_cache(shapes[i.operands[0]]):
            into["read"] += times * num_bytes(i.shape)
        elif i.opcode == "copy" and is_cache(i.shape):
            into["copied"] += times * num_bytes(i.shape)
    return step, call


if __name__ == "__main__":
    run(main)
