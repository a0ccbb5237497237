"""Maps the weights of modules to names on disk, fills modules with arrays, and makes random weights."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flax import nnx

from redvillm_jax.bases.contract import Family
from redvillm_jax.modules.layers import Stack

PARTS = ("encoder", "projector", "llm")


@dataclasses.dataclass(frozen=True)
class Leaf:
    """The place of a published tensor in a module: path, index in a stacked leaf (or None), shape in torch."""

    path: tuple
    layer: int | None
    shape: tuple[int, ...]


def name_table(module: nnx.Module, prefix: str) -> dict[str, Leaf]:
    """Returns a module's leaves by canonical name: the attribute path, with one name per layer of a `Stack`."""
    modules = dict(nnx.iter_modules(module))
    table = {}
    for path, leaf in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        shape = tuple(leaf.shape)
        at = next((i for i in range(len(path)) if isinstance(modules.get(path[:i]), Stack)), None)
        if at is None:
            table[prefix + ".".join(map(str, path))] = Leaf(path, None, shape)
            continue
        for i in range(shape[0]):  # path[at] is the Stack's `block`, on disk the layer's number
            name = ".".join(map(str, (*path[:at], i, *path[at + 1 :])))
            table[prefix + name] = Leaf(path, i, shape[1:])
    return table


def abstract_part(base: Family, part: str, config: Any, **options: Any) -> nnx.Module:
    """Makes the encoder, projector or llm of a family with shapes instead of arrays."""
    make = {"encoder": "Encoder", "projector": "Projector", "llm": "LLM"}[part]
    return nnx.eval_shape(lambda: getattr(base, make)(config, rngs=nnx.Rngs(0), **options))


def expected_tensors(base: Family, config: Any) -> dict[str, Leaf]:
    """Returns the leaves of all parts by canonical name: all tensors that the base loads."""
    tables = (name_table(abstract_part(base, part, config), base.PREFIX[part]) for part in PARTS)
    return {name: leaf for table in tables for name, leaf in table.items()}


def fill(module: nnx.Module, value: Callable[[tuple, nnx.Variable], Any]) -> nnx.Module:
    """Returns a module, of arrays or shapes, with `value(path, leaf)` in place of each leaf."""
    graphdef, state = nnx.split(module)
    filled = [(path, leaf.replace(value(path, leaf))) for path, leaf in nnx.to_flat_state(state)]
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def random_parts(base: Family, config: Any, seed: int = 0) -> dict[str, nnx.Module]:
    """Makes the encoder, projector and llm of a family with random weights."""
    rngs = nnx.Rngs(seed)
    makers = {"encoder": base.Encoder, "projector": base.Projector, "llm": base.LLM}
    return {part: make(config, rngs=rngs) for part, make in makers.items()}


def tensors_of(base: Family, config: Any, parts: Mapping[str, nnx.Module]) -> dict[str, np.ndarray]:
    """Returns all tensors of a checkpoint by canonical name; tensors that never run get random values."""
    tensors = {}
    for part, module in parts.items():
        weights = dict(nnx.to_flat_state(nnx.state(module, nnx.Param)))
        for name, leaf in name_table(module, base.PREFIX[part]).items():
            value = np.asarray(weights[leaf.path][...])
            tensors[name] = value if leaf.layer is None else value[leaf.layer]
    rng = np.random.default_rng(0)
    for name, shape in base.unused(config).items():
        norm = "norm" in name.split(".")[-2]
        value = rng.normal(0, 0.02, shape) if len(shape) > 1 else np.full(shape, norm and name.endswith("weight"))
        tensors[name] = value.astype(np.float32)
    return {name: np.ascontiguousarray(value) for name, value in tensors.items()}
