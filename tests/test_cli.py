"""The command xsmae: help, exit statuses, finding and refusing configs."""

import os
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

from xsmae import cli
from xsmae.cli import command, convert, pretrain
from xsmae.cli.arguments import parse, split_fields
from xsmae.config import load_config
from xsmae.errors import UserError
from xsmae.evaluation.fitting import recipe
from xsmae.weights.official import OPTIONS

ROOT = Path(__file__).parent.parent


def refused(capsys, *arguments):
    """The single line that a wrong call prints."""
    assert cli.main(["xsmae", *arguments]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert captured.out == ""
    return line.removeprefix("xsmae: ")


# Help


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_begins_with_an_example_whose_flags_exist(name, capsys):
    assert cli.main(["xsmae", name, "--help"]) == 0
    example, blank, *rest = capsys.readouterr().out.splitlines()
    assert example.split()[:2] == ["xsmae", name]
    assert blank == ""
    about = "\n".join(rest).partition("\n\n")[0]
    assert 1 <= len(re.findall(r"[.](?=\s|$)", about)) <= 2  # sentences
    listed = re.findall(r"^  --(?:\[no\])?([\w.]+)", "\n".join(rest), re.MULTILINE)
    for flag in re.findall(r" --(\w+)", example):
        assert flag in listed
    assert all(len(line) <= command.WIDTH for line in rest)


def test_the_list_of_commands_fits_a_screen(capsys):
    for arguments in ([], ["--help"], ["help"], ["-h"]):
        assert cli.main(["xsmae", *arguments]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith("xsmae ")
        assert len(lines) <= 24
        listed = [line.split()[0] for line in lines if line.startswith("  ")]
        assert listed == list(cli.COMMANDS)


def test_an_unknown_command_is_told_the_nearest(capsys):
    assert refused(capsys, "plam") == "there is no command plam: did you mean plan?"
    assert "did you mean check-data?" in refused(capsys, "check_data", "--help")
    assert "pretrain, knn, probe" in refused(capsys, "zzz")


@pytest.mark.parametrize(
    ("name", "fields"),
    [("probe", recipe.published_probe()), ("finetune", recipe.finetuning())],
)
def test_help_lists_the_recipe(name, fields, capsys):
    assert cli.main(["xsmae", name, "--help"]) == 0
    printed = capsys.readouterr().out
    for field, value in fields.items():
        _, _, about = printed.partition(f"--recipe.{field}=")
        told, expected = about.splitlines()[:2]
        assert told.endswith(f"(default: {value})")
        assert recipe.expected(field) in expected


def test_each_option_of_an_import_has_its_own_sentence():
    assert tuple(convert.MEANINGS) == OPTIONS
    assert len(set(convert.MEANINGS.values())) == len(OPTIONS)
    for name in ("mask_ratio", "norm_pix_loss", "use_l1_loss", "base_resolution"):
        assert f"the official --{name}" in convert.MEANINGS[name]


def test_the_older_names_are_the_same_commands():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"].keys() == {
        "xsmae", "xsmae-check-data", "xsmae-checkpoints", "xsmae-finetune",
        "xsmae-linear-probe", "xsmae-plan",
    }  # fmt: skip
    for place in project["scripts"].values():
        module, _, function = place.partition(":")
        assert callable(getattr(__import__(module, fromlist=[function]), function))
    for alias, name in (("main", "pretrain"), ("linear_probe", "probe")):
        done = subprocess.run(
            [sys.executable, "-m", f"xsmae.{alias}", "--help"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stdout.startswith(f"xsmae {name} --")


# How a command ends


def ended(call, **how):
    return command.run(call, ["xsmae"], doc="", sections={}, **how)


def test_exit_statuses(capsys):
    def fail(error):
        def call(argv):
            raise error

        return call

    assert ended(lambda argv: 0) == 0
    assert ended(lambda argv: 3) == 3
    assert ended(fail(UserError("found 1, expected 2"))) == 2
    assert capsys.readouterr().err == "xsmae: found 1, expected 2\n"
    assert ended(fail(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "xsmae: interrupted\n"
    assert ended(fail(MemoryError()), less_memory="lower --size") == 2
    assert "too little memory (MemoryError): lower --size" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="a bug"):
        ended(fail(RuntimeError("a bug")))
    with pytest.raises(BrokenPipeError):  # e.g. of a worker process
        ended(fail(BrokenPipeError()))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_between_two_batches(number, capsys):
    asked = []

    def call(argv, should_stop):
        for _ in range(3):
            asked.append(should_stop())
            if asked[-1]:
                raise KeyboardInterrupt
            os.kill(os.getpid(), number)
        return 0

    assert ended(command.stoppable(call)) == 128 + number
    assert asked == [False, True]
    assert "the same command resumes" in capsys.readouterr().err


@pytest.mark.parametrize("pipe", ["|", "2>&1 |"])
def test_a_closed_pipe_ends_quietly(pipe, tmp_path):
    code = tmp_path / "endless.py"
    code.write_text(
        "import sys\n"
        "from xsmae.cli.command import run\n"
        "def call(argv):\n"
        "    while True:\n"
        "        print('a line')\n"
        "sys.exit(run(call, ['xsmae'], doc='', sections={}))\n"
    )
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {sys.executable} {code} {pipe} head -n 1"],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.stdout == "a line\n"
    assert done.stderr == ""
    assert done.returncode == 141


def test_help_into_a_closed_pipe(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "xsmae", "--help"],
        cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=200,
    )  # fmt: skip
    os.close(writer)
    assert done.stderr == ""
    assert done.returncode == 141


# Configs


def test_a_config_by_its_bare_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").mkdir()  # a folder of that name is not a config
    bare, whole = (
        load_config(name) for name in ("quickstart", "configs/quickstart.py")
    )
    assert bare == whole
    assert bare.is_locked
    values = parse(["xsmae", "--config", "quickstart:mae"], pretrain.define_flags)
    assert values.config.method == "mae"
    # A user's config takes precedence over the installed one.
    (tmp_path / "configs").mkdir()
    own = tmp_path / "configs" / "quickstart.py"
    own.write_text(
        "from xsmae.configs import common\n"
        "def get_config(argument=None):\n"
        "    return common.get_common('published', 'tiny', argument or 'mae')\n"
    )
    assert load_config("quickstart").model.embed_dim == 192
    assert load_config("quickstart").batch_size != bare.batch_size
    assert load_config(f"{own}:sat_mae").method == "sat_mae"


def test_data_by_its_bare_name(tmp_path, image_folder, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = ["--data=folder", f"--data.root={image_folder}", "--data.gsd", "0.5"]
    assert cli.main(["xsmae", "check-data", *data]) == 0
    assert "24" in capsys.readouterr().out
    line = refused(capsys, "check-data", "--data=foldr")
    assert line.startswith("--data=foldr: there is no config configs/foldr.py")
    assert "did you mean folder.py?" in line
    assert refused(capsys, "check-data").startswith("--data is missing: xsmae check-")


@pytest.mark.parametrize(
    ("argument", "method", "preset_temperature"),
    [
        ("mae", "mae", None),
        ("mae,published", "mae", None),
        ("method=sat_mae", "sat_mae", None),
        ("published", "cross_scale_mae", 0.5),
        ("cross_scale_mae,published", "cross_scale_mae", 0.5),
        ("", "cross_scale_mae", 0.1),
    ],
)
def test_the_argument_of_a_config(argument, method, preset_temperature):
    config = load_config(f"fmow:{argument}")
    assert config.method == method
    found = config.loss.get("contrastive", {}).get("temperature")
    assert found == preset_temperature


@pytest.mark.parametrize(
    ("argument", "method"),
    [
        ("", "scale_distill"),
        ("recommended", "scale_distill"),
        ("published", "cross_scale_mae"),
        ("corrected,size=small", "cross_scale_mae"),
        ("mae", "mae"),
    ],
)
def test_a_preset_alone_finds_its_method(argument, method):
    assert load_config(f"quickstart:{argument}").method == method


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("size=tinyy", "config argument size='tinyy', expected one of tiny, small"),
        ("method=may", "config argument method='may', expected one of cross_scale_mae"),
        ("depth=3", "config argument 'depth=3': 'depth' is unknown"),
        ("mae,corrected", "config argument 'corrected', method=mae expects"),
    ],
)
def test_a_wrong_argument_of_a_config_is_its_own_line(argument, said, capsys):
    told = f"--config=configs/quickstart.py:{argument}"
    assert refused(capsys, "pretrain", told).startswith(f"{told}: {said}")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def get_config()\n    pass\n", "line 1: SyntaxError: expected ':'"),
        (
            "\ndef get_config():\n    return nothing\n",
            "line 3: NameError: name 'nothing",
        ),
        ("import no_such_module_here\n", "line 1: ModuleNotFoundError: No module"),
        (
            "def f(x):\n    return int(x)\ndef get_config():\n    return f('a')\n",
            "line 2: ValueError: invalid literal for int()",
        ),
        ("x = 1\n", "AttributeError: "),
        (
            "def get_config():\n    return {}\n",
            "returned a dict, expected a ConfigDict",
        ),
    ],
)
def test_an_error_in_a_config_file_is_told_with_its_line(text, said, tmp_path, capsys):
    path = tmp_path / "mine.py"
    path.write_text(text)
    line = refused(capsys, "pretrain", f"--config={path}")
    assert line.startswith(f"--config={path}: ")
    assert said in line
    if "line" in said:
        assert f"{path}, {said}" in line


def test_an_argument_of_a_config_after_a_comma(capsys):
    line = refused(capsys, "pretrain", "--config=folder,size=tiny")
    assert "folder:size=tiny" in line


def test_the_method_is_no_field_to_set(capsys):
    line = refused(capsys, "pretrain", "--config=quickstart", "--config.method=mae")
    assert "--config=NAME:method=mae" in line
    with pytest.raises(UserError, match="NAME:method=mae"):
        load_config("quickstart", {"method": "mae"})


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--config.model.depht=3", r"depht=3: .*did you mean depth\?.*depth, dtype"),
        ("--config.mesh.fsdp=8", "mesh.fsdp=8: .*mesh is a value"),
        ("--config.batch_size=many", "batch_size=many: expected a whole number"),
        ("--config.num_epochs=many", "num_epochs=many: expected a number"),
        ("--config.batch_size", "batch_size"),
        ("--config.model=3", "Failed to parse '3'"),
        ("--noconfig.nothing", "--noconfig.nothing: there is no such field"),
    ],
)
def test_wrong_fields_are_one_line(flag, said, capsys):
    line = refused(capsys, "pretrain", "--config=quickstart", flag)
    assert re.search(said, line), line


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("pretrain", "--config=folder", "--data.root=x"), "--config.data.root"),
        (("check-data", "--data=folder", "--config.data.root=x"), "--data.root"),
    ],
)
def test_a_field_of_the_data_with_the_other_prefix(arguments, hint, capsys):
    assert f"did you mean {hint}?" in refused(capsys, *arguments)


def test_fields_in_every_form():
    arguments = [
        "--config.batch_size", "32", "--config.knn.every", "-1", "--config.wandb",
        "--noconfig.tensorboard", "-config.seed=3", "--config.mean=0.1",
        "--config.mean=0.2", "--config.std", "(0.1, 0.2)",
    ]  # fmt: skip
    fields, rest = split_fields(["xsmae", *arguments, "--dry_run"], ["config"])
    assert rest == ["xsmae", "--dry_run"]
    assert len(fields["config"]) == 8
    config = parse(
        ["xsmae", *arguments, "--config=quickstart"], pretrain.define_flags
    ).config
    assert (config.batch_size, config.knn.every, config.seed) == (32, -1, 3)
    assert (config.wandb, config.tensorboard) == (True, False)
    assert (config.mean, config.std) == ((0.1, 0.2), (0.1, 0.2))


# load_config


def test_load_config_sets_fields(tmp_path):
    config = load_config(
        "folder:mae,size=tiny",
        {
            "data.root": tmp_path,
            "data.gsd": np.float32(0.5),
            "num_steps": "7",
            "model": {"depth": 2, "scan": False},
            "mean": [0.1, np.float64(0.2), 0.3],
            "bands": "('red', 'green', 'blue')",
            "wandb": "true",
        },
    )
    assert config.method == "mae"
    assert config.data.root == str(tmp_path)
    assert config.data.gsd == config.model.reference_gsd == 0.5
    assert config.num_steps == 7
    assert (config.model.depth, config.model.scan) == (2, False)
    assert config.mean == (0.1, 0.2, 0.3)
    assert config.bands == ("red", "green", "blue")
    assert config.wandb is True
    assert config.is_locked
    again = load_config("quickstart", {"num_steps": None, "num_epochs": 2})
    assert (again.num_steps, again.num_epochs) == (None, 2.0)


@pytest.mark.parametrize(
    ("name", "overrides", "said"),
    [
        ("quickstart", {"model.depht": 3}, "model.depht=3: .*did you mean depth"),
        ("quickstart", {"batch_size": "many"}, "batch_size=many: "),
        ("quickstart", {"batch_size": 2.5}, "batch_size=2.5: "),
        ("quickstart", {"batch_size": None}, "batch_size=None: .*may not be empty"),
        ("quickstart", {"mesh": 8}, "mesh=8, expected a string"),
        ("quickstart", {"wandb": "perhaps"}, "wandb=perhaps: "),
        ("quikstart", {}, r"'quikstart'.*did you mean quickstart\.py"),
        ("quickstart:size=tinyy", {}, "size='tinyy', expected one of"),
        ("/nowhere/quickstart.py", {}, "there is no config /nowhere/quickstart.py"),
    ],
)
def test_load_config_refuses_in_one_line(name, overrides, said):
    with pytest.raises(UserError, match=said) as caught:
        load_config(name, overrides)
    assert "\n" not in str(caught.value)
    assert "--config." not in str(caught.value)
