"""Every command says in one line what is wrong with what it was given, and what to do."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hub_scripts import build_image_index, convert_original_checkpoint, make_tiny_checkpoint, push_to_hub
from tests.helpers import processes
from tests.helpers.backbones import PARITY
from training import (
    benchmark,
    benchmark_answers,
    benchmark_cluster,
    benchmark_dirty_data,
    benchmark_index,
    benchmark_kills,
    benchmark_large_index,
    benchmark_options,
    benchmark_processes,
    benchmark_serving,
    benchmark_warm_start,
    cache_features,
    cli,
    evaluate,
    manual_pages,
    quickstart,
    train,
)

ROOT = Path(__file__).parents[2]
CASE, IMAGES = PARITY / "case_a_opt_tied", (PARITY / "common" / "images").resolve()
BACKBONES = [f"language_model={CASE / 'language_model'}", f"vision_model={CASE / 'vision_model'}"]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """What the arguments below name."""
    folder = tmp_path_factory.mktemp("places")
    make_tiny_checkpoint.make_tiny_checkpoint(folder / "tiny")
    (folder / "empty").mkdir()
    (folder / "config.yaml").write_text(
        "\n".join(line.replace("=", ": ") for line in [*BACKBONES, "use_cpu=true", f"output_dir={folder / 'out'}"])
        + "\ntrain_data: train.tsv\nreport_to: none\n"
    )
    (folder / "list.yaml").write_text("- a\n- b\n")
    (folder / "broken.yaml").write_text("a: [1\n")
    (folder / "data.tsv").write_text(f"caption\timage\na cat\t{IMAGES / 'img_000.png'}\n")
    (folder / "ten.tsv").write_text("caption\timage\n" + f"a cat\t{IMAGES / 'img_000.png'}\n" * 10)
    (folder / "bare.tsv").write_text("text only\nno columns\n")
    (folder / "ragged.csv").write_text('caption,image\na,b\n"c\n')
    (folder / "broken.json").write_text("{")
    (folder / "list.json").write_text("[1]")
    (folder / "damaged").mkdir()
    for path in (folder / "tiny" / "fromage").iterdir():
        data = path.read_bytes()
        (folder / "damaged" / path.name).write_bytes(data[:100] if path.suffix == ".safetensors" else data)
    return folder


TINY, OPT, VISION = "{}/tiny/fromage", str(CASE / "language_model"), str(CASE / "vision_model")
CASES = {
    train: [
        (["{}/none.yaml"], "none.yaml cannot be read"),
        (["{}/empty"], "empty cannot be read"),
        (["{}/list.yaml"], "lines of the form `key: value`"),
        (["{}/broken.yaml"], "broken.yaml is not valid YAML"),
        (["{}/config.yaml", "learning_rate=much"], "`learning_rate` must be a number, got 'much'"),
        (["{}/config.yaml", "save_strategy=sometimes"], "sometimes is not a valid SaveStrategy"),
        (["{}/config.yaml", "dtype=int8"], "There is no dtype 'int8'.*bfloat16"),
        (["{}/config.yaml", "learning_rat=1"], "no key 'learning_rat'. Did you mean learning_rate"),
        (["{}/config.yaml", "max_steps"], "key=value"),
        (["{}/config.yaml", "language_model={}/empty"], "empty"),
        (["{}/config.yaml", "language_model={}/none"], "none"),
        (["{}/config.yaml", "train_data={}/none.tsv"], "no file .*none.tsv"),
        (["{}/config.yaml", "train_data={}/empty"], "empty"),
        (["{}/config.yaml", "train_data={}/bare.tsv"], "needs a column 'image'"),
        (["{}/config.yaml", "train_data={}/ragged.csv"], "ragged.csv"),
        (["{}/config.yaml", "train_data={}/data.tsv", "max_length=2"], "leaves no room"),
        (["{}/config.yaml", "train_data={}/data.tsv", "resume_from_checkpoint={}/empty"], "empty"),
    ],
    cache_features: [
        (["{}/none.yaml", "{}/features"], "none.yaml cannot be read"),
        (["{}/config.yaml", "{}/features", "--eval"], "has no eval_data"),
        (["{}/config.yaml", "{}/features", "train_data={}/none.tsv"], "no file .*none.tsv"),
        (["{}/config.yaml", "{}/features", "train_data={}/data.tsv", "vision_model={}/empty"], "empty"),
        (["{}/config.yaml", "{}/data.tsv", "train_data={}/data.tsv"], "data.tsv"),
        (["{}/config.yaml", "{}/features", "--device", "nowhere"], "'nowhere' cannot be used"),
        (["{}/config.yaml", "{}/features", "--shard-size", "0"], "at least 1, got '0'"),
    ],
    evaluate: [
        (["captions", "{}/none", "--data", "{}/data.tsv"], "none"),
        (["captions", "{}/empty", "--data", "{}/data.tsv"], "empty"),
        (["captions", "{}/damaged", "--data", "{}/data.tsv"], "damaged or cut off"),
        (["captions", OPT, "--data", "{}/data.tsv"], "opt"),
        (["captions", TINY, "--data", "{}/none.tsv"], "none.tsv"),
        (["captions", TINY, "--data", "{}/none.json", "--images", "{}/empty"], "none.json"),
        (["captions", TINY, "--data", "{}/data.tsv", "--output", "{}/empty"], "is a folder"),
        (["captions", TINY, "--data", "{}/data.tsv", "--dtype", "int8"], "no dtype 'int8'"),
        (["captions", TINY, "--data", "{}/data.tsv", "--device", "nowhere"], "'nowhere' cannot be used"),
        (["captions", TINY, "--data", "{}/data.tsv", "--max-length", "1"], "leaves no room"),
        (["vist", TINY, "--data", "{}/none.json", "--images", str(IMAGES)], "none.json"),
        (["visdial", TINY, "--data", "{}/broken.json", "--images", str(IMAGES)], "broken.json"),
    ],
    quickstart: [
        (["--language-model", "{}/none", "--vision-model", "{}/none", "--data", "{}/none.tsv"], "none.tsv"),
        (
            ["--language-model", "{}/empty", "--vision-model", VISION, "--data", "{}/ten.tsv"],
            "tokenizer .* from .*empty",
        ),
        (
            ["--language-model", OPT, "--vision-model", OPT, "--data", "{}/ten.tsv"],
            "image processor for .*language_model",
        ),
        (["learning_rate=much"], "`learning_rate` must be a number, got 'much'"),
        (["--train-minutes", "-1"], "at least 0"),
    ],
    benchmark: [
        (["--preset", "huge"], "invalid choice: 'huge'"),
        (["--preset", "tiny", "--device", "nowhere"], "'nowhere' cannot be used"),
        (["--preset", "tiny", "--output", "{}/empty"], "is a folder"),
    ],
    benchmark_answers: [
        (["--preset", "tiny", "--rounds", "0"], "at least 1"),
        (["--preset", "tiny", "--output", "{}/empty"], "is a folder"),
    ],
    benchmark_index: [
        (["--count", "many"], "whole number of at least 1, got 'many'"),
        (["--output", "{}/empty"], "is a folder"),
    ],
    benchmark_large_index: [
        (["--count", "10"], "at least 1000"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--output", "{}/empty"], "is a folder"),
    ],
    benchmark_kills: [
        (["--kills", "0"], "at least 1"),
        (["--output", "{}/empty"], "is a folder"),
    ],
    benchmark_processes: [
        (["--dtypes", "int8"], "invalid choice: 'int8'"),
        (["--output", "{}/empty"], "is a folder"),
    ],
    benchmark_serving: [
        ([TINY], "--index"),
        ([TINY, "--index", "{}/none"], "none"),
        ([TINY, "--index", "{}/none", "--output", "{}/empty"], "is a folder"),
    ],
    benchmark_warm_start: [
        ([OPT, VISION, "--data", "{}/data.tsv"], "NAME=TRAIN"),
        ([OPT, VISION, "--data", "one={}/none.tsv"], "none.tsv"),
        ([OPT, VISION, "--data", "one={}/data.tsv"], "take two or more"),
        ([OPT, VISION, "--data", "one={}/data.tsv", "--output", "{}/empty"], "is a folder"),
    ],
    benchmark_options: [
        ([OPT, VISION], "Name data: --pairs"),
        ([OPT, VISION, "--pairs", "{}/data.tsv"], "NAME=TRAIN"),
        ([OPT, VISION, "--documents", "one={}/data.tsv"], "NAME=TRAIN,TEST"),
        ([OPT, VISION, "--pairs", "one={}/data.tsv", "--options", "magic"], "invalid choice: 'magic'"),
        ([OPT, VISION, "--output", "{}/empty"], "is a folder"),
    ],
    manual_pages: [
        (["{}/none", "{}/out"], "no HTML pages with pictures"),
        (["{}/none", "{}/out", "--max-characters", "1"], "at least 100"),
    ],
    benchmark_dirty_data: [
        ([OPT, VISION, "--count", "3"], "at least 20"),
        ([OPT, VISION, "--broken", "1.5"], "from 0 to below 1"),
        ([OPT, VISION, "--output", "{}/empty"], "is a folder"),
    ],
    benchmark_cluster: [
        (["--parts", "1"], "at least 4"),
        (["--output", "{}/empty"], "is a folder"),
    ],
    build_image_index: [
        ([TINY, str(IMAGES), str(IMAGES), "{}/index"], "Expected one folder or table, or shards.*Use --merge"),
        ([TINY, "{}/*.none.tar", "{}/index"], "no file.*none.tar"),
        ([TINY, "memory://none/*.tar", "{}/index"], "no shard .*at memory://none"),
        ([TINY, "nothing://none/*.tar", "{}/index"], "nothing"),
        ([TINY, str(IMAGES), "{}/index", "--ray", "--shard", "0/2"], "--ray and --shard exclude each other"),
        ([TINY, "{}/embeddings.pkl", "{}/index", "--ray"], "one process reads them, without --ray and --shard"),
        ([TINY, str(IMAGES), "{}/index", "--actors", "2"], "--actors is for --ray, which is missing"),
        ([TINY, str(IMAGES), "{}/index", "--ray", "--gpus-per-actor", "-1"], "at least 0"),
        (["{}/none", str(IMAGES), "{}/index"], "none"),
        (["{}/empty", str(IMAGES), "{}/index"], "empty"),
        ([OPT, str(IMAGES), "{}/index"], "model of type 'opt'; expected 'fromage'"),
        ([TINY, "{}/none.tsv", "{}/index"], "none.tsv"),
        ([TINY, "{}/none", "{}/index"], "none"),
        ([TINY, str(IMAGES), "{}/data.tsv"], "data.tsv"),
        ([TINY, str(IMAGES), "{}/index", "--shard", "4/4"], "shard"),
        ([TINY, str(IMAGES), "{}/index", "--shard", "one"], "expected I/N, such as 0/4, got 'one'"),
        ([TINY, str(IMAGES), "{}/index", "--batch-size", "0"], "at least 1"),
        ([TINY, "{}/none", "{}/empty", "{}/index", "--merge"], "none"),
    ],
    convert_original_checkpoint: [
        (["--checkpoint-dir", "{}/none", "--output-dir", "{}/o"], "none.*cannot be used"),
        (["--checkpoint-dir", "{}/empty", "--output-dir", "{}/o"], "empty.*cannot be used"),
        (["--checkpoint-dir", "{}/none", "--output-dir", "{}/o", "--reverse"], "none"),
        (["--checkpoint-dir", OPT, "--output-dir", "{}/o", "--reverse"], "opt|holds"),
    ],
    make_tiny_checkpoint: [
        (["{}/data.tsv"], "data.tsv"),
        (["{}/t", "--num-image-tokens", "0"], "at least 1"),
    ],
    push_to_hub: [
        (["{}/none", "org/name", "--dry-run"], "none"),
        (["{}/empty", "org/name", "--dry-run"], "empty"),
        ([OPT, "org/name", "--dry-run"], "opt"),
        ([TINY, "org/name", "--dry-run", "--results", "{}/none.json"], "none.json cannot be read.*JSON file"),
        ([TINY, "org/name", "--dry-run", "--results", "{}/broken.json"], "broken.json cannot be read"),
        ([TINY, "org/name", "--dry-run", "--results", "{}/list.json"], "list.json are a list"),
        ([TINY, "org/name", "--dry-run"], "not on the Hub"),
    ],
}


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        pytest.param(command, *case, id=f"{command.__name__.rpartition('.')[2]} {number}")
        for command, cases in CASES.items()
        for number, case in enumerate(cases)
    ],
)
def test_one_line_of_what_is_wrong(command, arguments, message, places, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no waiting for a Hub
    with pytest.raises(SystemExit) as ended:
        command.main([argument.format(places) for argument in arguments])
    assert ended.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if ": error: " in line]
    assert len(errors) == 1 and lines[-1] == errors[0] and "Traceback" not in "".join(lines)
    assert re.search(message, errors[0]), errors[0]


def test_line_and_traceback(places, tmp_path):
    """In a process of its own; an environment variable shows where the error comes from."""
    command = ["-m", "training.train", places / "none.yaml"]
    short = processes.run(*command, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert short.returncode == 2 and "Traceback" not in short.stderr
    assert re.fullmatch(
        r"python -m training.train: error: .*none.yaml cannot be read: .* \[FROMAGE_TRACEBACK=1 shows where\]",
        short.stderr.splitlines()[-1],
    )
    long = processes.run(*command, cwd=tmp_path, PYTHONPATH=str(ROOT), FROMAGE_TRACEBACK="1")
    assert long.returncode == 1 and "Traceback" in long.stderr and "FileNotFoundError" in long.stderr


@pytest.fixture
def arguments_restored(monkeypatch):
    monkeypatch.setattr(sys, "argv", list(sys.argv))


def test_fromage_names_the_extra_of_a_missing_package(arguments_restored, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "datasets", None)
    for name in [name for name in sys.modules if name.partition(".")[0] == "training" and name != cli.__name__]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", "config.yaml"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "fromage: error: `fromage train` needs datasets, which is not installed: pip install "
        "'modeling-fromage[train]'. [FROMAGE_TRACEBACK=1 shows where]\n"
    )


def test_fromage_names_itself(arguments_restored, capsys, tmp_path):
    """As the user called it: in usage lines, in the descriptions and in errors."""
    for name, command in cli.COMMANDS.items():
        with pytest.raises(SystemExit) as ended:
            cli.main([name, "--help"])
        printed = capsys.readouterr().out
        assert ended.value.code == 0 and printed.startswith(f"usage: fromage {name} "), name
        assert f"python -m {command.module}" not in printed
    with pytest.raises(SystemExit):
        cli.main(["train", str(tmp_path / "none.yaml")])
    assert re.match("fromage train: error: .*none.yaml cannot be read", capsys.readouterr().err.splitlines()[-1])


@pytest.mark.parametrize(("arguments", "message"), [(["trian"], "invalid choice: 'trian'"), ([], "COMMAND")])
def test_fromage_lists_its_commands(arguments, message, arguments_restored, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("fromage: error: ") and message in error
    assert not arguments or all(name in error for name in cli.COMMANDS)


def test_a_command_succeeds(arguments_restored, tmp_path, capsys):
    """And nothing that it returns becomes the exit status."""
    assert cli.main(["tiny", str(tmp_path)]) is None
    assert capsys.readouterr().out.strip() == str(tmp_path / "fromage")


def test_python_m_names_the_module(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "hub_scripts.make_tiny_checkpoint", "--help"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.stdout.startswith("usage: python -m hub_scripts.make_tiny_checkpoint ")


def test_errors_of_ours_keep_their_traceback(monkeypatch, tmp_path):
    def fails(*args):
        raise KeyError("a mistake in the code")

    monkeypatch.setattr(make_tiny_checkpoint, "make_tiny_checkpoint", fails)
    with pytest.raises(KeyError, match="a mistake"):
        make_tiny_checkpoint.main([str(tmp_path)])
