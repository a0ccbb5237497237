"""benchmarks/real_weights.sh: what it downloads, what it compares, and what it says of mistakes."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_compare import verdicts
from tests.test_llava import tiny_transformers

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "real_weights.sh"


def script(*arguments: object, python: object = sys.executable) -> subprocess.CompletedProcess:
    command = ["bash", SCRIPT, *arguments, f"--python={python}", "--limit=1e-4"]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True)


@pytest.mark.slow
def test_a_folder_that_is_here_already(tmp_path):
    tiny_transformers().save_pretrained(tmp_path / "published")
    done = script("llava-1.5", tmp_path / "work", f"--source={tmp_path / 'published'}", "--frames=4")
    assert done.returncode == 0, done.stderr
    assert set(verdicts(done.stdout).values()) == {"yes"}
    assert (tmp_path / "work" / "table-4.txt").read_text() == done.stdout


def test_downloads_are_pinned(tmp_path):
    """`hf` is asked for the pinned commit, the one that came is recorded, and asked for the next time."""
    program = tmp_path / "bin"
    program.mkdir()
    for name, line in {
        "python": f'exec "{sys.executable}" "$@"',
        "hf": f'echo "$*" >>{tmp_path}/asked; mkdir -p "$6/.cache/huggingface/download"; '
        'echo abc123 >"$6/.cache/huggingface/download/config.json.metadata"',
    }.items():
        (program / name).write_text(f"#!/bin/bash\n{line}\n")
        (program / name).chmod(0o755)
    for _ in range(2):
        done = script("qwen-vl", tmp_path / "work", "--qwen-python=python3", python=program / "python")
        assert done.returncode == 2 and "config.json: not found" in done.stderr  # nothing came
    asked = (tmp_path / "asked").read_text().splitlines()
    wanted = (
        f"--local-dir {tmp_path}/work/published --include *.json --include *.py --include *.tiktoken --include *.bin"
    )
    revisions = ("f57cfbd358cb56b710d963669ad1bcfb44cdcdd8", "abc123")
    assert asked == [f"download Qwen/Qwen-VL-Chat --revision {revision} {wanted}" for revision in revisions]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "which model?"),
        (["llava"], "unknown model llava"),
        (["qwen-vl", "--frame=4"], "unknown option --frame=4"),
        (["qwen-vl", "--source=/nowhere"], "/nowhere: not a folder"),
    ],
)
def test_mistakes_end_in_one_line(arguments, message):
    done = script(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1
