"""Counts the model flops of a train step: 4·N·D, 2·N·D each for the forward pass and the backward pass.

N is the number of weights and D of tokens; a multiply-add is 2 flops. Full training takes 6·N·D (arXiv 2001.08361,
section 2.1); frozen matrices need no gradient of their own, so that the backward pass costs as much as the forward
pass. Rematerialization and attention are not counted.
"""

from flax import nnx

from redvillm_jax.modules.layers import Linear


def matrix_sizes(llm: nnx.Module) -> tuple[int, int]:
    """Counts the weights in the matrices of a decoder's body, and in its output head. llm: of arrays or shapes."""
    matrices = [module for _, module in nnx.iter_modules(llm) if isinstance(module, Linear) and module is not llm.head]
    return sum(matrix.weight.size for matrix in matrices), llm.head.weight.size


def step_flops(matrices: tuple[int, int], tokens: float, supervised: float) -> float:
    """Returns the model flops of a step on `tokens` slots, `supervised` of them with logits."""
    body, head = matrices
    return 4 * (body * tokens + head * supervised)


def attention_pairs(row_length: int, window: int | None = None) -> int:
    """Counts the visible pairs of slots under a causal mask, in a window if there is one; packed rows have fewer."""
    hidden = max(row_length - (window or row_length), 0)
    return (row_length * (row_length + 1) - hidden * (hidden + 1)) // 2


def kernel_flops(
    rows: int, row_length: int, num_heads: int, head_dim: int, window: int | None = None
) -> dict[str, float]:
    """Returns the flops of one call of each splash attention kernel, by the beginning of its name, under a causal mask.

    window: of window layers; all layers are counted as such, because one call in the program serves both kinds. Matrix
    products per visible pair: 2 in the forward pass; 3 for the gradient of the queries and 4 for the gradient of
    keys and values, which both compute the scores again.
    """
    product = 2 * rows * attention_pairs(row_length, window) * num_heads * head_dim
    return {"splash_mha_fwd": 2 * product, "splash_mha_dq": 3 * product, "splash_mha_dkv": 4 * product}
