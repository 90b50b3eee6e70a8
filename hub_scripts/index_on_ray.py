"""Build an index on a Ray cluster: actors build its parts, each in a folder, and the driver merges them.

The parts are those of `--shard`, and an interrupted one goes on from its last checkpoint. So an actor that was killed,
or a driver, loses at most the images since then, and neither rows nor images pass through Ray.
"""

import argparse
import logging
import os
import re
import shutil
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from huggingface_hub.utils import tqdm

from modeling_fromage import FromageImageIndex
from modeling_fromage.index.merging import is_index_of, merge_folders
from modeling_fromage.index.sources import image_sources

from .index_parts import build_part, images_of, load_model, load_processor

logger = logging.getLogger(__name__)
_TRIES = 20  # of a part whose actor dies again and again: it may be the part that kills it
_AGAIN = "What is finished is kept: the same command goes on."
_PARTS_PER_ACTOR = 4  # by default: they end at different times


class PartBuilder:
    """An actor: it loads the model once and builds part after part."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.model, self.processor = options, load_model(options), load_processor(options)

    def fingerprint(self) -> str:
        return self.model.retrieval_fingerprint()

    def build(self, directory: str, shard: tuple[int, int]) -> int:
        """Build a part, and return its number of images."""
        return len(build_part(self.options, self.model, self.processor, directory, shard, show_progress=False))


def build_on_ray(options: argparse.Namespace) -> FromageImageIndex:
    """Build the index that the command's `options` tell of. What was finished by an earlier run is kept.

    Raises:
        ValueError: Nothing of the cluster fits an actor, the output holds another index, or parts could not be built.
        ImportError: Ray is not installed.
    """
    options = _for_actors(options)
    sources = image_sources(images_of(options))
    digest, folder = sources.digest(), Path(f"{options.output}.parts")
    with _cluster(options) as ray:
        room = _room(ray, options)
        actors = _start(ray, options, options.actors or max(1, room))
        parts = _parts(folder, options.parts, len(actors))
        is_new = _build_parts(ray, actors, parts, options, digest)
    if is_new:
        merge_folders(parts, options.output, {"digest": digest})
    for part in parts:
        shutil.rmtree(part, ignore_errors=True)
    with suppress(OSError):  # there is something else in it, or nothing was built
        folder.rmdir()
    return FromageImageIndex.from_pretrained(options.output, image_root=sources.root)


def _for_actors(options: argparse.Namespace) -> argparse.Namespace:
    """Actors work in other folders, and with what they were promised."""
    images = [path if "://" in path else os.path.abspath(path) for path in options.images]
    model = os.path.abspath(options.model) if os.path.isdir(options.model) else options.model
    changed = {"images": images, "model": model, "output": os.path.abspath(options.output),
               "device": options.device or ("cuda" if options.gpus_per_actor else "cpu")}  # fmt: skip
    return argparse.Namespace(**{**vars(options), **changed})


# ---- the cluster --------------------------------------------------------------------------------------------------


@contextmanager
def _cluster(options: argparse.Namespace) -> Iterator[Any]:
    """Ray, connected to a cluster, or to one of this machine alone that is started for the purpose."""
    try:
        import ray
    except ImportError as error:
        raise ImportError("`--ray` needs pip install 'modeling-fromage[ray]'.") from error
    is_ours = not ray.is_initialized()
    if is_ours:
        address = options.ray_address or os.environ.get("RAY_ADDRESS") or "local"
        ray.init(address, include_dashboard=False if address == "local" else None, logging_level="WARNING")
    try:
        yield ray
    finally:
        if is_ours:
            ray.shutdown()


def _room(ray: Any, options: argparse.Namespace) -> int:
    """For how many actors there is room on the nodes that are there now."""
    asked = {"CPU": options.cpus_per_actor, "GPU": options.gpus_per_actor}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = sum(min(int(node.get(name, 0) // size) for name, size in asked.items() if size) for node in nodes)
    if room < (options.actors or 1):
        have = ", ".join(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes)
        text = (
            f"Room for {room} actors of {asked['CPU']} CPUs and {asked['GPU']:g} GPUs on the cluster's nodes ({have}); "
            f"{options.actors or 1} were asked for."
        )
        if not options.ray_address and "RAY_ADDRESS" not in os.environ:
            raise ValueError(f"{text} Ask for fewer or smaller ones, or give the address of a larger cluster.")
        logger.warning("%s The others start once it has grown.", text)
    return room


def _start(ray: Any, options: argparse.Namespace, count: int) -> list[Any]:
    """Actors that come back where they or their nodes die, with as many threads as they have CPUs."""
    environment = {"OMP_NUM_THREADS": str(options.cpus_per_actor)}
    if not __package__.startswith("modeling_fromage"):  # a checkout, which no installation finds
        path = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(path)
    actor = ray.remote(PartBuilder).options(
        num_cpus=options.cpus_per_actor,
        num_gpus=options.gpus_per_actor,
        max_restarts=-1,
        max_task_retries=_TRIES,
        runtime_env={"env_vars": environment},
    )
    return [actor.remote(options) for _ in range(count)]


# ---- the parts ----------------------------------------------------------------------------------------------------


def _parts(folder: Path, count: int | None, actors: int) -> list[Path]:
    """The folders of all parts: as many as an earlier run had, if there was one.

    Raises:
        ValueError: Another number is asked for.
    """
    names = [re.fullmatch(r"\d+-of-(\d+)", path.name) for path in folder.glob("*-of-*")]
    known = {int(name[1]) for name in names if name}
    if len(known) > 1 or (known and count not in (None, *known)):
        raise ValueError(
            f"{folder} holds an unfinished index in {sorted(known)} parts, and {count or 'as many'} were asked for. "
            "Go on with those, or remove the folder."
        )
    count = known.pop() if known else count or _PARTS_PER_ACTOR * actors
    return [folder / f"{i:05d}-of-{count:05d}" for i in range(count)]


def _build_parts(ray: Any, actors: list[Any], parts: list[Path], options: argparse.Namespace, digest: str) -> bool:
    """Let the actors build all parts, each taking the next one when it is ready. False where the output is finished.

    Raises:
        ValueError: The output holds another index, or parts could not be built.
    """
    waiting, idle, failed = deque(range(len(parts))), [], {}
    lost: Exception | None = None  # what the last actor died of
    running: dict[Any, tuple[Any, int | None]] = {actor.fingerprint.remote(): (actor, None) for actor in actors}
    with tqdm(total=len(parts), desc="Parts") as bar:
        while running and (waiting or any(part is not None for _, part in running.values())):
            ready = ray.wait(list(running), num_returns=1)[0][0]
            actor, part = running.pop(ready)
            try:
                result = ray.get(ready)
                if part is None and is_index_of(options.output, digest, result, options.dtype):
                    return False
            except ray.exceptions.RayActorError as error:  # died too often, or could not start: another takes its part
                lost = error
                waiting.extend([] if part is None else [part])
            except ray.exceptions.RayError as error:
                failed[part] = error
                idle.append(actor)
            else:
                bar.update(part is not None)
                idle.append(actor)
            while waiting and idle:
                actor, part = idle.pop(), waiting.popleft()
                running[actor.build.remote(str(parts[part]), (part, len(parts)))] = actor, part
    if waiting:
        raise ValueError(f"All actors died, with {len(waiting)} of {len(parts)} parts left: {_cause(lost)} {_AGAIN}")
    if failed:
        part, error = next(iter(failed.items()))
        raise ValueError(f"{len(failed)} of {len(parts)} parts failed. Part {part}: {_cause(error)} {_AGAIN}")
    return True


def _cause(error: BaseException | None) -> str:
    """What happened in an actor, in one line."""
    error = getattr(error, "cause", None) or error
    return str(error).strip().rpartition("\n")[2]
