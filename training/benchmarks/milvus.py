"""An index in a file of Milvus Lite: what it finds, against exact search, and what is left after kills."""

import random
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from modeling_fromage import FromageImageIndex

from ..publishing.provenance import provenance
from .index import DIM, TOP_K, clustered, recall
from .timing import in_new_process

AT_ONCE = 50  # images of one addition
QUERIES = 64
_ADD = f"from {__name__} import add_for_ever; add_for_ever(*__import__('sys').argv[1:])"
_INDEXES = {
    "FLAT": ({}, [{}]),
    "HNSW": ({"M": 16, "efConstruction": 200}, [{"ef": 16}, {"ef": 64}, {"ef": 256}]),
    "IVF_FLAT": ({"nlist": 128}, [{"nprobe": 4}, {"nprobe": 16}, {"nprobe": 64}]),
}


def measure_indexes(count: int, folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Recall and speed of each index, with a filter that a third of the images pass and without one."""
    ids = [str(number) for number in range(count)]
    flat = FromageImageIndex(clustered(count, 1), ids, [{"third": number % 3} for number in range(count)])
    queries, where = clustered(QUERIES, 3), {"third": [1]}
    exact = {name: flat.search(queries, TOP_K, where=w).ids for name, w in (("all", None), ("filtered", where))}
    rows = []
    for kind, (built, searches) in _INDEXES.items():
        place = {"uri": str(folder / "images.db"), "collection": kind, "index_type": kind, "index_params": built}
        start = time.perf_counter()
        index = FromageImageIndex.merge([flat]).use_backend("milvus", **place)
        seconds = time.perf_counter() - start
        for options in searches:
            index.set_search_options(**options)
            times: list[float] = []
            for _ in range(rounds):
                start = time.perf_counter()
                found = index.search(queries, TOP_K).ids
                times.append(time.perf_counter() - start)
            filtered = index.search(queries, TOP_K, where=where).ids
            rows.append({
                "index": kind, "options": options, "move_seconds": seconds, "recall": _recall(found, exact["all"]),
                "recall_filtered": _recall(filtered, exact["filtered"]),
                "seconds_per_query": statistics.median(times) / QUERIES,
            })  # fmt: skip
    return rows


def _recall(found: list[list[str]], exact: list[list[str]]) -> float:
    return recall([list(map(int, row)) for row in found], [list(map(int, row)) for row in exact])


def add_for_ever(folder: str, run: str) -> None:
    """Add images to the index in `folder`, and print a number as soon as each addition has returned."""
    index = FromageImageIndex.from_pretrained(folder)
    number = 0
    while True:
        ids = [f"{run} {number} {part}" for part in range(AT_ONCE)]
        index.add(clustered(AT_ONCE, number), ids, [{"run": run}] * AT_ONCE)
        print(number, flush=True)
        number += 1


def measure_kills(kills: int, folder: Path, seed: int) -> dict[str, Any]:
    """Kill a process while it adds, again and again, and look what is there in the end.

    Raises:
        RuntimeError: A process ended by itself.
    """
    make = (
        "import sys, torch; from modeling_fromage import FromageImageIndex; FromageImageIndex(torch.empty(0, "
        f"{DIM}), [], backend='milvus', uri=sys.argv[1] + '/images.db').save_pretrained(sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", make, str(folder)], check=True)
    generator, additions = random.Random(seed), []
    for run in range(kills):
        process = subprocess.Popen(
            [sys.executable, "-c", _ADD, str(folder), str(run)], stdout=subprocess.PIPE, text=True
        )
        if not process.stdout.readline():
            raise RuntimeError(f"The process that adds ended by itself with {process.wait()}.")
        time.sleep(generator.uniform(0, 1.5))
        process.kill()
        additions.append(1 + len(process.stdout.read().splitlines()))  # the pipe holds what was printed before the kill
        process.wait()
    start = time.perf_counter()
    index = FromageImageIndex.from_pretrained(folder)
    opened = time.perf_counter() - start
    ids = index.ids
    expected = {
        f"{run} {number} {part}"
        for run, count in enumerate(additions)
        for number in range(count)
        for part in range(AT_ONCE)
    }
    found = index.search(index.embeds[:QUERIES], 1).scores
    return {
        "kills": kills, "additions": additions, "at_once": AT_ONCE, "acknowledged": len(expected),
        "lost": len(expected - set(ids)), "twice": len(ids) - len(set(ids)), "more": len(set(ids) - expected),
        "open_seconds": opened, "finds_itself": bool((found > 1 - 1e-5).all()),
    }  # fmt: skip


def measure(count: int, kills: int, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        # In processes of their own, as Milvus Lite writes its files once more at the end of one.
        killed = in_new_process(measure_kills, kills, Path(folder) / "killed", 0)
        indexes = in_new_process(measure_indexes, count, Path(folder), rounds)
    versions = {name: version(name) for name in ("pymilvus", "milvus-lite")}
    return {"count": count, "dim": DIM, "top_k": TOP_K, "indexes": indexes, "killed": killed, "milvus": versions,
            **provenance("cpu")}  # fmt: skip


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    rows = ["| index | recall@10 | recall@10 of a third, by a filter | ms a query, 64 at once |", "|---|---|---|---|"]
    for row in results["indexes"]:
        options = ", ".join(f"{name} {value}" for name, value in row["options"].items())
        rows.append(
            f"| {row['index']}{options and ', '}{options} | {row['recall']:.3f} | {row['recall_filtered']:.3f} | "
            f"{row['seconds_per_query'] * 1e3:.1f} |"
        )
    killed = results["killed"]
    note = (
        f"{results['count']:,} x {results['dim']} in a file of Milvus Lite {results['milvus']['milvus-lite']}, made-up "
        f"clusters, {results['hardware']}, medians. A process that adds {killed['at_once']} images at a time was killed"
        f" {killed['kills']} times with SIGKILL: of {killed['acknowledged']:,} acknowledged images {killed['lost']} "
        f"are lost and {killed['twice']} are there twice; {killed['more']} more are there, of additions that had not "
        "returned yet."
    )
    return "\n".join([*rows, "", note])
