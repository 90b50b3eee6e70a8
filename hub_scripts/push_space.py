"""Publish the page as a Space: `python -m hub_scripts.push_space org/space --model org/fromage --index org/index`.

Stages a folder with app.py, requirements.txt and README.md, and uploads it in a single commit. With `--model-path`, a
folder that holds the model, it first makes the page from that app.py, in a process of its own (this needs the extra
`demo`). `--dry-run` stops before the upload.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from huggingface_hub import RepoCard, SpaceCardData

from modeling_fromage import __version__
from modeling_fromage.io.command_line import command_parser, errors_in_one_line

from .push_to_hub import upload

GRADIO = "6.31.0"  # the tests run with it
_DISTRIBUTION = "modeling-fromage"
_APP = '''"""The page of {distribution} for {model}; `fromage demo` serves the same on your own machine."""

from modeling_fromage.hub_scripts.demo import make_page, make_parser
from modeling_fromage.serving.demo import launch

page = make_page(make_parser().parse_args({arguments}))

if __name__ == "__main__":
    launch(page)
'''
_CARD = """---
{metadata}
---

# {title}

A conversation with [{model}](https://huggingface.co/{model}), which answers with text and with pictures of {index}.
Made by [{distribution}](https://pypi.org/project/{distribution}/).
"""
# In a checkout the package's sub-packages have other names.
_CHECK = """
import runpy, sys
if {in_checkout}:
    import hub_scripts.demo
    sys.modules["modeling_fromage.hub_scripts"] = sys.modules["hub_scripts"]
    sys.modules["modeling_fromage.hub_scripts.demo"] = sys.modules["hub_scripts.demo"]
page = runpy.run_path("app.py")["page"]
print(f"app.py made a page of {{len(page.blocks)}} components.")
"""


def stage(folder: Path, options: argparse.Namespace) -> None:
    """Write everything that the Space will hold into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    title = options.title or options.repo_id.rpartition("/")[2]
    (folder / "app.py").write_text(_app(options, title), encoding="utf-8")
    requirement = options.requirement or f"{_DISTRIBUTION}[demo]=={__version__}"
    (folder / "requirements.txt").write_text(f"{requirement}\n", encoding="utf-8")
    data = SpaceCardData(
        title=title,
        sdk="gradio",
        sdk_version=GRADIO,
        app_file="app.py",
        license=options.license,
        models=[options.model],
        datasets=[options.index] if options.index else None,
    )
    index = f"[{options.index}](https://huggingface.co/datasets/{options.index})" if options.index else "no index"
    card = _CARD.format(
        metadata=data.to_yaml(), title=title, model=options.model, index=index, distribution=_DISTRIBUTION
    )
    RepoCard(card).save(folder / "README.md")


def _app(options: argparse.Namespace, title: str) -> str:
    arguments = [options.model, *(["--index", options.index] if options.index else []), "--title", title]
    arguments += ["--examples", *options.examples] if options.examples else []
    return _APP.format(distribution=_DISTRIBUTION, model=options.model, arguments=arguments)


def run_as_a_stranger(folder: Path, options: argparse.Namespace) -> str:
    """Make the page of the staged app.py in a process of its own, and return what it prints.

    Args:
        options: `model_path` and `index_path` are folders that stand in for the repositories.

    Raises:
        RuntimeError: app.py failed. The message holds its error.
    """
    app = (folder / "app.py").read_text(encoding="utf-8")
    for name, path in ((options.model, options.model_path), (options.index, options.index_path)):
        if path:
            app = app.replace(repr(name), repr(str(Path(path).resolve())))
    with tempfile.TemporaryDirectory() as elsewhere:
        Path(elsewhere, "app.py").write_text(app, encoding="utf-8")
        in_checkout = find_spec("modeling_fromage.hub_scripts") is None
        root = [str(Path(__file__).parents[1])] if in_checkout else []
        path = os.pathsep.join([*root, *filter(None, [os.environ.get("PYTHONPATH")])])
        run = subprocess.run(
            [sys.executable, "-c", _CHECK.format(in_checkout=in_checkout)],
            capture_output=True,
            text=True,
            cwd=elsewhere,
            env={**os.environ, "PYTHONPATH": path},
        )
    if run.returncode:
        raise RuntimeError(f"The staged app.py does not run:\n{run.stderr[-2000:]}")
    return run.stdout


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    parser.add_argument("repo_id", help="org/name of the Space")
    parser.add_argument("--model", required=True, help="Hub id of the checkpoint, as `fromage push` published it")
    parser.add_argument("--index", help="Hub id of the image index")
    parser.add_argument(
        "--requirement", help="what installs this package, such as git+https://...; by default its version"
    )
    parser.add_argument("--model-path", help="check app.py with the model in this folder")
    parser.add_argument("--index-path", help="and with the index in this one")
    parser.add_argument("--title", help="defaults to the Space's name")
    parser.add_argument("--examples", nargs="*", help="texts to click")
    parser.add_argument("--dry-run", action="store_true", help="stage and check, but do not upload")
    parser.add_argument("--staging-dir", help="keep the staged folder here")
    parser.add_argument("--license", default="apache-2.0", help="of the Space")
    parser.add_argument("--private", action="store_true", default=None)
    parser.add_argument("--message", default="Upload the page", help="commit message")
    parser.add_argument("--token", help="defaults to that of `hf auth login`")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    options = parser.parse_args(argv)
    with errors_in_one_line(parser), tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.staging_dir or temporary)
        stage(folder, options)
        if options.model_path:
            print(run_as_a_stranger(folder, options), end="")
        print(f"Staged {', '.join(sorted(path.name for path in folder.iterdir()))}.")
        if not options.dry_run:
            print(upload(folder, options.repo_id, options, repo_type="space", space_sdk="gradio"))


if __name__ == "__main__":
    main()
