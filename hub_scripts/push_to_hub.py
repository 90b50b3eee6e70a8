"""Publish a checkpoint on the Hub: `python -m hub_scripts.push_to_hub CHECKPOINT org/name [--dry-run]`.

Stages a folder with the trained parts (in bfloat16, half the size), the code that loads them, the processor and a model
card. Then runs the card's snippet on that folder, in a process that cannot import this package, and uploads the folder
in a single commit. `--dry-run` stops before the upload.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError

from modeling_fromage import FromageConfig, FromageForConditionalGeneration, FromagePipeline, FromageProcessor
from modeling_fromage.io.command_line import command_parser, errors_in_one_line
from modeling_fromage.io.model_card import RUN, CardFacts, is_on_hub, model_card, of_the_model

_RESULTS = "all_results.json"  # written by training.train
_STRANGER = "import sys; sys.modules['modeling_fromage'] = None; exec(sys.stdin.read())"


def stage(checkpoint: str, repo_id: str, folder: Path, options: argparse.Namespace) -> None:
    """Write everything that the repository will hold into `folder`.

    Raises:
        ValueError: The backbones are folders of this machine, and would not be published with the trained parts.
    """
    results = read_results(options.results, checkpoint)
    model = FromageForConditionalGeneration.from_pretrained(checkpoint)
    processor = FromageProcessor.from_pretrained(checkpoint)
    processor.check_config(model.config)
    if not options.save_backbones:
        model.refuse_local_backbones()
    pipe = FromagePipeline(model=model, processor=processor)  # saves its own code as well
    pipe.save_pretrained(folder, save_backbones=options.save_backbones, adapter_dtype=options.adapter_dtype)
    facts = CardFacts(
        results=results,
        run=read_json(Path(checkpoint, RUN)) if Path(checkpoint, RUN).is_file() else {},
        data=options.data,
        datasets=options.datasets,
        license=options.license,
        backbone_licenses=licenses(model.config, options),
        adapter_dtype=options.adapter_dtype,
        holds_backbones=options.save_backbones,
    )
    model_card(model, processor, repo_id, facts).save(folder / "README.md")


def read_results(path: str | None, checkpoint: str) -> dict[str, Any]:
    """The metrics in a JSON file.

    By default those that training wrote into the checkpoint, if any, without its speed.

    Raises:
        ValueError: The file cannot be read, or does not map names to metrics.
    """
    found = Path(path) if path else Path(checkpoint, _RESULTS)
    if not path and not found.is_file():
        return {}
    results = read_json(found)
    return results if path else of_the_model(results)


def read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"The results {path} cannot be read: {error}. --results takes a JSON file.") from error
    if not isinstance(found, dict):
        raise ValueError(f"The results {path} are a {type(found).__name__}; expected metrics by their names.")
    return found


def licenses(config: FromageConfig, options: argparse.Namespace) -> dict[str, str | None]:
    """Those of the backbones: as given, else as the Hub says."""
    found = {"text": options.text_license, "vision": options.vision_license}
    for prefix, given in found.items():
        if given is None and is_on_hub(config, prefix):
            name, revision = (getattr(config, f"{prefix}_model_{field}") for field in ("id", "revision"))
            card_data = HfApi().model_info(name, revision=revision).card_data
            found[prefix] = card_data.license if card_data else None
    return found


def load_as_a_stranger(folder: Path, repo_id: str) -> str:
    """Run the card's snippet on `folder` in a process that cannot import this package, and return what it prints.

    Raises:
        RuntimeError: The snippet failed. The message holds its error.
    """
    (snippet,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    with tempfile.TemporaryDirectory() as elsewhere:
        run = subprocess.run(
            [sys.executable, "-c", _STRANGER],
            input=snippet.replace(repo_id, str(folder.resolve())),
            capture_output=True,
            text=True,
            cwd=elsewhere,
        )
    if run.returncode:
        raise RuntimeError(f"The staged checkpoint does not load where this package is missing:\n{run.stderr[-2000:]}")
    return run.stdout


def upload(
    folder: Path, repo_id: str, options: argparse.Namespace, revision: str | None = None, **repository: Any
) -> str:
    """Create the repository if it is missing, upload `folder` in a single commit and return the commit's URL. Files and
    folders whose names begin with "_" stay here.

    Args:
        options: With `token`, `private` and `message`.
        repository: What `HfApi.create_repo` takes besides; a model's takes nothing.

    Raises:
        ConnectionError: The upload failed. Nothing was committed.
    """
    api = HfApi(token=options.token)
    try:
        api.create_repo(repo_id, private=options.private, exist_ok=True, **repository)
        commit = api.upload_folder(
            repo_id=repo_id,
            repo_type=repository.get("repo_type"),
            folder_path=folder,
            revision=revision,
            commit_message=options.message,
            ignore_patterns=["_*"],  # as the Trainer: a run's list of bad examples names files of this machine
        )
    except (HTTPError, OSError, RuntimeError) as error:
        raise ConnectionError(
            f"The upload to {repo_id} broke off: {error}. Nothing was committed; run the same command again."
        ) from error
    return commit.commit_url


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    parser.add_argument("checkpoint", help="folder written by save_pretrained or by training.train")
    parser.add_argument("repo_id", help="org/name")
    parser.add_argument("--dry-run", action="store_true", help="stage and check, but do not upload")
    parser.add_argument("--staging-dir", help="keep the staged folder here")
    parser.add_argument("--save-backbones", action="store_true", help="publish the frozen backbones as well")
    parser.add_argument("--adapter-dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--results", help=f"JSON file of metrics for the card; by default the checkpoint's {_RESULTS}")
    parser.add_argument("--data", help="what the model was trained on, in words")
    parser.add_argument("--datasets", nargs="*", default=[], help="Hub ids of the training data")
    # The British spelling came first and stays.
    parser.add_argument("--license", "--licence", default="apache-2.0", help="of the trained parts")
    parser.add_argument("--text-license", "--text-licence", help="of the language model, if the Hub does not say")
    parser.add_argument("--vision-license", "--vision-licence", help="of the vision encoder, if the Hub does not say")
    parser.add_argument("--private", action="store_true", default=None)
    parser.add_argument("--revision", help="branch to push to")
    parser.add_argument("--message", default="Upload FROMAGe", help="commit message")
    parser.add_argument("--token", help="defaults to that of `hf auth login`")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    options = parser.parse_args(argv)
    with errors_in_one_line(parser), tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.staging_dir or temporary)
        stage(options.checkpoint, options.repo_id, folder, options)
        print(load_as_a_stranger(folder, options.repo_id), end="")
        size = sum(path.stat().st_size for path in folder.iterdir())
        print(f"Staged {len(list(folder.iterdir()))} files, {size / 1e6:.1f} MB, and loaded them without this package.")
        if not options.dry_run:
            print(upload(folder, options.repo_id, options, revision=options.revision))


if __name__ == "__main__":
    main()
