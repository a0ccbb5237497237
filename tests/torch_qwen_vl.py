"""Qwen-VL in PyTorch's own operations: the yardstick for `redvillm_jax.bases.qwen_vl`, sharing no code with it.

Weights are a dict of tensors under the published names. Where the published model's arrays are at hand, a test
holds this file to them too.
"""

import math

import torch
import torch.nn.functional as F


def below(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors whose names start with `prefix`, without it."""
    return {name.removeprefix(prefix): t for name, t in weights.items() if name.startswith(prefix)}


def layer_norm(w: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-6)


def linear(w: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def grid(table: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """A square table of positions, resized to rows x cols and flattened."""
    side = math.isqrt(len(table))
    picture = table.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    picture = F.interpolate(picture, size=(rows, cols), mode="bicubic", align_corners=False)
    return picture[0].permute(1, 2, 0).flatten(0, 1)


def sequence(table: torch.Tensor, length: int, kind: str) -> torch.Tensor:
    """Positions of `length` frames: the first ones of the smallest grid, or the table resized as one line."""
    if kind == "grid":
        side = math.ceil(math.sqrt(length))
        return grid(table, side, side)[:length]
    return F.interpolate(table.T[None, :, None], size=(1, length), mode="bicubic", align_corners=False)[0, :, 0].T


def vision(weights: dict[str, torch.Tensor], pixels: torch.Tensor, heads: int) -> dict[str, torch.Tensor]:
    """pixels: (B, 3, H, W) -> every stage of the vision transformer, the last one under "vit"."""
    w = below(weights, "transformer.visual.")
    conv = F.conv2d(pixels, w["conv1.weight"], stride=w["conv1.weight"].shape[-1])
    rows, cols = conv.shape[2:]
    x = conv.flatten(2).transpose(1, 2)
    stages = {"conv1": x}
    x = stages["pos_added"] = x + grid(w["positional_embedding"], rows, cols)
    x = stages["ln_pre"] = layer_norm(w, "ln_pre", x)
    i = 0
    while block := below(w, f"transformer.resblocks.{i}."):
        qkv = linear(block, "attn.in_proj", layer_norm(block, "ln_1", x))
        q, k, v = qkv.unflatten(-1, (heads, 3, -1)).permute(3, 0, 2, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        attn = linear(block, "attn.out_proj", y)
        x = x + attn
        x = x + linear(block, "mlp.c_proj", F.gelu(linear(block, "mlp.c_fc", layer_norm(block, "ln_2", x))))
        stages |= {f"block{i}_attn": attn, f"block{i}": x}
        i += 1
    return stages | {"vit": x}


def output(w: dict[str, torch.Tensor], x: torch.Tensor) -> dict[str, torch.Tensor]:
    y = layer_norm(w, "ln_post", x)
    return {"attn_pool": x, "ln_post": y, "visual_out": y @ w["proj"]}


def resample(
    w: dict[str, torch.Tensor], features: torch.Tensor, positions: torch.Tensor, heads: int
) -> dict[str, torch.Tensor]:
    """Projector `w` (no prefix) on features: (B, M, D) whose keys have positions: (M, K)."""
    kv = layer_norm(w, "attn_pool.ln_kv", linear(w, "attn_pool.kv_proj", features)).transpose(0, 1)
    query = layer_norm(w, "attn_pool.ln_q", w["attn_pool.query"]) + w["attn_pool.pos_embed"]
    x, _ = F.multi_head_attention_forward(
        query[:, None].expand(-1, len(features), -1),
        kv + positions[:, None],
        kv,
        query.shape[-1],
        heads,
        w["attn_pool.attn.in_proj_weight"],
        w["attn_pool.attn.in_proj_bias"],
        None,
        None,
        False,
        0.0,
        w["attn_pool.attn.out_proj.weight"],
        w["attn_pool.attn.out_proj.bias"],
        training=False,
        need_weights=False,
    )
    return output(w, x.transpose(0, 1))


def per_token(w: dict[str, torch.Tensor], features: torch.Tensor, heads: int) -> torch.Tensor:
    """Every feature of (M, D) as a picture of its own: the first of its equal output tokens, (M, K)."""
    position = torch.zeros_like(w["attn_pool.pos_embed"][:1])
    return resample(w, features[:, None], position, heads)["visual_out"][:, 0]


def decoder(
    weights: dict[str, torch.Tensor],
    x: torch.Tensor,
    *,
    heads: int,
    seq_length: int | None = None,
    context_length: int | None = None,
    key_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """x: (B, S, K) -> logits (B, S, V); dynamic NTK and logn act when seq_length (and context_length) are given."""
    head_dim = x.shape[-1] // heads
    positions = torch.arange(x.shape[1], dtype=torch.float64)
    base, logn = 10000.0, torch.ones(x.shape[1])
    if seq_length:
        doublings = math.ceil(math.log(context_length or x.shape[1], 2) - math.log(seq_length, 2) + 1)
        base *= max(2**doublings - 1, 1) ** (head_dim / (head_dim - 2))
        logn = torch.clamp(torch.log(positions + 1) / math.log(seq_length), min=1).float()
    angles = positions[:, None] * base ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    turn = torch.polar(torch.ones_like(angles), angles).to(torch.complex64)

    def rotate(t: torch.Tensor) -> torch.Tensor:  # (B, H, S, D): component j and j + D / 2 are one complex number
        turned = torch.complex(*t.chunk(2, -1)) * turn
        return torch.cat([turned.real, turned.imag], -1)

    visible = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()[None, None]
    if key_mask is not None:
        visible = visible & key_mask[:, None, None]
    i = 0
    while w := below(weights, f"transformer.h.{i}."):
        qkv = linear(w, "attn.c_attn", rms_norm(x, w["ln_1.weight"]))
        q, k, v = (t.unflatten(-1, (heads, head_dim)).transpose(1, 2) for t in qkv.chunk(3, -1))
        y = F.scaled_dot_product_attention(rotate(q) * logn[:, None], rotate(k), v, attn_mask=visible)
        x = x + linear(w, "attn.c_proj", y.transpose(1, 2).flatten(2))
        y = rms_norm(x, w["ln_2.weight"])
        x = x + linear(w, "mlp.c_proj", linear(w, "mlp.w1", y) * F.silu(linear(w, "mlp.w2", y)))
        i += 1
    return rms_norm(x, weights["transformer.ln_f.weight"]) @ weights["lm_head.weight"].T


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, eps=1e-6)
