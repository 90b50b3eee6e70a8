"""Benchmark of large indexes on disk: building, opening, exact search beside reading the same memory, filters, and
FAISS with codes and graphs; what larger ones would take is computed from it.

The embeddings are made up, in overlapping clusters of 1,000 images. Each index is measured in a process of its own.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from modeling_fromage import FromageImageIndex
from modeling_fromage.index.shards import SHARD_ROWS
from modeling_fromage.index.writer import IndexWriter

from ..publishing.provenance import provenance
from .index import DIM, TOP_K, recall
from .timing import in_new_process, memory_counter

LICENSES = ["CC0", "CC BY", "CC BY-SA", "none"]
FILTERS = {"1 of 1,000 images": {"number": 7}, "1 of 4 images": {"license": "CC0"}}
CODES = "PQ32np"  # np: without polysemous training, which takes a minute and which nothing here uses
FEWEST_ROUNDS, MOST_ROUNDS = 3, 15
_ON_PAPER = {
    100_000_000: "`faiss` with IVF and PQ, one machine, rows on its disk",
    1_000_000_000: "a vector database on a cluster, or parts of the index on several machines",
}


def clustered(count: int, centres: int, seed: int) -> torch.Tensor:
    """Unit-norm embeddings (count, DIM) around common centres."""
    means = torch.randn(centres, DIM, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    which = torch.randint(centres, (count,), generator=generator)
    return F.normalize(means[which] + 1.6 * torch.randn(count, DIM, generator=generator), dim=-1)


def queries_for(count: int, number: int) -> torch.Tensor:
    return clustered(number, centres=max(1, count // 1000), seed=1_000_000)


def make_index(directory: str, count: int, dtype: torch.dtype) -> dict[str, float]:
    """Write an index as a build does, without the encoder: seconds and CPU seconds of the writing alone."""
    writer = IndexWriter(directory, {"dim": DIM, "dtype": str(dtype).removeprefix("torch."), "model": None,
                                     "image_root": None, "may_read_files": False})  # fmt: skip
    seconds = cpu_seconds = 0.0
    for seed, first in enumerate(range(0, count, SHARD_ROWS)):
        rows = clustered(min(SHARD_ROWS, count - first), max(1, count // 1000), seed).to(dtype)
        numbers = range(first, first + len(rows))
        start, cpu_start = time.perf_counter(), time.process_time()
        ids = [f"{number:010d}.jpg" for number in numbers]
        writer.add(rows, ids, [{"license": LICENSES[n % 4], "number": n * 7919 % 1000} for n in numbers])
        seconds, cpu_seconds = seconds + time.perf_counter() - start, cpu_seconds + time.process_time() - cpu_start
    start, cpu_start = time.perf_counter(), time.process_time()
    writer.finish()
    seconds, cpu_seconds = seconds + time.perf_counter() - start, cpu_seconds + time.process_time() - cpu_start
    sizes = {path.suffix: 0 for path in Path(directory).iterdir()}
    for path in Path(directory).iterdir():
        sizes[path.suffix] += path.stat().st_size
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "row_bytes": sizes[".safetensors"],
            "entry_bytes": sizes[".sqlite"]}  # fmt: skip


def in_turns(steps: dict[str, Callable[[], Any]], most_seconds: float) -> dict[str, dict[str, float]]:
    """Medians of the seconds and the CPU seconds of each step, and their rounds; they take turns for `most_seconds`."""
    timings: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    end = time.perf_counter() + most_seconds
    for done in range(MOST_ROUNDS):
        if done >= FEWEST_ROUNDS and time.perf_counter() > end:
            break
        for name, step in steps.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            step()
            timings[name].append((time.perf_counter() - start, time.process_time() - cpu_start))
    found = {}
    for name, pairs in timings.items():
        seconds, cpu_seconds = (statistics.median(column) for column in zip(*pairs, strict=True))
        found[name] = {"seconds": seconds, "cpu_seconds": cpu_seconds, "rounds": len(pairs)}
    return found


def measure_exact(directory: str, count: int, most_seconds: float) -> dict[str, Any]:
    """Opening, exact search beside one product and top-k, and beside a sum, of the same mapped memory, and filters."""
    before, start = memory_counter("RssAnon"), time.perf_counter()
    index = FromageImageIndex.from_pretrained(directory)
    opened, query = {"seconds": time.perf_counter() - start}, queries_for(count, 1)
    start = time.perf_counter()
    index.search(query, TOP_K)
    opened["first_search_seconds"] = time.perf_counter() - start
    rows = [shard.rows() for shard in index._store.now.shards]

    def product() -> torch.Tensor:
        vector = query[0].to(index.dtype)
        return torch.cat([some @ vector for some in rows]).topk(TOP_K).indices

    def read() -> int:
        return sum(int(some.view(torch.int64).sum()) for some in rows)

    results = {
        "opening": opened,
        "one_query": in_turns({"ours": lambda: index.search(query, TOP_K), "product": product, "read": read},
                              most_seconds),
        "queries": in_turns({"64": lambda: index.search(queries_for(count, 64), TOP_K)}, most_seconds / 2),
        "private_bytes": memory_counter("RssAnon") - before,
        "load": os.getloadavg()[0],
    }  # fmt: skip
    store, filters = index._store, {}
    for name, where in FILTERS.items():
        start = time.perf_counter()
        store.entries.mask(where, count)
        first = time.perf_counter() - start
        timed = in_turns({"mask": lambda where=where: store.entries.mask(where, count),
                          "search": lambda where=where: index.search(query, TOP_K, where=where)},
                         most_seconds / 4)  # fmt: skip
        filters[name] = {"first_seconds": first, **timed}
    return {**results, "filters": filters, "filter_private_bytes": memory_counter("RssAnon") - before}


def measure_faiss(
    directory: str, count: int, factory: str, settings: list[dict[str, int]], training_size: int, most_seconds: float
) -> dict[str, Any]:
    """Building a FAISS backend, its size, and recall and speed by search options."""
    index = FromageImageIndex.from_pretrained(directory)
    queries = queries_for(count, 64)
    exact = [[int(image_id[:10]) for image_id in row] for row in index.search(queries, TOP_K).ids]
    start, cpu_start = time.perf_counter(), time.process_time()
    index.use_backend("faiss", factory=factory, training_size=training_size)
    built = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu_start}
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        file = Path(folder) / "backend"
        index._store.now.backend.save(file, index._store.now, DIM)
        built["bytes"] = file.stat().st_size
    rows = []
    for options in settings:
        index.set_search_options(**options)
        found = [[int(image_id[:10]) for image_id in row] for row in index.search(queries, TOP_K).ids]
        timed = in_turns({"one": lambda: index.search(queries[:1], TOP_K)}, most_seconds / len(settings))["one"]
        rows.append({**options, "recall": recall(found, exact), "one_query": timed})
    return {"factory": factory, "training_size": training_size, "build": built, "searches": rows,
            "load": os.getloadavg()[0]}  # fmt: skip


def measure(
    count: int, dtype: torch.dtype, lists: int, graph: bool, training_size: int, folder: str | None, most_seconds: float
) -> dict[str, Any]:
    """All of one size. `graph` is whether to build HNSW."""
    probes = [nprobe for nprobe in (1, 8, 32) if nprobe <= lists]
    codes = [{"nprobe": nprobe, "k_factor": factor} for nprobe in probes for factor in (1, 10)]
    with tempfile.TemporaryDirectory(dir=folder) as directory:
        result: dict[str, Any] = {"count": count, "dim": DIM, "dtype": str(dtype).removeprefix("torch."),
                                  "build": in_new_process(make_index, directory, count, dtype)}  # fmt: skip
        result.update(in_new_process(measure_exact, directory, count, most_seconds))
        kinds = {f"IVF{lists},{CODES}": codes, **({"HNSW32": [{"k_factor": k} for k in (1, 10)]} if graph else {})}
        result["faiss"] = [
            in_new_process(measure_faiss, directory, count, factory, settings, training_size, most_seconds)
            for factory, settings in (kinds.items() if lists else ())
        ]
    return {**result, **provenance("cpu")}


# ---- tables -------------------------------------------------------------------------------------------------------


def _size(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _time(seconds: float) -> str:
    if seconds >= 100:
        return f"{seconds / 60:.0f} min"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def _both(timed: dict[str, Any]) -> str:
    return ", ".join(_time(timed[name]) for name in ("cpu_seconds", "seconds") if timed[name] is not None)


def _joined(cells: list[list[str]]) -> list[str]:
    """A Markdown table, the first row of which is its head."""
    rows = [f"| {' | '.join(row)} |" for row in cells]
    return [rows[0], "|" + "---|" * len(cells[0]), *rows[1:]]


def exact_table(runs: list[dict[str, Any]]) -> list[str]:
    cells = [["images", "dtype", "rows; ids and metadata", "written in", "first search", "one query",
              "one product and top-k", "reading alone", "64 queries", "memory of its own"]]  # fmt: skip
    for run in runs:
        one, build = run["one_query"], run["build"]
        ours, product, read = (one[name]["cpu_seconds"] for name in ("ours", "product", "read"))
        cells.append([
            f"{run['count']:,}", run["dtype"], f"{_size(build['row_bytes'])}; {_size(build['entry_bytes'])}",
            _both(build), _time(run["opening"]["first_search_seconds"]), _both(one["ours"]),
            f"{_both(one['product'])} ({ours / product:.2f})", f"{_both(one['read'])} ({ours / read:.2f})",
            _both(run["queries"]["64"]), _size(run["private_bytes"]),
        ])  # fmt: skip
    return _joined(cells)


def filter_table(runs: list[dict[str, Any]]) -> list[str]:
    cells = [
        ["images", "dtype", "filter leaves", "first, reading the metadata", "later: the filter alone", "with search"]
    ]
    for run in runs:
        for name, row in run["filters"].items():
            cells.append([f"{run['count']:,}", run["dtype"], name, _time(row["first_seconds"]), _both(row["mask"]),
                          _both(row["search"])])  # fmt: skip
    return _joined(cells)


def faiss_table(runs: list[dict[str, Any]]) -> list[str]:
    cells = [["images", "FAISS", "built in", "memory", "options", "recall@10", "one query"]]
    for run in runs:
        for found in run["faiss"]:
            for row in found["searches"]:
                options = ", ".join(f"{name}={row[name]}" for name in ("nprobe", "k_factor") if name in row)
                cells.append([f"{run['count']:,}", f"`{found['factory']}`", _both(found["build"]),
                              _size(found["build"]["bytes"]), options, f"{row['recall']:.3f}",
                              _both(row["one_query"])])  # fmt: skip
    return _joined(cells)


def paper_table(runs: list[dict[str, Any]]) -> list[str]:
    """What larger indexes would take, from bytes an image and the rate of the largest one that was measured."""
    runs = sorted((run for run in runs if run["dtype"] == "float16"), key=lambda run: run["count"])
    largest = runs[-1]
    row, entries = 2 * DIM, largest["build"]["entry_bytes"] / largest["count"]
    rate = row * largest["count"] / largest["one_query"]["ours"]["cpu_seconds"]
    each = {"HNSW" if "HNSW" in found["factory"] else "IVF and PQ": found["build"]["bytes"] / run["count"]
            for run in runs for found in run["faiss"]}  # fmt: skip
    cells = [["images", "rows in fp16", "ids and metadata", "exact, one query", *(f"{kind} in memory" for kind in each),
              "take"]]  # fmt: skip
    for count, backend in _ON_PAPER.items():
        cells.append([f"{count:,}", _size(row * count), _size(entries * count), _time(row * count / rate),
                      *(_size(size * count) for size in each.values()), backend])  # fmt: skip
    sizes = "".join(f", {size:,.0f} of {kind}" for kind, size in each.items())
    note = (
        f"On paper: {row} bytes of rows, {entries:.0f} of ids and metadata{sizes} an image; and the "
        f"{rate / 1e9:.1f} GB/s of CPU time at which one thread searched {largest['count']:,} images, if all rows are "
        "in memory: from a disk, it is the disk's rate."
    )
    return [*_joined(cells), "", note]


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    runs = sorted(results["runs"], key=lambda run: (run["count"], run["dtype"]))
    last, loads = runs[-1], [run["load"] for run in runs]
    note = (
        f"Width {DIM}, made-up clusters, {last['hardware']}, {last['threads']} thread(s), torch "
        f"{last['versions']['torch']}. Times are medians, in turns, of CPU time and by the clock; in brackets how many "
        f"times as much CPU time ours takes. On this machine {min(loads):.0f} to {max(loads):.0f} processes were "
        "running or waiting, so the clock tells little. HNSW was built for the sizes listed alone. Opening takes "
        f"{max(run['opening']['seconds'] for run in runs) * 1e3:.0f} ms at most; the first search checks every file."
    )
    parts = [exact_table(runs), filter_table(runs), faiss_table(runs), [note], paper_table(runs)]
    return "\n\n".join("\n".join(part) for part in parts)
