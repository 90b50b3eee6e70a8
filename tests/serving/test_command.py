"""`fromage demo` before there is a page."""

import sys

import pytest

from training import cli


def test_without_gradio_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "modeling_fromage.serving.demo", raising=False)
    with pytest.raises(SystemExit) as exit_:
        cli.main(["demo", "nowhere"])
    assert exit_.value.code == 2
    assert "needs gradio: pip install 'modeling-fromage[demo]'" in capsys.readouterr().err


def test_an_example_that_is_not_there(capsys):
    with pytest.raises(SystemExit):
        cli.main(["demo", "nowhere", "--example-images", "no.png"])
    assert "There is no picture no.png" in capsys.readouterr().err
