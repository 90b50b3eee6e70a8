"""Publish a checkpoint on the Hub: `python -m hub_scripts.push_to_hub CHECKPOINT org/name [--dry-run]`.

Stages a folder with the trained parts (bfloat16, half the size), the code that loads them, the processor and a model
card; loads it in a process of its own that has not this package, and runs the card's snippet there; then uploads it in
one commit, so that the repository is never half of something. `--dry-run` stops before the upload.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HTTPError

from modeling_fromage import FromageForConditionalGeneration, FromagePipeline, FromageProcessor
from modeling_fromage.images_fromage import printable
from modeling_fromage.io.command_line import errors_in_one_line

_TEMPLATE = Path(__file__).parent / "model_card_template.md"
_RESULTS, _SPEEDS = "all_results.json", ("_runtime", "_per_second", "total_flos")  # of training.train
_STRANGER = "import sys; sys.modules['modeling_fromage'] = None; exec(sys.stdin.read())"


def stage(checkpoint: str, repo_id: str, folder: Path, options: argparse.Namespace):
    """Write all that goes into the repository into `folder`.

    Raises:
        ValueError: The backbones are folders of this machine and are not to be published with the trained parts.
    """
    results = read_results(options.results, checkpoint)
    model = FromageForConditionalGeneration.from_pretrained(checkpoint)
    processor = FromageProcessor.from_pretrained(checkpoint)
    processor.check_config(model.config)
    if not options.save_backbones:
        model.refuse_local_backbones()
    pipe = FromagePipeline(model=model, processor=processor)  # its code goes along
    pipe.save_pretrained(folder, save_backbones=options.save_backbones, adapter_dtype=options.adapter_dtype)
    card = model_card(model, processor, repo_id, options, results)
    card.save(folder / "README.md")


def read_results(path: str | None, checkpoint: str) -> dict[str, Any]:
    """The metrics in a JSON file; by default in the one that training wrote into the checkpoint, if it did, without how
    fast it was.

    Raises:
        ValueError: The file cannot be read, or holds no metrics by name.
    """
    found = Path(path) if path else Path(checkpoint, _RESULTS)
    if not path and not found.is_file():
        return {}
    try:
        results = json.loads(found.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"The results {found} cannot be read: {error}. --results takes a JSON file.") from error
    if not isinstance(results, dict):
        raise ValueError(f"The results {found} are a {type(results).__name__}; expected metrics by their names.")
    return results if path else {name: value for name, value in results.items() if not name.endswith(_SPEEDS)}


def model_card(
    model, processor: FromageProcessor, repo_id: str, options: argparse.Namespace, results: dict[str, Any]
) -> ModelCard:
    config = model.config
    backbones = [
        _describe_backbone(config, prefix, role, licence)
        for prefix, role, licence in (
            ("text", "language model", options.text_licence),
            ("vision", "vision encoder", options.vision_licence),
        )
    ]
    on_hub = [row["name"] for row in backbones if row["on_hub"]]
    data = ModelCardData(
        license=options.licence,
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        base_model=on_hub or None,
        datasets=options.datasets or None,
        tags=["fromage", "image-retrieval", "arxiv:2301.13823"],
    )
    trained = sum(p.numel() for p in model.adapter.parameters())
    width = {"bfloat16": 2, "float16": 2, "float32": 4}[options.adapter_dtype]
    return ModelCard.from_template(
        data,
        template_path=str(_TEMPLATE),
        title=repo_id.rpartition("/")[2],
        repo_id=repo_id,
        trained_parameters=f"{trained:,}",
        trained_megabytes=f"{trained * width / 1e6:.1f}",
        holds_backbones=options.save_backbones,
        backbones=backbones,
        licence=options.licence,
        prompt=json.dumps(processor.caption_prompt, ensure_ascii=False),
        stops=json.dumps(processor.caption_stop_strings, ensure_ascii=False),
        data=options.data or ", ".join(options.datasets) or "not stated",
        num_image_tokens=config.num_image_tokens,
        projection_dim=config.projection_dim,
        metrics=_numbers(results),
    )


def _describe_backbone(config, prefix: str, role: str, licence: str | None) -> dict[str, Any]:
    name = getattr(config, f"{prefix}_model_id")
    on_hub = name is not None and not os.path.isdir(name)
    if on_hub and licence is None:
        card_data = HfApi().model_info(name, revision=getattr(config, f"{prefix}_model_revision")).card_data
        licence = card_data.license if card_data else None
    return {
        "role": role,
        "name": name if on_hub else getattr(config, f"{prefix}_config").model_type,
        "on_hub": on_hub,
        "revision": (getattr(config, f"{prefix}_model_revision") or "")[:8] or "-",
        "licence": licence or "see there" if on_hub else licence or "not stated",
    }


def _numbers(results: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """The numbers in a results file, nested names joined, as cells of a Markdown table; lists (logs, captions) are left
    out."""
    rows: list[tuple[str, str]] = []
    for name, value in results.items():
        if isinstance(value, dict):
            rows += _numbers(value, f"{prefix}{name} ")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            cell = re.sub(r"[\\`*\[\]<>|]", r"\\\g<0>", printable(prefix + name))
            rows.append((cell, f"{value:,}" if isinstance(value, int) else f"{value:.4g}"))
    return rows


def load_as_a_stranger(folder: Path, repo_id: str) -> str:
    """Run the card's snippet against `folder` in a process without this package; returns what it prints.

    Raises:
        RuntimeError: The snippet fails; the message has its error.
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


def upload(folder: Path, repo_id: str, options: argparse.Namespace) -> str:
    """Create the repository where it is missing and upload `folder` in one commit; returns the commit's address.

    Raises:
        ConnectionError: The Hub was not reached or broke off. Nothing was committed.
    """
    api = HfApi(token=options.token)
    try:
        api.create_repo(repo_id, private=options.private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, revision=options.revision, commit_message=options.message
        )
    except (HTTPError, OSError, RuntimeError) as error:
        raise ConnectionError(
            f"The upload to {repo_id} broke off: {error}. Nothing was committed; run the same command again."
        ) from error
    return commit.commit_url


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder written by save_pretrained or by training.train")
    parser.add_argument("repo_id", help="org/name")
    parser.add_argument("--dry-run", action="store_true", help="stage and check, but do not upload")
    parser.add_argument("--staging-dir", help="keep the staged folder here")
    parser.add_argument("--save-backbones", action="store_true", help="publish the frozen backbones as well")
    parser.add_argument("--adapter-dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--results", help=f"JSON file of metrics for the card; by default the checkpoint's {_RESULTS}")
    parser.add_argument("--data", help="what the model was trained on, in words")
    parser.add_argument("--datasets", nargs="*", default=[], help="Hub ids of the training data")
    parser.add_argument("--licence", default="apache-2.0", help="of the trained parts")
    parser.add_argument("--text-licence", help="of the language model, where the Hub does not say")
    parser.add_argument("--vision-licence", help="of the vision encoder, where the Hub does not say")
    parser.add_argument("--private", action="store_true", default=None)
    parser.add_argument("--revision", help="branch to push to")
    parser.add_argument("--message", default="Upload FROMAGe", help="commit message")
    parser.add_argument("--token", help="defaults to that of `hf auth login`")
    options = parser.parse_args(argv)
    with errors_in_one_line(parser), tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.staging_dir or temporary)
        stage(options.checkpoint, options.repo_id, folder, options)
        print(load_as_a_stranger(folder, options.repo_id), end="")
        size = sum(path.stat().st_size for path in folder.iterdir())
        print(f"Staged {len(list(folder.iterdir()))} files, {size / 1e6:.1f} MB, and loaded them without this package.")
        if not options.dry_run:
            print(upload(folder, options.repo_id, options))


if __name__ == "__main__":
    main()
