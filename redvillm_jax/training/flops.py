"""The model flops of a train step: 4·N·D, of which the forward pass and the backward pass take 2·N·D each.

N counts weights and D tokens, with 2 flops per multiply-add. Full training takes 6·N·D (arXiv 2001.08361, section 2.1),
but frozen matrices need no gradient of their own, so the backward pass costs as much as the forward pass.
Rematerialisation and attention are not counted.
"""

from flax import nnx

from redvillm_jax.modules.layers import Linear


def matrix_sizes(llm: nnx.Module) -> tuple[int, int]:
    """Weights in the matrices of the decoder's body and of its output head; arrays or shapes."""
    matrices = [module for _, module in nnx.iter_modules(llm) if isinstance(module, Linear) and module is not llm.head]
    return sum(matrix.weight.size for matrix in matrices), llm.head.weight.size


def step_flops(matrices: tuple[int, int], tokens: float, supervised: float) -> float:
    """Model flops of a step on `tokens` slots, `supervised` of which have logits."""
    body, head = matrices
    return 4 * (body * tokens + head * supervised)


def attention_pairs(row_length: int) -> int:
    """Pairs of slots that a causal mask lets see each other; packing shows fewer."""
    return row_length * (row_length + 1) // 2


def kernel_flops(rows: int, row_length: int, num_heads: int, head_dim: int) -> dict[str, float]:
    """Flops of one call of each splash attention kernel (by the beginning of its name) under a causal mask.

    Matrix products per visible pair: 2 forward; 3 for the gradient of the queries, 4 for keys and values, which
    both compute the scores again.
    """
    product = 2 * rows * attention_pairs(row_length) * num_heads * head_dim
    return {"splash_mha_fwd": 2 * product, "splash_mha_dq": 3 * product, "splash_mha_dkv": 4 * product}
