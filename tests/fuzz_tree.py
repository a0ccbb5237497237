"""The commands that `test_fuzz` runs, on a small tree of all that the project reads and writes."""

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from fuzz import STRAY, Command, call, reset
from PIL import Image
from safetensors.numpy import load_file, save_file

from conversion import from_torch, to_torch
from data_pipeline import prepare, show, translate
from redvillm_jax import answer, encode, evaluate, judge, train
from redvillm_jax.demo import moving_shapes
from redvillm_jax.inference import assistant
from redvillm_jax.runtime.sharding import make_mesh
from tests.fake_openai import FakeOpenAI

ROOT = Path(__file__).parents[1]
DEMO_BASES = ROOT / "redvillm_jax" / "demo" / "bases"
ONE = {"data": 1, "fsdp": 1, "tensor": 1}
CONFIG = (f"--config={ROOT}/configs/demo.py:llava", "--config.base={}/base", "--config.num_frames=2")
TRAIN = (*CONFIG, "--config.num_epochs=2", "--config.batch_questions=18", "--config.log_every=1")
TRAIN = (*TRAIN, "--config.checkpoint_every=1", "--config.row_length=112")
ENDPOINT = ("--model=gpt-4o-mini-2024-07-18", "--base_url=ENDPOINT", "--max_retries=0", "--timeout=20")
VIDEOS = ("--videos={}/shapes/train/videos", "--num_frames=2")
ASK = ("--max_new_tokens=2", "--num_workers=1")


def read_of(store: str) -> list[str]:
    """The files of a store that are read to learn from it."""
    return [f"{store}/{name}" for name in ("store.json", "videos.jsonl", "instructions.jsonl", "*.array_record-*")]


COMMANDS = {
    "from_torch": Command(
        from_torch.main,
        ("--family=llava", "--source={}/source", "--out={}/base"),
        ["source"],
        ["source/*"],
        ["base/*"],
        ["source/*"],
        each=12,
    ),
    "from_torch_qwen": Command(
        from_torch.main,
        ("--family=qwen_vl", "--source={}/qwen", "--out={}/base"),
        ["qwen"],
        ["qwen/*"],
        ["base/*"],
        ["qwen/*"],
        each=8,
    ),
    "from_torch_shards": Command(
        from_torch.main,
        ("--family=llava", "--source={}/shards", "--out={}/base"),
        ["shards"],
        ["shards/*.index.json", "shards/*.safetensors"],
        ["base/*"],
        ["shards/*"],
    ),
    "from_torch_bin": Command(
        from_torch.main,
        ("--family=llava", "--source={}/bin", "--out={}/base"),
        ["bin"],
        ["bin/*.bin*"],
        ["base/*"],
        ["bin/*"],
        each=8,
    ),
    "from_torch_again": Command(
        from_torch.main,
        ("--family=llava", "--source={}/source", "--out={}/base"),
        ["source", "base"],
        ["base/*"],
        ["base/*"],
    ),
    "moving_shapes_again": Command(
        moving_shapes.main,
        ("--out={}/shapes", "--train=3", "--dev=1", "--test=1", "--num_workers=1"),
        ["shapes"],
        ["shapes/settings.json"],
        ["shapes/settings.json"],
    ),
    "prepare": Command(
        prepare.main,
        (*VIDEOS, "--instructions={}/questions/own.jsonl", "--base={}/base", "--out={}/frames"),
        ["shapes", "questions", "base"],
        ["shapes/train/videos/*", "questions/own.jsonl", "base/base.json"],
        ["frames/*"],
        ["shapes/*", "questions/*"],
        each=8,
    ),
    **{
        f"prepare_{form}": Command(
            prepare.main,
            (*VIDEOS, f"--instructions={{}}/questions/{form}", "--image_size=32", "--out={}/frames"),
            ["shapes", "questions"],
            [f"questions/{form}"],
            ["frames/*"],
            ["questions/*"],
        )
        for form in ("table.csv", "table.parquet", "instruct.json", "llava.json", "qwen.json")
    },
    "prepare_list": Command(
        prepare.main,
        (
            "--videos={}/questions/list.txt",
            "--num_frames=2",
            "--instructions={}/questions/own.jsonl",
            "--out={}/frames",
        ),
        ["shapes", "questions"],
        ["questions/list.txt"],
        ["frames/*"],
        ["questions/*"],
    ),
    "prepare_again": Command(
        prepare.main,
        (*VIDEOS, "--instructions={}/questions/own.jsonl", "--base={}/base", "--out={}/frames"),
        ["shapes", "questions", "base", "frames"],
        ["frames/*"],
        ["frames/*"],
    ),
    "show_video": Command(
        show.main,
        ("{}/frames", "--video=train-00000", "--out={}/show.png"),
        ["frames"],
        read_of("frames"),
        ["show.png"],
        each=2,
    ),
    "show_stats": Command(
        show.main,
        ("{}/streams", "--stats", "--out={}/show.png"),
        ["streams"],
        read_of("streams")[:3],
        ["show.png"],
        each=2,
        prints=True,
    ),
    "encode": Command(
        encode.main,
        (*CONFIG, "--data={}/frames", "--out={}/streams"),
        ["base", "frames"],
        ["base/*", *read_of("frames")],
        ["streams/*"],
        each=1,
    ),
    "encode_again": Command(
        encode.main,
        (*CONFIG, "--data={}/frames", "--out={}/streams"),
        ["base", "frames", "streams"],
        ["streams/*"],
        ["streams/*"],
        each=1,
    ),
    "train": Command(
        train.main,
        (*TRAIN, "--config.data={}/streams", "--workdir={}/run"),
        ["base", "streams"],
        ["base/*", *read_of("streams")],
        ["run/*"],
        each=1,
    ),
    "train_again": Command(
        train.main,
        (*TRAIN, "--config.data={}/streams", "--workdir={}/run"),
        ["base", "streams", "run"],
        ["run/config.json", "run/metrics.jsonl", "run/checkpoints/2/*", "run/checkpoints/1/_CHECKPOINT_METADATA"],
        ["run/*"],
        each=0,
    ),
    "evaluate": Command(
        evaluate.main,
        ("--model={}/run", "--data={}/streams", "--out={}/answers", "--max_new_tokens=2"),
        ["base", "streams", "run"],
        ["base/*", *read_of("streams"), "run/config.json", "run/checkpoints/2/*"],
        ["answers/*"],
        each=1,
    ),
    "evaluate_again": Command(
        evaluate.main,
        ("--model={}/run", "--data={}/streams", "--out={}/answers", "--max_new_tokens=2"),
        ["base", "streams", "run", "answers"],
        ["answers/*"],
        ["answers/*"],
    ),
    "evaluate_begun": Command(
        evaluate.main,
        ("--model={}/run", "--data={}/streams", "--out={}/begun", "--max_new_tokens=2"),
        ["base", "streams", "run", "begun"],
        ["begun/*"],
        ["begun/*"],
        each=2,
    ),
    "answer": Command(
        answer.main,
        (
            "--model={}/export",
            "--base={}/base",
            "--video={}/shapes/train/videos/train-00000.mp4",
            "--question=What?",
            *ASK,
        ),
        ["base", "export", "asked"],
        ["export/*", "asked/clip.mp4"],
        [],
        ["asked/*"],
        each=3,
        prints=True,
    ),
    "answer_picture": Command(
        answer.main,
        ("--model={}/base", *CONFIG[:1], CONFIG[2], "--picture={}/asked/photo.png", "--question=What?", *ASK),
        ["base", "asked"],
        ["base/*", "asked/photo.png"],
        [],
        ["asked/*"],
        each=2,
        prints=True,
    ),
    "answer_config": Command(
        answer.main,
        ("--model={}/base", "--config={}/configs/mine.py", "--picture={}/asked/photo.png", "--question=What?", *ASK),
        ["base", "asked", "configs"],
        ["configs/mine.py"],
        [],
        ["configs/*"],
        each=2,
    ),
    "answer_file": Command(
        answer.main,
        ("--model={}/run", "--input={}/asked/questions.jsonl", "--output={}/asked/out.jsonl", *ASK),
        ["base", "run", "asked"],
        ["asked/questions.jsonl", "asked/photo.png", "asked/clip.mp4"],
        ["asked/out.jsonl*"],
        ["asked/*"],
        each=2,
    ),
    "answer_again": Command(
        answer.main,
        ("--model={}/run", "--input={}/answered/questions.jsonl", "--output={}/answered/out.jsonl", *ASK),
        ["base", "run", "answered"],
        ["answered/out.jsonl*"],
        ["answered/out.jsonl*"],
        each=2,
    ),
    "to_torch": Command(
        to_torch.main,
        ("--model={}/run", "--out={}/export"),
        ["base", "run"],
        ["base/*", "run/config.json", "run/checkpoints/2/*"],
        ["export/*"],
        each=1,
    ),
    "to_torch_full": Command(
        to_torch.main,
        ("--model={}/base", "--out={}/export", "--full"),
        ["base"],
        ["base/*"],
        ["export/*"],
        each=6,
    ),
    "to_torch_again": Command(
        to_torch.main,
        ("--model={}/run", "--out={}/export"),
        ["base", "run", "export"],
        ["export/*"],
        ["export/*"],
    ),
    "judge_rule": Command(
        judge.main,
        ("--answers={}/choices", "--out={}/judged"),
        ["choices"],
        ["choices/answers.jsonl"],
        ["judged/*"],
        ["choices/*"],
        each=12,
    ),
    "judge": Command(
        judge.main,
        ("--answers={}/replies", "--out={}/judged", *ENDPOINT),
        ["replies"],
        ["replies/answers.jsonl"],
        ["judged/*"],
        ["replies/*"],
    ),
    "judge_dry": Command(
        judge.main,
        ("--answers={}/replies", "--out={}/judged", "--dry_run", *ENDPOINT),
        ["replies", "judged"],
        ["replies/answers.jsonl", "judged/*"],
        ["judged/cache.sqlite*"],
        ["replies/*"],
    ),
    "judge_again": Command(
        judge.main,
        ("--answers={}/replies", "--out={}/judged", *ENDPOINT),
        ["replies", "judged"],
        ["judged/*"],
        ["judged/*"],
    ),
    "judge_compare": Command(
        judge.main,
        ("--compare", "{}/judged", "{}/judged_too"),
        ["judged", "judged_too"],
        ["judged/*.json*"],
        [],
        each=8,
        prints=True,
    ),
    "translate": Command(
        translate.main,
        ("--input={}/questions/own.jsonl", "--out={}/zh/out.jsonl", *ENDPOINT),
        ["questions"],
        ["questions/own.jsonl"],
        ["zh/*"],
        ["questions/*"],
    ),
    "translate_again": Command(
        translate.main,
        ("--input={}/questions/own.jsonl", "--out={}/zh/out.jsonl", *ENDPOINT),
        ["questions", "zh"],
        ["zh/*"],
        ["zh/*"],
        ["zh/out.jsonl.review.jsonl", "zh/out.review.jsonl"],
    ),
}


class Tree(NamedTuple):
    """Where the undamaged parts lie, and where commands run on copies of them."""

    pristine: Path
    root: Path
    commands: dict[str, Command]


MADE_BY = {  # the part of the tree that a command of these makes
    "base": "from_torch",
    "frames": "prepare",
    "streams": "encode",
    "run": "train",
    "export": "to_torch",
    "answers": "evaluate",
    "judged": "judge",
    "zh": "translate",
}


@contextlib.contextmanager
def open_tree(folder: Path) -> Iterator[Tree]:
    """An empty tree in a folder; its commands read videos in this process and compute on one device."""
    with pytest.MonkeyPatch.context() as patch, FakeOpenAI(reply) as server:
        patch.setenv("OPENAI_API_KEY", "sk-test")
        patch.setenv("NO_PROXY", "127.0.0.1")
        for module in (prepare, answer):
            patch.setattr(module, "ordered_map", lambda function, items, *_, **__: map(function, items))
        for module in (train, encode, assistant):
            patch.setattr(module, "make_mesh", lambda *_: make_mesh(ONE, jax.devices()[:1]))
        least = jax.config.jax_persistent_cache_min_compile_time_secs
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        commands = {
            name: command._replace(arguments=[one.replace("ENDPOINT", server.url) for one in command.arguments])
            for name, command in COMMANDS.items()
        }
        yield Tree(folder / "pristine", folder / "tree", commands)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", least)


def reply(messages: list[dict[str, str]]) -> str:
    """A judge's verdict, or a passable translation."""
    if "ranslat" in messages[0]["content"]:
        text = messages[-1]["content"]
        return "译" * (len(text) // 3) + "，".join(re.findall(r"\d+", text)) + "。"
    return "{'pred': 'yes', 'score': 4}"


def need(tree: Tree, part: str) -> None:
    """Makes a part of the tree, and those that it is made from, unless they are there."""
    place = tree.pristine / part
    if place.exists():
        return
    if part in MADE_BY:
        command = tree.commands[MADE_BY[part]]
        for other in command.needs:
            need(tree, other)
        reset(tree.pristine, command.needs, tree.root)
        end, said = call(command, tree.root)
        assert end == 0, (part, end, said)
        shutil.copytree(tree.root / part, place)
    else:
        WRITTEN[part](tree, place)
    if part not in ("export", "base"):  # these are whole folders, replaced as such
        below = [path for path in place.rglob("*") if path.is_dir() and not {"trainable", "optimizer"} & {*path.parts}]
        for folder in [place, *below]:  # but Orbax's own
            (folder / STRAY).write_text("mine\n")


def make_shapes(tree: Tree, place: Path) -> None:
    arguments = tree.commands["moving_shapes_again"].arguments
    reset(tree.pristine, [], tree.root)
    moving_shapes.main([argument.replace("{}", str(tree.root)) for argument in arguments])
    shutil.copytree(tree.root / "shapes", place)


def make_questions(tree: Tree, place: Path) -> None:
    """The same few questions in all forms."""
    need(tree, "shapes")
    place.mkdir(parents=True)
    rows = read_lines(tree.pristine / "shapes" / "train" / "instructions.jsonl")
    write_lines(place / "own.jsonl", rows)
    few = [{name: row[name] for name in ("id", "video", "language", "question", "answer")} for row in rows[:6]]
    lines = [",".join(few[0]), *(",".join(f'"{text}"' for text in row.values()) for row in few)]
    (place / "table.csv").write_text("\n".join(lines) + "\n")
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(few), place / "table.parquet")
    instruct = [{"q": row["question"], "a": row["answer"], "video_id": row["video"]} for row in few]
    (place / "instruct.json").write_text(json.dumps(instruct))
    for name, roles in (("llava", ("human", "gpt")), ("qwen", ("user", "assistant"))):
        talks = [
            {
                "id": row["id"],
                "video": row["video"],
                "conversations": [
                    {"from": roles[0], "value": f"<video>\n{row['question']}"},
                    {"from": roles[1], "value": row["answer"]},
                ],
            }
            for row in few
        ]
        (place / f"{name}.json").write_text(json.dumps(talks))
    videos = (tree.pristine / "shapes/train/videos").glob("*.mp4")
    names = [f"{tree.root / path.relative_to(tree.pristine)}\n" for path in sorted(videos)]
    (place / "list.txt").write_text("".join(names))


def make_source(family: str) -> Callable[[Tree, Path], None]:
    return lambda tree, place: shutil.copytree(DEMO_BASES / family, place) and None


def make_shards(tree: Tree, place: Path) -> None:
    """The same weights in two files with an index."""
    shutil.copytree(DEMO_BASES / "llava", place)
    tensors = load_file(place / "model.safetensors")
    (place / "model.safetensors").unlink()
    halves = [dict(list(tensors.items())[i::2]) for i in range(2)]
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for half, name in zip(halves, names, strict=True):
        save_file(half, place / name, metadata={"format": "pt"})
    weight_map = {tensor: name for half, name in zip(halves, names, strict=True) for tensor in half}
    index = {"metadata": {"total_size": sum(array.nbytes for array in tensors.values())}, "weight_map": weight_map}
    (place / "model.safetensors.index.json").write_text(json.dumps(index))


def make_bin(tree: Tree, place: Path) -> None:
    """The same weights as PyTorch's own files with an index."""
    import torch

    shutil.copytree(DEMO_BASES / "llava", place)
    tensors = {name: torch.from_numpy(array.copy()) for name, array in load_file(place / "model.safetensors").items()}
    (place / "model.safetensors").unlink()
    names = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    halves = [dict(list(tensors.items())[i::2]) for i in range(2)]
    for half, name in zip(halves, names, strict=True):
        torch.save(half, place / name)
    weight_map = {tensor: name for half, name in zip(halves, names, strict=True) for tensor in half}
    (place / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def make_asked(tree: Tree, place: Path) -> None:
    """Questions about a clip and a picture beside them."""
    need(tree, "shapes")
    place.mkdir(parents=True)
    shutil.copy(tree.pristine / "shapes/train/videos/train-00001.mp4", place / "clip.mp4")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)).save(place / "photo.png")
    rows = [
        {"video": "clip.mp4", "question": "What?"},
        {"video": "clip.mp4", "start": 0.1, "end": 0.5, "question": "Q?"},
    ]
    write_lines(place / "questions.jsonl", [*rows, {"picture": "photo.png", "question": "What?", "id": 3}])


def make_begun(tree: Tree, place: Path) -> None:
    """An evaluation that was killed."""
    need(tree, "answers")
    place.mkdir(parents=True)
    rows = read_lines(tree.pristine / "answers/answers.jsonl")
    made_with = json.loads((tree.pristine / "answers/summary.json").read_text())["made_with"]
    known = [{"number": number, "answer": row} for number, row in enumerate(rows[:-4])]
    write_lines(place / "answers.jsonl.part0", [{"made_with": made_with}, *known])


def make_answered(tree: Tree, place: Path) -> None:
    """Finished answers, beside their questions."""
    command = tree.commands["answer_file"]
    for other in command.needs:
        need(tree, other)
    reset(tree.pristine, command.needs, tree.root)
    end, said = call(command, tree.root)
    assert end == 0, (end, said)
    shutil.copytree(tree.root / "asked", place)


def answer_rows(benchmark: str, **more: object) -> list[dict]:
    model = {"name": "run", "fingerprint": "ab" * 32}
    row = {"language": "en", "answer": "B", "benchmark": benchmark, "model": model, "kind": "x", **more}
    said = ("B. dog", "It is a cat", "(b)", None)
    return [
        {"id": f"{i}", "video": f"v{i // 2}", "question": f"Question {i}?", "prediction": text, **row}
        for i, text in enumerate(said)
    ]


def make_answers(benchmark: str, **more: object) -> Callable[[Tree, Path], None]:
    def make(tree: Tree, place: Path) -> None:
        place.mkdir(parents=True)
        write_lines(place / "answers.jsonl", answer_rows(benchmark, **more))

    return make


def make_judged_too(tree: Tree, place: Path) -> None:
    need(tree, "judged")
    shutil.copytree(tree.pristine / "judged", place)


def make_configs(tree: Tree, place: Path) -> None:
    place.mkdir(parents=True)
    text = (ROOT / "configs/demo.py").read_text() + "\n\nFRAMES = 2\n"
    (place / "mine.py").write_text(text.replace("num_frames = 16", "num_frames = 2"))


WRITTEN: dict[str, Callable[[Tree, Path], None]] = {
    "source": make_source("llava"),
    "qwen": make_source("qwen_vl"),
    "shards": make_shards,
    "bin": make_bin,
    "shapes": make_shapes,
    "questions": make_questions,
    "asked": make_asked,
    "begun": make_begun,
    "answered": make_answered,
    "choices": make_answers("mvbench", choices=["A. cat", "B. dog"]),
    "replies": make_answers("activitynet_qa"),
    "judged_too": make_judged_too,
    "configs": make_configs,
}


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
