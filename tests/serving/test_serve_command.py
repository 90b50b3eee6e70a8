"""`fromage serve` before there is a server: its options, from files and flags."""

import sys

import pytest

from hub_scripts.serve import ServeOptions, make_parser, read_serve_options
from tests.helpers import pages
from training import cli


def options_of(*arguments: str) -> ServeOptions:
    return read_serve_options(make_parser().parse_args(list(arguments)))


def test_flags_count_more_than_the_file(tmp_path):
    file = tmp_path / "serve.yaml"
    file.write_text(f"model: {tmp_path}\nport: 9000\nrequest_timeout: 5\ncors_origins: [https://a.example]\n")
    options = options_of(str(file), "--port", "9001", "--inline-images", "--cors-origins", "https://b.example", "c")
    assert (options.model, options.port, options.request_timeout) == (str(tmp_path), 9001, 5.0)
    assert options.inline_images and options.cors_origins == ["https://b.example", "c"]
    assert options.name == tmp_path.name and options_of("org/fromage").name == "org/fromage"
    assert options_of("m", "--served-model-name", "name").name == "name"
    assert options_of("m", "--dtype", "bf16").dtype == "bfloat16"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("modle: x\nmodel: y\n", "There is no key 'modle'. Did you mean model"),
        ("port: 1\n", "`model` is missing"),
        ("model: x\nport: many\n", "`port` must be a whole number, got 'many'"),
        ("model: x\nmax_queue: 0\n", "`max_queue` must be more than 0, got 0"),
        ("model: x\ndefault_max_tokens: 2000\n", "is more than `max_tokens`"),
        ("- x\n", "lines of the form"),
    ],
)
def test_what_a_file_says_wrong(text, told, tmp_path, capsys):
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    with pytest.raises(SystemExit) as exit_:
        cli.main(["serve", str(file)])
    assert exit_.value.code == 2 and told in capsys.readouterr().err


def test_flags_that_are_wrong(capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for arguments, told in (
        (["m", "--max-quue", "1"], "--max-queue"),
        (["none.yaml"], "none.yaml cannot be read"),
        (["m", "--port", "x"], "`port` must be a whole number"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["serve", *arguments])
        assert told in capsys.readouterr().err


def test_without_fastapi_it_says_what_to_install(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("modeling_fromage.serving.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(SystemExit) as exit_:
        cli.main(["serve", "nowhere"])
    assert exit_.value.code == 2
    assert "pip install 'modeling-fromage[serve]'" in capsys.readouterr().err


def test_the_file_of_the_page(tmp_path):
    (block,) = pages.blocks("docs/serve.md", "yaml")
    (tmp_path / "serve.yaml").write_text(block)
    options = options_of(str(tmp_path / "serve.yaml"))
    assert (options.model, options.host, options.max_tokens) == ("my-fromage", "0.0.0.0", 256)
