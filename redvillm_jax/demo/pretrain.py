"""Makes the tiny image LLM that the demo turns into a video LLM, from generated pictures and text alone.

    python -m redvillm_jax.demo.pretrain --family=llava --out=redvillm_jax/demo/bases/llava

writes a folder in the family's published form: config.json, model.safetensors, tokenizer files. First the vision
encoder learns to classify each patch of a picture (labels of the generator replace CLIP's captions); then, with the
encoder frozen, the projector and the language model learn to answer questions about the documents of
`redvillm_jax.demo.shape_stories`. It runs on one core, so that the same machine and versions give the same bits.
"""

import dataclasses
import functools
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from safetensors.numpy import save_file
from tqdm import tqdm

from data_pipeline.common.cli import Parser, local_path, number
from data_pipeline.common.errors import run
from data_pipeline.common.files import written_whole
from data_pipeline.media.resizing import resizer
from data_pipeline.packing import Prefix, Question, fill_row
from redvillm_jax.bases.contract import Family, load_family
from redvillm_jax.demo.moving_shapes import Scene, picture_scene, render
from redvillm_jax.demo.shape_stories import KINDS, Document, cell_labels, document
from redvillm_jax.demo.tokenizers import write_llama_tokenizer, write_qwen_tokenizer
from redvillm_jax.model.weights import fill, name_table, random_parts, tensors_of
from redvillm_jax.modules.attention import row_attention
from redvillm_jax.modules.layers import Linear, normalize
from redvillm_jax.training.optim import warmup_cosine

CLASSES = (6, 4, 3, 3)  # colours, shapes, horizontal and vertical thirds
QUESTIONS = 5  # per document
MAX_WORDS = 32  # of a story
WIDTH = 96
FIXED = ("pos_embed",)  # leaves of a resampler that do not train
Batch = dict[str, np.ndarray]
Weights = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Phase:
    """A phase of stage two. mix: documents of each of `KINDS` per step. cell_weight: of the cell loss.

    With an empty mix the projector alone learns, from the cell loss on 64 pictures per step.
    """

    name: str
    steps: int
    mix: tuple[int, ...]
    cell_weight: float


ENCODER_STEPS = 1300
LEARNING_RATE = 2e-3
ROW_LENGTH = {"llava": 108, "qwen_vl": 144}
DTYPE = {"llava": "float16", "qwen_vl": "bfloat16"}  # as in the published models
PHASES = {
    "llava": (
        Phase("pictures", 700, (32, 0, 0, 0), 0.0),
        Phase("all documents", 1000, (14, 6, 8, 4), 0.0),
    ),
    "qwen_vl": (
        Phase("align", 400, (), 1.0),
        Phase("pictures", 700, (32, 0, 0, 0), 0.3),
        Phase("all documents", 1000, (12, 8, 8, 4), 0.3),
    ),
}


# Published folders


def llava_config(vocab_size: int, image_token: int, dtype: str) -> dict[str, Any]:
    """Makes config.json as transformers writes it for LLaVA-1.5; an empty system prompt keeps rows short."""
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "dtype": dtype,
        "image_seq_length": 16,
        "image_token_index": image_token,
        "multimodal_projector_bias": True,
        "projector_hidden_act": "gelu",
        "system_prompt": "",
        "text_config": {
            "model_type": "llama",
            "attention_bias": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "head_dim": WIDTH // 4,
            "hidden_act": "silu",
            "hidden_size": WIDTH,
            "intermediate_size": 256,
            "max_position_embeddings": 2048,
            "mlp_bias": False,
            "num_attention_heads": 4,
            "num_hidden_layers": 3,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
            "tie_word_embeddings": False,
            "vocab_size": vocab_size,
        },
        "tie_word_embeddings": False,
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_act": "quick_gelu",
            "hidden_size": WIDTH,
            "image_size": 32,
            "intermediate_size": 4 * WIDTH,
            "layer_norm_eps": 1e-5,
            "num_attention_heads": 4,
            "num_channels": 3,
            "num_hidden_layers": 4,
            "patch_size": 8,
            "projection_dim": WIDTH,
        },
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }


def qwen_config(num_ranks: int, dtype: str) -> dict[str, Any]:
    """Makes config.json as Qwen-VL has it, plus two fields that its code fixes for the real size."""
    image_start = num_ranks + 3 + 205 + 6  # after the chat markers, <|extra_*|>, <ref>, <box>, <quad> and their ends
    return {
        "architectures": ["QWenLMHeadModel"],
        "model_type": "qwen",
        "attn_dropout_prob": 0.0,
        "bf16": False,
        "emb_dropout_prob": 0.0,
        "fp16": False,
        "fp32": False,
        "hidden_size": WIDTH,
        "initializer_range": 0.02,
        "intermediate_size": 512,
        "kv_channels": WIDTH // 4,
        "layer_norm_epsilon": 1e-6,
        "max_position_embeddings": 8192,
        "no_bias": True,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "rotary_emb_base": 10000,
        "rotary_pct": 1.0,
        "scale_attn_weights": True,
        "seq_length": 2048,
        "tie_word_embeddings": False,
        "tokenizer_type": "QWenTokenizer",
        "torch_dtype": dtype,
        "use_cache": True,
        "use_dynamic_ntk": True,
        "use_flash_attn": False,
        "use_logn_attn": True,
        "visual": {
            "heads": 4,
            "image_size": 32,
            "image_start_id": image_start,
            "layers": 3,
            "mlp_ratio": 4.0,
            "n_heads": 4,
            "n_queries": 16,
            "output_dim": WIDTH,
            "patch_size": 8,
            "width": WIDTH,
        },
        "vocab_size": padded(image_start + 3),
    }


def padded(size: int) -> int:
    """Rounds the size of an embedding table up to a multiple of 16."""
    return -(-size // 16) * 16


def write_text_files(family: str, folder: Path, dtype: str = "float32") -> dict[str, Any]:
    """Writes the tokenizer and config.json, for weights of `dtype`; returns the config."""
    if family == "llava":
        num_ids = write_llama_tokenizer(folder)
        config = llava_config(padded(num_ids), num_ids - 1, dtype)
    else:
        config = qwen_config(write_qwen_tokenizer(folder), dtype)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return config


# Batches


def picture_batch(scenes: Sequence[Scene], rng: np.random.Generator, base: Family, config: Any) -> Batch:
    """Renders scenes of one tick, and labels their cells.

    Returns pictures (B, S, S, 3) uint8 and cells (B, N, 4) int32.
    """
    resize, side = resizer(base.frame_fit(config)), config.grid[0]
    return {
        "pictures": np.stack([resize(render(scene, rng)[0], config.image_size) for scene in scenes]),
        "cells": np.stack([cell_labels(scene, side) for scene in scenes]),
    }


def picture_batches(seed: int, phase: str, base: Family, config: Any) -> Iterator[Batch]:
    """Yields endless batches of 64 pictures of one to three things."""
    rng = phase_rng(seed, phase)
    while True:
        scenes = [picture_scene(rng, int(rng.integers(1, 4))) for _ in range(64)]
        yield picture_batch(scenes, rng, base, config)


def phase_rng(seed: int, phase: str) -> np.random.Generator:
    """Returns the random numbers of a phase; no other phase and no video uses them."""
    return np.random.default_rng((seed, *b"pretraining ", *phase.encode()))


class RowWriter:
    """Lays documents out as rows of a batch with the base's own prompt template, one document per row.

    The story and then the pictures take the place of a video.
    """

    def __init__(self, base: Family, config: Any, tokenizer: Any, row_length: int):
        self.base, self.config, self.row_length = base, config, row_length
        self.prompt = functools.cache(lambda question, answer: base.prompt(tokenizer, config, question, answer))
        self.encode = functools.cache(tokenizer.encode)

    def row(self, doc: Document, first_picture: int) -> Batch:
        """Returns one row; its visual slots are indices into the tokens of all pictures of the batch."""
        prompts = [self.prompt(question["question"], question["answer"]) for question in doc.questions]
        text = [*(token for token, _ in prompts[0][0]), *self.encode(doc.story)]
        tokens = self.config.num_patches
        visual = first_picture * tokens + np.arange(len(doc.pictures) * tokens)
        prefix = Prefix(
            ids=np.array(text + [0] * len(visual), np.int32),
            video_tokens=np.concatenate([np.full(len(text), -1), visual]).astype(np.int32),
            supervised=np.zeros(len(text) + len(visual), bool),
        )
        questions = [
            Question(ids=np.array([i for i, _ in after], np.int32), supervised=np.array([s for _, s in after]))
            for _, after in prompts
        ]
        row = ((0, tuple(range(len(questions)))),)
        sizes = {"row_length": self.row_length, "max_groups": 1, "max_targets": 4 * QUESTIONS}
        return fill_row(row, [prefix], questions, tokens_per_video=0, **sizes)

    def batch(self, docs: Sequence[Document], rng: np.random.Generator) -> Batch:
        """Returns the arrays (rows, ...) of documents and, in the same order, their pictures."""
        firsts = np.cumsum([0] + [len(doc.pictures) for doc in docs])
        rows = [self.row(doc, int(first)) for doc, first in zip(docs, firsts[:-1], strict=True)]
        scenes = [scene for doc in docs for scene in doc.pictures]
        arrays = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
        return arrays | picture_batch(scenes, rng, self.base, self.config)

    def batches(self, seed: int, phase: str, mix: Sequence[int]) -> Iterator[Batch]:
        """Yields endless batches of random documents, `mix[i]` of the kind `KINDS[i]`."""
        rng = phase_rng(seed, phase)
        kinds = np.repeat(KINDS, mix)
        while True:
            yield self.batch([document(kind, rng, QUESTIONS, MAX_WORDS) for kind in kinds], rng)


# Losses


def cell_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Sums the mean cross-entropies of colour, shape and both thirds; empty cells weigh 0.15.

    logits: (B, N, 20); labels: (B, N, 4).
    """
    total, start = 0.0, 0
    for i, classes in enumerate(CLASSES):
        chances = jax.nn.log_softmax(logits[..., start : start + classes + 1])
        weights = jnp.where(labels[..., i] == classes, 0.15, 1.0)
        losses = -jnp.take_along_axis(chances, labels[..., i : i + 1], axis=-1)[..., 0]
        total += (losses * weights).sum() / weights.sum()
        start += classes + 1
    return total


def bag_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Computes the binary cross-entropy of the set of colours, shapes and thirds in a picture.

    logits: (B, 16) from the mean over patches; labels: (B, N, 4). Only the patches say which colour and shape belong
    together, as in CLIP; if the mean said it, too, a video would need no spatial tokens.
    """
    held = [jax.nn.one_hot(labels[..., i], classes).max(1) for i, classes in enumerate(CLASSES)]
    return optax.sigmoid_binary_cross_entropy(logits, jnp.concatenate(held, axis=-1)).mean()


def encode(encoder: nnx.Module, pictures: jax.Array, base: Family) -> jax.Array:
    """Encodes pictures (B, S, S, 3) uint8 to features (B, N, D)."""
    return encoder(normalize(pictures, base.MEAN, base.STD, jnp.float32))


def project(projector: nnx.Module, features: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Projects features (B, N, D) of pictures to visual tokens (B, N, K). grid: rows and columns of features."""
    return projector(features, jnp.ones(features.shape[:2], bool), grid)


def predict(llm: nnx.Module, tokens: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
    """Computes logits (R, targets, V) of the supervised tokens. tokens: (P, N, K), visual tokens of all pictures."""
    visual = tokens.reshape(-1, tokens.shape[-1])[jnp.maximum(batch["video_tokens"], 0)]
    text = llm.embed(batch["token_ids"], tokens.dtype)
    embeds = jnp.where((batch["video_tokens"] >= 0)[..., None], visual, text)
    masks = row_attention(*(batch[name] for name in ("group_ids", "question_ids", "position_ids")))
    hidden, _ = llm(embeds, batch["position_ids"], masks)
    return llm.logits(jnp.take_along_axis(hidden, batch["target_slots"][..., None], axis=1))


def answer_loss(logits: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
    """Computes the mean cross-entropy of the supervised tokens."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["target_ids"])
    return (losses * batch["target_weights"]).sum() / batch["target_weights"].sum()


# Training


def initialised(module: nnx.Module, rng: np.random.Generator) -> nnx.Module:
    """Replaces every matrix by a normal one of variance 1 / fan-in, which suits these widths."""
    table = name_table(module, "")
    wide = {leaf.path: leaf.shape for leaf in table.values() if len(leaf.shape) > 1 and leaf.path[-1] not in FIXED}

    def draw(path: tuple, leaf: nnx.Variable) -> jax.Array:
        if path not in wide:
            return leaf[...]
        return jnp.asarray(rng.normal(0, np.prod(wide[path][1:]) ** -0.5, leaf.shape), jnp.float32)

    return fill(module, draw)


def new_parts(base: Family, config: Any, seed: int) -> dict[str, nnx.Module]:
    """Makes the untrained encoder, projector and llm."""
    rng = phase_rng(seed, "weights")
    return {part: initialised(module, rng) for part, module in random_parts(base, config, seed).items()}


def fit(
    loss_fn: Callable[[dict[str, nnx.Module], Any], jax.Array],
    modules: dict[str, nnx.Module],
    batches: Iterator[Batch],
    steps: int,
    name: str,
) -> dict[str, nnx.Module]:
    """Trains modules with AdamW, a warm-up over 8 % of the steps and a cosine to 0; returns the trained modules."""
    graphdef, weights = nnx.split(nnx.Dict(modules))
    weights = nnx.to_pure_dict(weights)
    fixed = jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in FIXED, weights)
    schedule = warmup_cosine(LEARNING_RATE, steps, 0.08)
    optimizer = optax.chain(
        optax.masked(optax.set_to_zero(), fixed),
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b2=0.98, weight_decay=0.02, mask=jax.tree.map(lambda leaf: not leaf, fixed)),
    )

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(weights: Weights, state: Any, batch: Batch) -> tuple[Weights, Any, jax.Array]:
        loss, grads = jax.value_and_grad(lambda weights: loss_fn(nnx.merge(graphdef, weights), batch))(weights)
        updates, state = optimizer.update(grads, state, weights)
        return optax.apply_updates(weights, updates), state, loss

    state = optimizer.init(weights)
    for i in (bar := tqdm(range(steps), name, unit="step")):
        weights, state, loss = step(weights, state, next(batches))
        if i % 20 == 0:
            bar.set_postfix(loss=f"{loss:.3f}")
    return dict(nnx.merge(graphdef, weights))


def train_encoder(encoder: nnx.Module, base: Family, config: Any, seed: int, steps: int) -> nnx.Module:
    """Stage one: trains the encoder with the cell loss and the bag loss."""
    rngs = nnx.Rngs(seed)
    heads = {
        "cells": Linear(WIDTH, sum(CLASSES) + len(CLASSES), rngs=rngs),
        "bag": Linear(WIDTH, sum(CLASSES), rngs=rngs),
    }

    def loss(modules: dict[str, nnx.Module], batch: Batch) -> jax.Array:
        features = encode(modules["encoder"], batch["pictures"], base)
        bag = bag_loss(modules["bag"](features.mean(1)), batch["cells"])
        return 4 * bag + cell_loss(modules["cells"](features), batch["cells"])

    batches = picture_batches(seed, "encoder", base, config)
    return fit(loss, {"encoder": encoder, **heads}, batches, steps, "encoder")["encoder"]


def train_language(
    parts: dict[str, nnx.Module], base: Family, rows: RowWriter, seed: int, phases: Sequence[Phase]
) -> dict[str, nnx.Module]:
    """Stage two: trains the projector and the language model on documents, with a frozen encoder."""
    encoder = nnx.split(parts["encoder"])
    cells = Linear(WIDTH, sum(CLASSES) + len(CLASSES), rngs=nnx.Rngs(seed))
    modules = {"projector": parts["projector"], "llm": parts["llm"], "cells": cells}
    for phase in phases:

        def loss(modules: dict[str, nnx.Module], batch: Batch, phase: Phase = phase) -> jax.Array:
            features = encode(nnx.merge(*encoder), batch["pictures"], base)
            tokens = project(modules["projector"], features, rows.config.grid)
            total = phase.cell_weight * cell_loss(modules["cells"](tokens), batch["cells"])
            return total + answer_loss(predict(modules["llm"], tokens, batch), batch) if phase.mix else total

        if phase.mix:
            modules = fit(loss, modules, rows.batches(seed, phase.name, phase.mix), phase.steps, phase.name)
        else:
            alone = {key: modules[key] for key in ("projector", "cells")}
            batches = picture_batches(seed, phase.name, base, rows.config)
            modules |= fit(loss, alone, batches, phase.steps, phase.name)
    return {"encoder": parts["encoder"], "projector": modules["projector"], "llm": modules["llm"]}


def accuracy(
    parts: dict[str, nnx.Module], base: Family, rows: RowWriter, rng: np.random.Generator, num_batches: int
) -> dict[tuple[str, str], float]:
    """Computes the exact-match accuracy on new documents, by kind of document and kind of question.

    An answer is right if each of its tokens, its end included, is the likeliest one after the right tokens before it;
    greedy decoding then writes the answer.
    """
    graphdef, weights = nnx.split(nnx.Dict(parts))

    @jax.jit
    def guess(weights: Weights, batch: Batch) -> jax.Array:
        model = nnx.merge(graphdef, weights)
        tokens = project(model["projector"], encode(model["encoder"], batch["pictures"], base), rows.config.grid)
        return predict(model["llm"], tokens, batch).argmax(-1)

    right: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for _ in range(num_batches):
        docs = [(kind, document(kind, rng, QUESTIONS, MAX_WORDS)) for kind in KINDS for _ in range(16)]
        batch = rows.batch([doc for _, doc in docs], rng)
        wrong = np.asarray(guess(weights, batch)) != batch["target_ids"]
        for (kind, doc), misses, owners in zip(docs, wrong, batch["target_questions"], strict=True):
            for i, question in enumerate(doc.questions):
                right[kind, question["kind"]].append(not misses[owners == i].any())
    return {key: float(np.mean(values)) for key, values in sorted(right.items())}


def make_base(family: str, folder: Path, seed: int = 0) -> None:
    """Writes the tiny base of a family; `folder` must exist."""
    base = load_family(family)
    config = base.Config.from_published(write_text_files(family, folder, DTYPE[family]))
    rows = RowWriter(base, config, base.Tokenizer(folder), ROW_LENGTH[family])
    parts = new_parts(base, config, seed)
    parts["encoder"] = train_encoder(parts["encoder"], base, config, seed, ENCODER_STEPS)
    parts = train_language(parts, base, rows, seed, PHASES[family])
    for (kind, question), value in accuracy(parts, base, rows, phase_rng(seed, "check"), 8).items():
        print(f"{kind:18} {question:14} {value:.3f}")
    dtype = jnp.dtype(DTYPE[family])
    tensors = {name: value.astype(dtype) for name, value in tensors_of(base, config, parts).items()}
    with written_whole(folder / "model.safetensors") as file:
        save_file(tensors, file, metadata={"format": "pt"})


def main(argv: list[str]) -> None:
    parser = Parser("python -m redvillm_jax.demo.pretrain", __doc__, needed=("family", "out"))
    parser.add_argument("--family", choices=sorted(PHASES), help="whose architecture and file format")
    parser.add_argument("--out", type=local_path, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--seed", type=number(int), default=0, metavar="N", help="seed of all that is random (%(default)s)"
    )
    args = parser.parse_args(argv)
    if (args.out / "model.safetensors").exists():
        print(f"{args.out}: already there; choose another --out to make it again")
        return
    jax.config.update("jax_platforms", "cpu")
    if hasattr(os, "sched_setaffinity"):  # Linux; the last bits of a sum depend on the number of threads
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[sorted(PHASES).index(args.family) % len(cores)]})
    args.out.mkdir(parents=True, exist_ok=True)
    make_base(args.family, args.out, args.seed)


if __name__ == "__main__":
    run(main)
