"""Command lines: config files from any folder, overrides, and what is said of a wrong one."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from conversion import compare, from_torch, to_torch
from data_pipeline import prepare, show, translate
from data_pipeline.common.cli import Parser, above_zero, number, path, whole
from data_pipeline.common.errors import UserError, run
from data_pipeline.text.chat_client import is_dated
from redvillm_jax import answer, encode, evaluate, judge, plan, selfcheck, train
from redvillm_jax.demo import __main__ as demo
from redvillm_jax.demo import moving_shapes, pretrain
from redvillm_jax.runtime import cli

ROOT = Path(__file__).parents[1]


def parser() -> Parser:
    parser = Parser("python -m command", "What it does.")
    parser.add_argument("--topology", help="…")
    parser.add_argument("--all", action="store_true", help="…")
    parser.add_argument("--question", action="append", help="…")
    parser.add_argument("--rows_per_chip", type=whole(), default=1, help="… (%(default)s)")
    return parser


def config(*argv: str) -> dict:
    return cli.parse(parser(), argv).config


@pytest.mark.parametrize("name", ["llava", "configs/llava.py", "qwen", "qwen:zh", "configs/qwen.py:zh", "demo:qwen_vl"])
@pytest.mark.parametrize("form", [["--config={}"], ["--config", "{}"], ["-config={}"]])
def test_a_bundled_config_is_found_from_any_folder(name, form, tmp_path, monkeypatch):
    here = config(
        f"--config={ROOT / 'configs'}/{name.removeprefix('configs/').replace('.py', '').replace(':', '.py:')}"
        + ("" if ":" in name else ".py")
    )
    monkeypatch.chdir(tmp_path)
    assert config(*(part.format(name) for part in form)) == here


def test_one_s_own_file_comes_before_a_bundled_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    assert config("--config=configs/llava.py")["family"] == "llava"
    own = "from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict({'mine': 1})\n"
    (tmp_path / "configs" / "llava.py").write_text(own)
    assert config("--config=configs/llava.py") == {"mine": 1}
    assert config("--config=llava")["family"] == "llava"


def test_another_folder_of_that_name_is_not_in_the_way(tmp_path):
    """In a process of its own: this one has imported `configs`."""
    for file in ("__init__.py", "common.py"):
        (tmp_path / "configs").mkdir(exist_ok=True)
        (tmp_path / "configs" / file).write_text("")
    code = f"import sys; sys.path.append({str(ROOT)!r}); from redvillm_jax.runtime import cli;"
    code += "print(cli.read_config('demo:qwen_vl')['family'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env={})
    assert done.stdout == "qwen_vl\n", done.stderr


def test_overrides_may_stand_before_the_file():
    found = config("--config.seed=3", "--config.mesh.fsdp=2", "--noconfig.pack", "--config=llava", "--config.int8")
    assert found["seed"] == 3 and found["mesh"]["fsdp"] == 2 and found["pack"] is False and found["int8"] is True


@pytest.mark.parametrize("video", [["--config.video=other"], ["--config.video", "other"], ["-config.video=other"]])
def test_fields_that_family_and_video_bring_may_be_set(video):
    def complete(config):
        assert (config.family, config.seed) == ("mine", 0), "other overrides come later"
        config[f"{config.video}_grid"] = 2
        return config

    argv = ["--config=llava", "--config.seed=3", "--config.other_grid=4", "--config.family=mine", *video]
    found = cli.parse(parser(), argv, complete).config
    assert (found["family"], found["video"], found["other_grid"], found["seed"]) == ("mine", "other", 4, 3)
    with pytest.raises(UserError, match=r"no field 'other_gird'; did you mean other_grid\?"):
        cli.parse(parser(), ["--config=llava", "--config.other_gird=4", "--config.family=mine", *video], complete)


def test_values_are_of_the_type_of_their_field(tmp_path):
    file = tmp_path / "mine.py"
    fields = "{'pair': (1, 2), 'rate': 1.0, 'name': 'x', 'on': True, 'inner': {'count': 3}}"
    file.write_text(f"from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict({fields})\n")
    overrides = ["--config.pair=(3, 4)", "--config.rate", "1e-3", "--config.name=7", "--config.inner.count=5"]
    found = config(f"--config={file}", *overrides, "--config.on=False", "--config.name=a=b", "--config.rate=2")
    assert found == {"pair": [3, 4], "rate": 2.0, "name": "a=b", "on": False, "inner": {"count": 5}}
    assert type(found["rate"]) is float
    assert config(f"--config={file}", "--config.inner={'count': 6}", "--noconfig.on")["inner"] == {"count": 6}
    for wrong, message in (
        ("--config.pair=3", "--config.pair=3: .*tuple"),
        ("--config.pair=(", r"--config.pair=\(: "),
        ("--config.rate=fast", "--config.rate=fast: could not convert"),
        ("--config.rate", "--config.rate: has no value: write --config.rate=VALUE"),
        ("--config.on=maybe", "--config.on=maybe: expected true or false, got 'maybe'"),
        ("--noconfig.rate", "--noconfig.rate: rate is no switch: write --config.rate=VALUE"),
        ("--config.inner.count=5.5", "--config.inner.count=5.5: invalid literal for int"),
        ("--config.inner={'count': 'x'}", "--config.inner={'count': 'x'}: "),
    ):
        with pytest.raises(UserError, match=message) as error:
            config(f"--config={file}", wrong)
        assert "\n" not in str(error.value)


def test_flags_are_of_their_type():
    flags = cli.parse(parser(), ["--rows-per-chip=3", "--question=a", "--topology", "v5e-4", "--question=b", "--all"])
    assert (flags.rows_per_chip, flags.question, flags.topology, flags.all) == (3, ["a", "b"], "v5e-4", True)
    assert flags.config is None and not flags.check_files
    for text in ("0", "-1", "1.5", "²", "1" * 10, ""):
        with pytest.raises(UserError, match="--rows_per_chip: expected a positive integer of at most 9 digits"):
            cli.parse(parser(), [f"--rows_per_chip={text}"])
    assert number(float)("1e-3") == 1e-3 and path("") is None and path("gs://b/x").parts[-1] == "x"
    for kind, text in ((number(int), "1.0"), (number(float), "x"), (above_zero, "nan"), (above_zero, "0")):
        with pytest.raises(argparse.ArgumentTypeError, match="expected a"):
            kind(text)


COMMANDS = [train, encode, plan, answer, evaluate, judge, selfcheck, demo, pretrain, moving_shapes]


@pytest.mark.parametrize(
    "command",
    [*COMMANDS, prepare, show, translate, from_torch, to_torch, compare],
    ids=lambda command: command.__name__,
)
def test_every_help_can_be_read(command, capsys):
    with pytest.raises(SystemExit) as end:
        command.main(["--help"])
    said, name = capsys.readouterr().out, command.__name__.removesuffix(".__main__")
    assert end.value.code == 0 and said.startswith("usage: ") and said.count(f"python -m {name} ") > 1
    assert max(map(len, said.splitlines())) <= 120 and "None" not in said and "%(" not in said
    assert said.endswith("  show the traceback of an error\n")


def test_help_shows_the_fields_of_the_config(capsys):
    with pytest.raises(SystemExit):
        cli.parse(parser(), ["--config=qwen:zh", "--config.mesh.fsdp=4", "--help"])
    said = capsys.readouterr().out
    assert "  --config.mesh.fsdp=4\n" in said and "  --config.language=zh\n" in said
    assert "  --rows_per_chip ROWS_PER_CHIP\n" in said and "… (1)\n" in said


LLAVA = "--config=configs/llava.py"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([LLAVA, "--config.lr=1e-3"], r"--config.lr=1e-3: .* has no field 'lr'; did you mean learning_rate\?"),
        ([LLAVA, "--config.epochs=1"], r"no field 'epochs'; did you mean num_epochs\?"),
        ([LLAVA, "--config.fsdp=1"], r"no field 'fsdp'; did you mean mesh.fsdp\?"),
        ([LLAVA, "--config.mesh.fspd=1"], r"no field 'mesh.fspd'; did you mean mesh.fsdp\?"),
        ([LLAVA, "--config.zzzzz"], "has no field 'zzzzz'$"),
        ([LLAVA, "config.lr=1"], r"config.lr=1: .* no field 'lr'; did you mean learning_rate\?"),
        ([LLAVA, "config.seed=1"], "unexpected argument 'config.seed=1': write --config.seed=1"),
        ([LLAVA, "--config.num_epochs=a"], "--config.num_epochs=a: invalid literal for int"),
        ([LLAVA, "--config.mesh=1"], "Failed to parse '1' as a ConfigDict"),
        ([LLAVA, "--topologi=v5e-4"], r"unknown flag --topologi; did you mean --topology\?"),
        (["--config.seed=1"], "--config.seed=1: sets a field of a config; give that, too"),
        (["--config"], "--config needs a file, or one of demo, gemma3, llava, "),
        (["--config="], "--config needs a file"),
        (["--config=llama"], r"--config=llama: no such file; .* demo, gemma3, llava, .*; did you mean llava\?"),
        (["--config=configs/common.py", "x"], r"--config=configs/common.py: AttributeError: .*get_config"),
        (["--config=qwen:fr"], "LookupError: unknown language 'fr', expected one of zh, en, both"),
        (["--config=demo:blip"], "LookupError: unknown family 'blip', expected one of .*llava, .*qwen_vl"),
        (["--config=llava:v1"], "TypeError: get_config"),
        (["--config=README.md"], "--config=README.md: SyntaxError"),
    ],
)
def test_mistakes_end_in_one_line(argv, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=message) as error:
        config(*argv)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("config.foo = 3", "config.foo is no field of a config of the family llava; take it out"),
        ("config.learning_rat = 3", r"config.learning_rat is no field .*; did you mean learning_rate\?"),
        ("config.mesh.fsd = 3", r"config.mesh.fsd is no field .*; did you mean fsdp\?"),
        ("config.seed = 'one'", "--config=.*: TypeError|config.seed is 'one', expected a whole number"),
        ("config = dict(config)", "get_config returns dict, expected a ConfigDict"),
        ("return None", "get_config returns NoneType"),
        ("raise SystemError", "SystemError"),
        ("config.seed = object()", "object"),
    ],
)
def test_a_file_of_one_s_own_is_read_with_care(line, message, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(f"from configs import llava\n\n\ndef get_config():\n    config = llava.get_config()\n    {line}\n")
    file.write_text(file.read_text() + "    return config\n")
    with pytest.raises(UserError, match=message):
        plan.main([f"--config={file}", "--topology=v5e-4"])


def test_an_unexpected_error_says_where_in_the_project_it_was(capsys):
    def main(argv: list[str]) -> None:
        is_dated(None)  # fails in `re`

    with pytest.raises(SystemExit) as end:
        run(main, [])
    assert end.value.code == 1 and " at chat_client.py:" in capsys.readouterr().err
