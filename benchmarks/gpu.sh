#!/usr/bin/env bash
set -euo pipefail

help() {
  cat <<'HELP'
Every check and comparison that needs an NVIDIA GPU, in one call of at most nine minutes on an H200.

    bash benchmarks/gpu.sh [--python=PYTHON] [--wheels=DIR] [--seconds=540]

    1. the cuDNN attention kernel against plain fp32 attention on the CPU, forward and gradients, packed rows
    2. the 7B-size train step against PyTorch, LLaVA         benchmarks/train_vs_torch.py
    3. pictures per second of CLIP ViT-L/14 against PyTorch  benchmarks/encode_vs_torch.py
    4. the 7B-size train step against PyTorch, Qwen-VL
    5. answers of LLaVA-7B's size against transformers       benchmarks/generate.py

It prints the date, the GPU and the versions, then every part's table. A part that fails or runs out of time says so,
the next one goes on, and the exit code is 1. No weights are downloaded: the 7B sizes have random weights.

    --python=PYTHON   a Python with this project's packages, jax for CUDA, torch for CUDA and transformers (python3)
    --wheels=DIR      wheels to install into a temporary folder first, for a machine without a package index
    --seconds=540     for all parts together; unfinished parts are stopped then

It needs jax, flax, optax, einops, safetensors, tqdm and ml_collections beside torch and transformers.
HELP
}

fail() {
  echo "error: $*" >&2
  exit 2
}

python=python3 wheels="" seconds=540
for argument in "$@"; do
  case $argument in
    -h | --help) help && exit ;;
    --python=*) python=${argument#*=} ;;
    --wheels=*) wheels=$(realpath -m "${argument#*=}") ;;
    --seconds=*) seconds=${argument#*=} ;;
    *) fail "unknown argument $argument (see --help)" ;;
  esac
done
[[ $seconds =~ ^[0-9]+$ ]] || fail "--seconds=$seconds: expected a whole number"
if [[ $python == */* ]]; then python=$(realpath -ms "$python"); fi
command -v "$python" > /dev/null || fail "--python=$python: not found"
command -v nvidia-smi > /dev/null || fail "nvidia-smi is not here: this needs an NVIDIA GPU"
cd "$(dirname "$0")/.."

site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
if [[ -n $wheels ]]; then
  compgen -G "$wheels/*.whl" > /dev/null || fail "--wheels=$wheels: holds no .whl file"
  "$python" -m pip install -q --no-index --no-deps --target "$site" "$wheels"/*.whl
  export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

echo "date     $(date -u '+%Y-%m-%d %H:%M UTC')"
echo "machine  $(nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader | head -n 1)"
"$python" - << 'PYTHON' || fail "install what is missing into --python, or pass it with --wheels"
import importlib.metadata
import sys

names = ("jax", "jaxlib", "flax", "optax", "einops", "safetensors", "tqdm", "ml_collections", "torch", "transformers")
found, missing = [], []
for name in names:
    try:
        found.append(f"{name} {importlib.metadata.version(name)}")
    except importlib.metadata.PackageNotFoundError:
        missing.append(name)
print(f"python   {sys.version.split()[0]}, " + ", ".join(found))
if missing:
    sys.exit(f"missing packages: {', '.join(missing)}")
PYTHON

failed=()
# part NAME COMMAND…: runs a command in what is left of the time, and goes on whatever it does
part() {
  local name=$1 code=0 left=$((seconds - SECONDS))
  shift
  echo
  echo "== $name (after $SECONDS s)"
  if ((left < 20)); then
    echo "not run: no time is left of $seconds s"
    failed+=("$name")
    return
  fi
  timeout --kill-after=5 "$left" "$@" || code=$?
  if ((code == 124 || code == 137)); then echo "stopped: the $seconds s are over"; fi
  if ((code)); then
    echo "FAILED with exit code $code: $name"
    failed+=("$name")
  fi
}

attention() {
  cat << 'PYTHON'
import os

os.environ |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "JAX_PLATFORMS": "cuda,cpu"}
import jax
import jax.numpy as jnp
import numpy as np

from redvillm_jax.modules.attention import choose_kernel, row_attention
from redvillm_jax.modules.layers import attention

ROWS, SLOTS, HEADS, SIZE = 2, 2048, 8, 128
assert choose_kernel("gpu", jnp.bfloat16, SLOTS, SIZE) == "cudnn"
rng = np.random.default_rng(0)
groups, questions = np.zeros((ROWS, SLOTS), np.int32), np.zeros((ROWS, SLOTS), np.int32)
for row, lengths in enumerate(((356, 90, 150, 120, 77, 300, 60), (512, 130, 111, 95))):  # a prefix, its questions
    at = number = 0
    for group in (1, 2):  # the same twice, then padding
        for question, length in enumerate(lengths if group == 1 else lengths[:3]):
            number += question > 0
            groups[row, at : at + length] = group
            questions[row, at : at + length] = number if question else 0
            at += length
real = (groups > 0)[:, :, None, None]
inputs = [rng.normal(size=(ROWS, SLOTS, HEADS, SIZE)).astype(jnp.bfloat16) for _ in range(3)]
weight = (rng.normal(size=(ROWS, SLOTS, HEADS, SIZE)) * real).astype(np.float32)  # padding has no loss


def run(platform, kernel, dtype):
    """The context at real slots and the gradients of query, key and value, fp32 on the host."""

    def loss(qkv):
        context = attention(*qkv, row_attention(jnp.asarray(groups), jnp.asarray(questions), kernel))
        return (context.astype(jnp.float32) * weight).sum(), context

    with jax.default_device(jax.devices(platform)[0]):
        qkv = [jnp.asarray(x, dtype) for x in inputs]
        (_, context), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(qkv)
        return [np.asarray(x, np.float32) for x in (jnp.where(real, context, 0), *gradients)]


want = run("cpu", "xla", jnp.float32)
plain = run("gpu", "xla", jnp.bfloat16)
fused = run("gpu", "cudnn", jnp.bfloat16)
bad = []
print("|a - b| / |b| from fp32 on the CPU; the limit for cudnn is 1e-2")
print("| array           | cudnn, bf16 | xla, bf16 |")
for name, a, b, c in zip(("context", "d query", "d key", "d value"), fused, plain, want):
    gaps = [float(np.linalg.norm(x - c) / np.linalg.norm(c)) for x in (a, b)]
    print(f"| {name:15} | {gaps[0]:11.2e} | {gaps[1]:9.2e} |")
    if not (np.isfinite(a).all() and gaps[0] <= 1e-2):
        bad.append(name)
if bad:
    raise SystemExit(f"over the limit: {', '.join(bad)}")
PYTHON
}

part "attention kernel" "$python" -c "$(attention)"
part "train step, LLaVA" "$python" benchmarks/train_vs_torch.py --family=llava --size=7b
part "encoder, CLIP ViT-L/14" "$python" benchmarks/encode_vs_torch.py --family=llava --size=7b
part "train step, Qwen-VL" "$python" benchmarks/train_vs_torch.py --family=qwen_vl --size=7b
part "answers, LLaVA" "$python" benchmarks/generate.py --size=7b

echo
if ((${#failed[@]})); then
  printf 'failed after %d s: %s\n' "$SECONDS" "$(IFS=';' && echo "${failed[*]}")"
  exit 1
fi
echo "all parts done after $SECONDS s"
