"""Splash attention over packed rows: jax's Pallas kernels for TPUs, with masks computed at run time.

This file uses private parts of jax. The public interface to these kernels takes masks that are known when the program
is traced, but the masks of packed rows are data, and here all rows of a batch are one long sequence.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import (
    MaskInfo,
    process_dynamic_mask,
    process_dynamic_mask_dkv,
)
from jax.sharding import PartitionSpec as P

from redvillm_jax.modules.layers import BATCH_AXES, keep

CHECKED = {"jax": "0.10.2"}  # the version that this file was checked with
LANES = 128  # the kernels' blocks and heads come in multiples of a vector register's width


def splash_blocks(row_length: int) -> splash.BlockSizes:
    """Returns the kernels' block sizes: the largest that divide the row and fit a v4's 16 MB of vector memory."""
    large, small = (
        max(size for size in range(LANES, most + 1, LANES) if row_length % size == 0) for most in (1024, 512)
    )
    return splash.BlockSizes(
        block_q=large,
        block_kv=large,
        block_kv_compute=small,
        block_q_dkv=small,
        block_kv_dkv=large,
        block_kv_dkv_compute=small,
        block_q_dq=small,
        block_kv_dq=large,
    )


def splash_masks(mask: jax.Array) -> list[MaskInfo]:
    """Returns the mask infos of the forward, dq and dkv kernels for a mask (B, S, S) bool, the same for all heads.

    The rows of the batch form one sequence; a block is paired only with blocks of its own row, and blocks without a
    visible pair are skipped.
    """
    sizes, b = splash_blocks(mask.shape[1]), len(mask)
    infos = []
    for process, block_q, block_kv, axis in (  # axis: the kernel loops over it within a row
        (process_dynamic_mask, sizes.block_q, sizes.block_kv, 2),
        (process_dynamic_mask, sizes.block_q_dq, sizes.block_kv_dq, 2),
        (process_dynamic_mask_dkv, sizes.block_q_dkv, sizes.block_kv_dkv, 1),
    ):
        info, _ = process(mask, (block_q, block_kv), downcast_smem_data=False)  # (B, blocks of q, blocks of kv)
        first = jnp.arange(b, dtype=jnp.int32)[:, None, None] * info.data_next.shape[axis]
        lay = "b q k -> 1 (b q) k" if axis == 2 else "b q k -> 1 q (b k)"
        infos.append(
            info._replace(
                data_next=rearrange(info.data_next + first, lay),
                mask_next=rearrange(info.mask_next, lay),
                block_mask=rearrange(info.block_mask, lay),
            )
        )
    return infos


def splash_attention(mask: jax.Array, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Computes splash attention on the devices of the rows; heads are split over the tensor axis.

    mask: (B, S, S) bool; every slot must see at least one slot.
    """
    query = keep(query * query.shape[-1] ** -0.5, "query")

    def attend(mask: jax.Array, *qkv: jax.Array) -> jax.Array:
        kernel = splash.SplashAttentionKernel(
            *splash_masks(mask),
            is_mqa=False,
            block_sizes=splash_blocks(mask.shape[1]),
            save_residuals=False,
            mask_value=splash.DEFAULT_MASK_VALUE,
            attn_logits_soft_cap=None,
            residual_checkpoint_name="context",
            mask_function=None,
            interpret=False,
        )
        context = kernel(*(rearrange(x, "b s h d -> h (b s) d") for x in qkv))
        return rearrange(context, "h (b s) d -> b s h d", b=len(mask))

    if jax.sharding.get_abstract_mesh().empty:
        return attend(mask, query, key, value)
    heads = P(BATCH_AXES, None, "tensor", None)
    shard = jax.shard_map(attend, in_specs=(P(BATCH_AXES), heads, heads, heads), out_specs=heads, check_vma=False)
    return shard(mask, query, key, value)
