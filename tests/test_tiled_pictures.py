"""Questions about pictures that are cut into tiles get the logits and answers of transformers' own model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import ParityTable, config_of
from PIL import Image

import redvillm_jax
from conversion.from_torch import from_torch
from data_pipeline.media.reading import Picture, read_media
from redvillm_jax import answer
from redvillm_jax.inference.engine import Arrays, Generation
from redvillm_jax.inference.generate import weighted
from redvillm_jax.inference.prompts import Prompt
from tests.tiny_tokenizers import TEMPLATES, write_template, write_tokenizer

torch = pytest.importorskip("torch")

QUESTION = "What is the colour of the ball?"
PICTURES = {"wide": (90, 20), "tall": (20, 90), "square": (40, 40), "large": (140, 100)}  # width, height
LENGTH, ENTRIES = 512, 1024  # tokens of the longest prompt here, and entries of the largest table
TEXT = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "max_position_embeddings": 1024}
VISION = {"hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": 24, "patch_size": 6}


def next_model(vocab_size: int, image: int) -> tuple[Any, Any, dict]:
    """A model of LLaVA-NeXT's class, its image processor, and the further fields of its processor."""
    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    pinpoints = [[24, 48], [48, 24], [48, 48], [72, 24], [24, 72]]
    config = LlavaNextConfig(
        text_config=TEXT | {"model_type": "mistral", "vocab_size": vocab_size, "sliding_window": None},
        vision_config=VISION | {"model_type": "clip_vision_model"},
        image_grid_pinpoints=pinpoints,
        image_token_index=image,
        image_seq_length=16,
    )
    sizes = {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}
    pictures = LlavaNextImageProcessorPil(**sizes, image_grid_pinpoints=pinpoints)
    more = {"patch_size": 6, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return LlavaNextForConditionalGeneration(config), pictures, more


def onevision_model(vocab_size: int, image: int) -> tuple[Any, Any, dict]:
    """The same of LLaVA-OneVision's."""
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

    sides = [24 * i for i in range(1, 7)]
    pinpoints = [[height, width] for height in sides for width in sides]
    config = LlavaOnevisionConfig(
        text_config=TEXT | {"model_type": "qwen2", "vocab_size": vocab_size},
        vision_config=VISION | {"model_type": "siglip_vision_model", "vision_use_head": False},
        image_grid_pinpoints=pinpoints,
        vision_aspect_ratio="anyres_max_9",
        image_token_index=image,
        video_token_index=vocab_size - 1,
    )
    half, size = [0.5] * 3, {"height": 24, "width": 24}
    pictures = LlavaOnevisionImageProcessorPil(
        size=size, image_mean=half, image_std=half, image_grid_pinpoints=pinpoints
    )
    more = {"num_image_tokens": 16, "vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_9"}
    return LlavaOnevisionForConditionalGeneration(config), pictures, more


def smolvlm_model(vocab_size: int, image: int) -> tuple[Any, Any, dict]:
    """The same of Idefics3's."""
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    config = Idefics3Config(
        text_config=TEXT | {"model_type": "llama", "vocab_size": vocab_size},
        vision_config=VISION,
        scale_factor=2,
        image_token_id=image,
        tie_word_embeddings=False,
    )
    pictures = Idefics3ImageProcessorPil(size={"longest_edge": 96}, max_image_size={"longest_edge": 24})
    return Idefics3ForConditionalGeneration(config), pictures, {"image_seq_len": 4}


def any_class(processor: Any, name: str, argument: Any) -> type:
    """Stands in for the check of a processor's parts, which needs torchvision for the video part."""
    return type(argument)


class Case:
    """A tiny checkpoint of a family as it is published, and transformers' model and processor of it."""

    def __init__(self, folder: Path, make: Callable, processor: str, tokenizer: str, template: str):
        import transformers

        folder.mkdir()
        size = write_tokenizer(tokenizer, folder)
        write_template(TEMPLATES[template], folder)
        text = transformers.AutoTokenizer.from_pretrained(folder)
        image = text.convert_tokens_to_ids("<image>")
        torch.manual_seed(0)
        self.model, pictures, more = make(size + 2, image)
        self.newline = int(hasattr(self.model.model, "image_newline"))
        self.reduces = hasattr(self.model.config, "vision_aspect_ratio")
        self.model.eval()
        with torch.no_grad():
            for weight in self.model.parameters():
                weight.add_(0.2 * torch.randn_like(weight))
        self.model.save_pretrained(folder)
        (folder / "preprocessor_config.json").write_text(pictures.to_json_string())
        kind = type("Processor", (getattr(transformers, processor),), {"check_argument_for_proper_class": any_class})
        self.processor = kind(pictures, text, chat_template=TEMPLATES[template], **more)

    def inputs(self, picture: Image.Image) -> dict[str, torch.Tensor]:
        """What the model gets for the question about a picture."""
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
        text = self.processor.apply_chat_template(chat, add_generation_prompt=True)
        return self.processor(text=text, images=picture, return_tensors="pt")


CASES = {
    "llava": (next_model, "LlavaNextProcessor", "mistral", "mistral"),
    "llava_onevision": (onevision_model, "LlavaOnevisionProcessor", "qwen2", "onevision"),
    "smolvlm": (smolvlm_model, "Idefics3Processor", "smollm2", "smolvlm"),
}  # family -> what `Case` needs
ONE = [name if name == "llava_onevision" else pytest.param(name, marks=pytest.mark.slow) for name in CASES]


@pytest.fixture(scope="module")
def opened(request, tmp_path_factory):
    """A case, the model that this project makes of its folder, and the files of the pictures."""
    folder = tmp_path_factory.mktemp(request.param)
    case = Case(folder / "published", *CASES[request.param])
    from_torch(request.param, folder / "published", folder / "base")
    config = config_of("llava", "red_villm") | {"family": request.param, "dtype": "float32"}
    files = {}
    for name, (width, height) in PICTURES.items():
        pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
        files[name] = folder / f"{name}.png"
        Image.fromarray(pixels).save(files[name])
    return case, redvillm_jax.load(folder / "base", config=config), files


def all_logits(assistant: Any, asked: list[tuple[Arrays, Prompt]]) -> tuple[list[np.ndarray], np.ndarray]:
    """Logits (tokens, vocab_size) of whole picture questions by the parts of the assistant's model, in one program.

    The second is the table of their visual tokens.
    """
    inference = assistant.inference
    places, sources, weights = [], [], []
    for _, prompt in asked:
        tokens = [*prompt.prefix, *((token, -1) for token in prompt.question)]
        places.append(np.array(tokens + [(0, -1)] * (LENGTH - len(tokens)), np.int32))
        same = np.repeat(np.arange(ENTRIES)[:, None], 4, 1), np.tile(np.float32([1, 0, 0, 0]), (ENTRIES, 1))
        sums = prompt.sums or same
        for parts, part in zip((sources, weights), sums, strict=True):
            parts.append(np.pad(part, ((0, ENTRIES - len(part)), (0, 0))))
    arrays = {"places": places, "sources": sources, "weights": weights}
    arrays |= {name: [media[name] for media, _ in asked] for name in ("pictures", "num_tiles")}

    @jax.jit
    def logits(weights: Any, arrays: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(inference.graphdef, weights)
        table = model.tile_tokens(arrays["pictures"], arrays["num_tiles"], jnp.float32)
        tokens = weighted(table, arrays["sources"], arrays["weights"])
        ids, slots = arrays["places"][..., 0], arrays["places"][..., 1]
        positions = jnp.broadcast_to(jnp.arange(LENGTH), ids.shape)
        masks = model.masks(jnp.ones_like(positions), 0 * positions, positions, slots)
        return model.llm.logits(model.llm(model.embed(ids, slots, tokens), positions, masks)[0]), table

    one = jax.device_put(inference.weights, jax.devices()[0])
    found, table = logits(one, {name: np.stack(values) for name, values in arrays.items()})
    return [np.asarray(row)[: prompt.length] for row, (_, prompt) in zip(found, asked, strict=True)], np.asarray(table)


@pytest.mark.parametrize("opened", CASES, indirect=True)
def test_logits_are_transformers_own(opened):
    case, assistant, files = opened
    arrays = [read_media(assistant.reading, Picture(file)) for file in files.values()]
    prompts = [assistant.picture_prompt(QUESTION, one) for one in arrays]
    found, table = all_logits(assistant, list(zip(arrays, prompts, strict=True)))
    image, tokens = case.model.config.image_token_id, []
    parity = ParityTable(f"tiles_{assistant.base.family}")
    for name, got, prompt in zip(files, found, prompts, strict=True):
        inputs = case.inputs(Image.open(files[name]))
        ids = [*prompt.prefix, *((token, -1) for token in prompt.question)]
        assert [image if slot >= 0 else token for token, slot in ids] == inputs["input_ids"][0].tolist(), name
        with torch.no_grad():
            want = case.model(**inputs).logits[0]
        parity.add(f"logits, {name} picture", got, want)
        tokens.append(prompt.num_visual)
    parity.write()
    parity.check()
    assert len(set(tokens)) > 2
    for row, one in zip(table, arrays, strict=True):
        real = one["num_tiles"] * assistant.picture_tokens + case.newline
        assert row[:real].any(axis=1).all() and not row[real:].any()  # padding is not encoded


@pytest.mark.parametrize("opened", ONE, indirect=True)
def test_answers_are_transformers_own_and_a_picture_is_read_once(opened, monkeypatch):
    case, assistant, files = opened
    name, text = ("large" if case.reduces else "wide"), assistant.tokenizer.decode
    with torch.no_grad():
        inputs = case.inputs(Image.open(files[name]))
        ids = case.model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=None)[0, -8:].tolist()
    prefills = []
    prefill = assistant.inference.prefill
    monkeypatch.setattr(assistant.inference, "prefill", lambda *given: prefills.append(given) or prefill(*given))
    first, other = assistant.ask(Picture(files[name]), [QUESTION, "Where is it?"], max_new_tokens=8)
    stop = next((i for i, token in enumerate(ids) if token in assistant.tokenizer.stop_ids), 8)
    assert first == text(ids[:stop]).strip() and len(set(ids)) > 1
    assert assistant.ask(Picture(files[name]), "Where is it?", max_new_tokens=8) == other
    assert "".join(assistant.stream(Picture(files[name]), QUESTION, max_new_tokens=8)).strip() == first
    assert len(prefills) == 1


@pytest.mark.slow
@pytest.mark.parametrize("opened", CASES, indirect=True)
def test_batches_answer_as_one_by_one(opened, tmp_path):
    """Pictures of several shapes, in an order that mixes them."""
    _, assistant, files = opened
    asked = [(name, question) for question in (QUESTION, "Where is it?") for name in files]
    lines = [{"picture": str(files[name]), "question": question} for name, question in asked]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    paths = f"--model=x --input={tmp_path / 'q.jsonl'} --output={tmp_path / 'a.jsonl'} --num_workers=1"
    flags = answer.make_parser().parse_args(f"{paths} --batch_size=8 --video_batch_size=8".split())
    shapes = {name: assistant.shape_of(Picture(file)) for name, file in files.items()}
    assert all(shapes.values()) and len(set(shapes.values())) > 1 and assistant.shape_of(Picture("none.png")) == 0
    generation = Generation(max_new_tokens=4)
    answer.answer_file(assistant, answer.read_questions(flags.input, flags.output), flags, generation)
    answers = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [one["prediction"] for one in answers] == [
        assistant.ask(Picture(files[name]), question, max_new_tokens=4) for name, question in asked
    ]
    assert assistant.inference._prefill._cache_size() <= len(files)
