"""Gemma 3 against transformers' Gemma3ForConditionalGeneration, with pictures, and at its real sizes."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from PIL import Image
from safetensors.numpy import load_file, save_file
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

import redvillm_jax
from configs import gemma3 as gemma3_config
from conversion.from_torch import from_torch
from conversion.to_torch import to_torch
from data_pipeline.common.errors import UserError
from data_pipeline.media.pictures import read_picture
from data_pipeline.media.reading import Picture
from redvillm_jax.bases import gemma3
from redvillm_jax.model.base_folder import canonical_name, open_base
from redvillm_jax.model.build import load_model
from redvillm_jax.model.settings import model_settings, plain_config
from redvillm_jax.model.video_llm import VideoLLM
from redvillm_jax.model.weights import expected_tensors
from redvillm_jax.modules.layers import normalize
from redvillm_jax.runtime.sharding import make_mesh
from tests.helpers import ParityTable
from tests.test_gemma3_text import layer_outputs
from tests.tiny_bases import write_gemma3

QUESTION = "What is the colour of the square?"
TOKENS = 16  # of a picture


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> tuple[Path, Gemma3ForConditionalGeneration]:
    """A folder as transformers saves it, and its model, whose random weights let every token change the answer."""
    folder = tmp_path_factory.mktemp("gemma3")
    write_gemma3(folder)
    torch.manual_seed(0)
    config = Gemma3Config.from_pretrained(folder, attn_implementation="eager")
    model = Gemma3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 1.0 if "language_model" in name else 0.5
            parameter.normal_(0, 0.6 * scale if parameter.ndim > 1 else scale)
        model.get_input_embeddings().weight.mul_(0.1)
    model.save_pretrained(folder)
    return folder, model


@pytest.fixture(scope="module")
def base_folder(published, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "base"
    from_torch("gemma3", published[0], out)
    return out


@pytest.fixture(scope="module")
def model(base_folder) -> VideoLLM:
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    settings = model_settings(plain_config(gemma3_config.get_config()))
    return load_model(open_base(base_folder), settings, mesh, dtype=jnp.float32)


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("pictures") / "wide.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 70, 3), np.uint8)).save(file)
    return file


def processed(folder: Path, picture: Path) -> dict[str, torch.Tensor]:
    """What transformers' own processor makes of a picture and a question."""
    from transformers import AutoTokenizer
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
    from transformers.models.gemma3.processing_gemma3 import Gemma3Processor

    template = (folder / "chat_template.jinja").read_text()
    images = Gemma3ImageProcessorPil.from_pretrained(folder)
    own = Gemma3Processor(images, AutoTokenizer.from_pretrained(folder), template, image_seq_length=TOKENS)
    parts = [{"type": "image", "image": Image.open(picture)}, {"type": "text", "text": QUESTION}]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return own.apply_chat_template([{"role": "user", "content": parts}], **options)


def rows_of(model: VideoLLM, ids: np.ndarray, token_types: np.ndarray, tokens: jax.Array) -> tuple:
    """Embeddings, positions and masks of rows that hold one prompt each."""
    slots = jnp.where(token_types == 1, jnp.cumsum(token_types == 1, axis=1) - 1, -1)
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    masks = model.masks(0 * positions, 0 * positions, positions, slots)
    return model.embed(jnp.where(token_types == 1, 0, ids), slots, tokens), positions, masks


def test_every_stage_equals_transformers(published, model, picture):
    folder, theirs = published
    inputs, table = processed(folder, picture), ParityTable("gemma3")
    ids, types = inputs["input_ids"].numpy(), inputs["token_type_ids"].numpy()
    out = theirs(**inputs, output_hidden_states=True)
    weights = np.random.default_rng(1).standard_normal(out.logits.shape).astype(np.float32)
    (out.logits * torch.from_numpy(weights)).sum().backward()
    seen = theirs.get_image_features(inputs["pixel_values"])

    base = gemma3.SIZES["tiny"]
    square = read_picture(picture, base.image_size, gemma3.frame_fit(base))
    pixels = normalize(square[None], gemma3.MEAN, gemma3.STD, jnp.float32)
    table.add("pixels", pixels, inputs["pixel_values"].permute(0, 2, 3, 1).numpy(), atol=1e-6)
    before, after = gemma3.prompt(gemma3.Tokenizer(folder), base, QUESTION, None)
    slot = theirs.config.image_token_id
    table.add("ids", [[i for i, _ in before] + [slot] * TOKENS + [i for i, _ in after]], ids)

    features = jax.jit(lambda model, pixels: model.encoder(pixels))(model, pixels)
    table.add("vision tower", features, seen.last_hidden_state.detach().numpy())

    @jax.jit
    def stages(model: VideoLLM) -> tuple:
        tokens = model.picture_tokens(square[None], jnp.float32)
        embeds, positions, masks = rows_of(model, ids, types, tokens)
        return tokens, embeds, layer_outputs(model.llm, embeds, positions, masks)

    tokens, embeds, layers = stages(model)
    table.add("projector", tokens, seen.pooler_output.detach().numpy())
    table.add("embeddings", embeds, out.hidden_states[0].detach().numpy())
    for i in (0, 1):
        table.add(f"layer {i}", layers[i], out.hidden_states[i + 1].detach().numpy())

    graphdef, projectors, rest = nnx.split(model, lambda path, _: "projectors" in path, ...)

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradient(projectors: nnx.State) -> tuple:
        model = nnx.merge(graphdef, projectors, rest)
        embeds, positions, masks = rows_of(model, ids, types, model.picture_tokens(square[None], jnp.float32))
        logits = model.llm.logits(model.llm(embeds, positions, masks)[0])
        return (logits * weights).sum(), logits

    gradients, logits = gradient(projectors)
    table.add("logits", logits, out.logits.detach().numpy())
    got, want = gradients["projectors"]["spatial"], theirs.model.multi_modal_projector
    name = "mm_input_projection_weight"
    table.add_gradient(f"gradient of {name}", got[name][...], want.mm_input_projection_weight.grad.numpy())
    norm = got["mm_soft_emb_norm"]["weight"][...]
    table.add_gradient("gradient of mm_soft_emb_norm", norm, want.mm_soft_emb_norm.weight.grad.numpy())
    table.write()
    table.check()

    model.both_directions = False
    try:  # a prompt in which the directions did not matter would prove nothing
        causal = jax.jit(lambda model: model.llm(*rows_of(model, ids, types, tokens))[0])(model)
    finally:
        model.both_directions = True
    assert np.abs(model.llm.logits(causal) - logits).max() > 0.1


def test_a_picture_question_gets_the_answer_of_transformers(published, base_folder, picture):
    """Pixels, prompt, masks and decoding with a cache, all at once, over more tokens than a window has."""
    folder, theirs = published
    inputs = processed(folder, picture)

    def written(inputs: dict[str, torch.Tensor]) -> list[int]:
        ids = theirs.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=[])
        return ids[0, inputs["input_ids"].shape[1] :].tolist()

    want = written(inputs)
    assert written({name: value for name, value in inputs.items() if name != "token_type_ids"}) != want  # causal
    assistant = redvillm_jax.load(base_folder, config=gemma3_config.get_config(), dtype="float32")
    assistant.inference.stop_ids = np.array([-1], np.int32)
    assistant.text = list  # the ids
    assert assistant.ask(Picture(picture), QUESTION, max_new_tokens=12) == want


def v4(name: str) -> str:
    """The name that a tensor of transformers 5 has in the published files."""
    for new, old in (
        ("model.language_model.", "language_model.model."),
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
    ):
        name = old + name.removeprefix(new) if name.startswith(new) else name
    return name


@pytest.mark.parametrize("rename", [v4, str])
def test_the_round_trip_is_bit_for_bit(rename, published, tmp_path):
    folder, theirs = published
    source, saved = tmp_path / "source", {name: p.detach().numpy() for name, p in theirs.named_parameters()}
    source.mkdir()
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (source / file.name).write_bytes(file.read_bytes())
    tensors = {rename(name): array.astype(np.float16) for name, array in saved.items()}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    from_torch("gemma3", source, tmp_path / "base")
    to_torch(tmp_path / "base", tmp_path / "whole", full=True)
    back = {name: x for file in (tmp_path / "whole").glob("*.safetensors") for name, x in load_file(file).items()}
    assert back.keys() == tensors.keys()
    for name, array in tensors.items():
        assert back[name].dtype == array.dtype and back[name].tobytes() == array.tobytes(), name


def published_config(size: str) -> dict:
    """The fields that the published config.json of a size states."""
    text = {
        "4b": {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34},
        "12b": {
            "hidden_size": 3840,
            "intermediate_size": 15360,
            "num_attention_heads": 16,
            "num_hidden_layers": 48,
            "num_key_value_heads": 8,
        },
    }[size]
    text |= {
        "model_type": "gemma3_text",
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    vision = {"hidden_size": 1152, "image_size": 896, "intermediate_size": 4304, "num_attention_heads": 16}
    vision |= {"model_type": "siglip_vision_model", "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": False}
    fixed = {
        "boi_token_index": 255999,
        "eoi_token_index": 256000,
        "image_token_index": 262144,
        "eos_token_id": [1, 106],
    }
    return fixed | {"model_type": "gemma3", "mm_tokens_per_image": 256, "text_config": text, "vision_config": vision}


@pytest.mark.parametrize(("size", "parameters"), [("4b", 4_300_079_472), ("12b", 12_187_325_040)])
def test_the_real_sizes_have_the_published_tensors(size, parameters):
    assert gemma3.Config.from_published(published_config(size)) == gemma3.SIZES[size]
    with torch.device("meta"):
        theirs = Gemma3ForConditionalGeneration(Gemma3Config(**published_config(size)))
    shapes = {name: tuple(p.shape) for name, p in theirs.named_parameters()}
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == parameters
    ours = {name: leaf.shape for name, leaf in expected_tensors(gemma3, gemma3.SIZES[size]).items()}
    for rename in (v4, str):
        assert {canonical_name(gemma3, rename(name)): shape for name, shape in shapes.items()} == ours


def test_a_feature_of_a_sequence_is_a_square_of_equal_features(model):
    projector, pool = model.projectors["spatial"], gemma3.SIZES["tiny"].pool
    features = jax.random.normal(jax.random.key(0), (1, 3, gemma3.SIZES["tiny"].feature_size))
    real = jnp.ones((1, 3), bool)
    alone = projector(features, real, (3,))
    assert projector.token_layout((3,)) == (3,) and projector.token_layout((8, 8)) == (4, 4)
    squares = jnp.repeat(features, pool * pool, axis=1).reshape(3, pool * pool, -1)
    for i in range(3):
        np.testing.assert_allclose(projector(squares[i][None], None, (pool, pool)), alone[:, i : i + 1], atol=1e-6)


def test_squares_at_the_edges_may_be_smaller():
    x = np.arange(15.0).reshape(1, 15, 1)
    got = gemma3.mean_of_squares(jnp.asarray(x), (3, 5), 2)[0, :, 0]
    grid = x.reshape(3, 5)
    want = [grid[r : r + 2, c : c + 2].mean() for r in (0, 2) for c in (0, 2, 4)]
    np.testing.assert_allclose(got, want)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mm_tokens_per_image": 10}, "mm_tokens_per_image is 10, supported: the square of a divisor of the 8 patches"),
        ({"mm_tokens_per_image": 9}, "mm_tokens_per_image is 9, supported: the square of a divisor of the 8 patches"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is false, supported: true"),
        ({"text_config": None}, "text_config is null, supported: an object"),
        ({"vision_config": {"model_type": "clip_vision_model"}}, "vision_config.model_type is"),
        ({"a_new_field": 1}, r"not known: a_new_field \(1\)"),
    ],
)
def test_what_it_does_not_compute_is_refused(change, said, published):
    config = json.loads((published[0] / "config.json").read_text())
    with pytest.raises(UserError, match=said) as caught:
        gemma3.Config.from_published(config | change)
    assert "\n" not in str(caught.value)


def test_pan_and_scan_is_refused(published, tmp_path):
    said = json.loads((published[0] / "preprocessor_config.json").read_text())
    config = gemma3.SIZES["tiny"]
    assert gemma3.read_image_processor(config, said, "preprocessor_config.json") == config
    with pytest.raises(UserError, match="do_pan_and_scan is true, supported: null or false"):
        gemma3.read_image_processor(config, said | {"do_pan_and_scan": True}, "preprocessor_config.json")
