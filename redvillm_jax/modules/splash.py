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

# of the forward, dq and dkv kernels: data_next, mask_next, block_mask and partial_mask_blocks of their `MaskInfo`
MaskArrays = tuple[tuple[jax.Array, ...], ...]
QUERY_ROWS = (P(None, BATCH_AXES),) * 3 + (P(BATCH_AXES),)
MASK_SPECS = (QUERY_ROWS, QUERY_ROWS, (P(None, None, BATCH_AXES),) * 3 + (P(BATCH_AXES),))


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


def splash_masks(mask: jax.Array) -> MaskArrays:
    """Returns the arrays of the mask infos of the forward, dq and dkv kernels for a mask (B, S, S) bool.

    All heads have one mask. Every device computes the infos of its own rows, for `splash_attention` alone.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return own_masks(mask)
    return jax.shard_map(own_masks, in_specs=P(BATCH_AXES), out_specs=MASK_SPECS, check_vma=False)(mask)


def own_masks(mask: jax.Array) -> MaskArrays:
    """`splash_masks` of the rows of one device.

    The rows form one sequence; a block is paired only with blocks of its own row, and blocks without a visible pair are
    skipped.
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
        numbers = (rearrange(x, lay) for x in (info.data_next + first, info.mask_next, info.block_mask))
        infos.append((*numbers, info.partial_mask_blocks))
    return tuple(infos)


def splash_attention(masks: MaskArrays, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Computes splash attention on the devices of the rows; heads are split over the tensor axis.

    masks: of `splash_masks`; every slot must see at least one slot. There may be fewer key-value heads than heads;
    where the tensor axis does not divide them they are repeated, and where it does not divide the heads each device
    computes all of them.
    """
    query = keep(query * query.shape[-1] ** -0.5, "query")

    def attend(masks: MaskArrays, *qkv: jax.Array) -> jax.Array:
        b, s = qkv[0].shape[:2]
        kernel = splash.SplashAttentionKernel(
            *(MaskInfo(*arrays, q_sequence=None, is_dynamic_mask=True) for arrays in masks),
            is_mqa=False,
            block_sizes=splash_blocks(s),
            save_residuals=False,
            mask_value=splash.DEFAULT_MASK_VALUE,
            attn_logits_soft_cap=None,
            residual_checkpoint_name="context",
            mask_function=None,
            interpret=False,
        )
        context = kernel(*(rearrange(x, "b s h d -> h (b s) d") for x in qkv))
        return rearrange(context, "h (b s) d -> b s h d", b=b)

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return attend(masks, query, key, value)
    parts, heads = mesh.shape["tensor"], query.shape[2]
    axis = "tensor" if heads % parts == 0 else None
    if axis and key.shape[2] % parts:
        key, value = (jnp.repeat(x, heads // key.shape[2], axis=2) for x in (key, value))
    at = P(BATCH_AXES, None, axis, None)
    shard = jax.shard_map(attend, in_specs=(MASK_SPECS, at, at, at), out_specs=at, check_vma=False)
    return shard(masks, query, key, value)
