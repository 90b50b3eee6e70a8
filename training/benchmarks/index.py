"""Benchmark of the image index against FAISS: opening, exact search and IVF, over synthetic embeddings in 1,000
overlapping clusters; and of a build from JPEG files against the encoder alone."""

import statistics
import tempfile
import time
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import CLIPImageProcessorPil

from modeling_fromage import FromageImageIndex

from ..publishing.provenance import provenance
from .presets import PRESETS, join, make_backbones
from .timing import in_new_process, memory_counter

TOP_K, DIM = 10, 256


def clustered(count: int, seed: int, centres: int = 1000) -> torch.Tensor:
    """Unit-norm embeddings (count, DIM) around common centres."""
    means = torch.randn(centres, DIM, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    which = torch.randint(centres, (count,), generator=generator)
    return F.normalize(means[which] + 1.6 * torch.randn(count, DIM, generator=generator), dim=-1)


def make_index(count: int, directory: str) -> None:
    ids = [f"{i:09d}.jpg" for i in range(count)]
    metadata = [{"url": f"https://example.org/images/{name}", "caption": f"picture number {name}"} for name in ids]
    FromageImageIndex(clustered(count, 1), ids, metadata).save_pretrained(directory)


def measure_opening(directory: str) -> dict[str, float]:
    """Seconds and resident bytes that opening an index takes, after imports. Call it in a process of its own."""
    before, start = memory_counter("VmRSS"), time.perf_counter()
    index = FromageImageIndex.from_pretrained(directory)
    count = len(index)
    opened = {"seconds": time.perf_counter() - start, "bytes": memory_counter("VmRSS") - before, "count": count}
    start = time.perf_counter()
    index.search(clustered(1, 2), TOP_K)
    return {**opened, "first_search_seconds": time.perf_counter() - start}


def recall(found: list[list[int]], exact: list[list[int]]) -> float:
    return sum(len(set(a) & set(b)) for a, b in zip(found, exact, strict=True)) / sum(map(len, exact))


def measure_search(index: FromageImageIndex, rounds: int) -> dict[str, Any]:
    """Time exact search and FAISS's flat index, taking turns."""
    import faiss  # here: tables of stored results are rendered without it

    flat = faiss.IndexFlatIP(DIM)
    flat.add(index.embeds.float().numpy())
    results = {}
    for count in (1, 8, 64):
        queries = clustered(count, 3)
        index.search(queries, TOP_K)  # warm-up: maps and checks the files
        seconds: dict[str, list[float]] = {"ours": [], "faiss": []}
        for _ in range(rounds):
            start = time.perf_counter()
            ids, _, _ = index.search(queries, TOP_K)
            seconds["ours"].append(time.perf_counter() - start)
            start = time.perf_counter()
            exact = flat.search(queries.numpy(), TOP_K)[1].tolist()
            seconds["faiss"].append(time.perf_counter() - start)
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        found = [[int(image_id[:9]) for image_id in row] for row in ids]
        results[str(count)] = {
            **medians, "ratio": medians["ours"] / medians["faiss"], "recall": recall(found, exact), "all": seconds
        }  # fmt: skip
    return results


def measure_ivf(index: FromageImageIndex, lists: int, rounds: int) -> list[dict[str, float]]:
    """Recall and speed of an IVF index, by the number of lists that a search visits."""
    queries = clustered(64, 3)
    exact = [[int(image_id[:9]) for image_id in row] for row in index.search(queries, TOP_K)[0]]
    start = time.perf_counter()
    index.use_backend("faiss", factory=f"IVF{lists},Flat", nprobe=1)
    built = time.perf_counter() - start
    rows = []
    for nprobe in (1, 4, 16, 64):
        index.set_search_options(nprobe=min(nprobe, lists))
        seconds = []
        for _ in range(rounds):
            start = time.perf_counter()
            ids, _, _ = index.search(queries, TOP_K)
            seconds.append(time.perf_counter() - start)
        found = [[int(image_id[:9]) for image_id in row] for row in ids]
        median = statistics.median(seconds) / len(queries)
        rows.append({"lists": lists, "nprobe": nprobe, "recall": recall(found, exact), "seconds_per_query": median,
                     "build_seconds": built})  # fmt: skip
    index.use_backend("flat")
    return rows


def measure_build(preset_name: str, count: int, rounds: int, batch_size: int = 32) -> dict[str, float]:
    """Images per second of a build from JPEG files, and of the encoder alone on prepared pixels."""
    preset = PRESETS[preset_name]
    model = join(preset, *make_backbones(preset, "cpu"))
    size = preset.vision["image_size"]

    class Processor:
        image_processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})

    with tempfile.TemporaryDirectory() as folder:
        generator = np.random.default_rng(0)
        for i in range(count):
            small = generator.integers(0, 255, (12, 16, 3), dtype=np.uint8)
            Image.fromarray(small).resize((500, 375), Image.Resampling.BICUBIC).save(f"{folder}/{i:04d}.jpg")
        pixels = torch.rand(batch_size, 3, size, size)
        bare, built = [], []
        for _ in range(rounds):
            start = time.perf_counter()
            for _ in range(count // batch_size):
                with torch.no_grad():
                    model.get_image_embeds(pixels)
            bare.append(count // batch_size * batch_size / (time.perf_counter() - start))
            start = time.perf_counter()
            FromageImageIndex.build(model, Processor, folder, batch_size=batch_size, show_progress=False)
            built.append(count / (time.perf_counter() - start))
    rates = {"encoder": statistics.median(bare), "build": statistics.median(built)}
    return {**rates, "ratio": rates["build"] / rates["encoder"], "all": {"encoder": bare, "build": built}}


def measure(count: int, preset_name: str, lists: int, images: int, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        make_index(count, folder)
        opening = in_new_process(measure_opening, folder)
        index = FromageImageIndex.from_pretrained(folder)
        results = {
            "count": count,
            "dim": DIM,
            "top_k": TOP_K,
            "opening": opening,
            "search": measure_search(index, rounds),
            "ivf": measure_ivf(index, lists, rounds),
        }
    return {
        **results,
        "build": {"preset": preset_name, **measure_build(preset_name, images, rounds=3)},
        "faiss": version("faiss-cpu"),
        **provenance("cpu"),
    }


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    opening, build = results["opening"], results["build"]
    rows = ["| queries at once | FAISS, flat | ours, exact | ours / FAISS |", "|---|---|---|---|"]
    for count, row in results["search"].items():
        rows.append(f"| {count} | {row['faiss'] * 1e3:.0f} ms | {row['ours'] * 1e3:.0f} ms | {row['ratio']:.2f} |")
    rows += ["", "| FAISS IVF, lists visited | recall@10 | ms a query, 64 at once |", "|---|---|---|"]
    for row in results["ivf"]:
        rows.append(
            f"| {row['nprobe']} of {row['lists']} | {row['recall']:.3f} | {row['seconds_per_query'] * 1e3:.2f} |"
        )
    exact = min(row["recall"] for row in results["search"].values())
    milliseconds, megabytes = opening["seconds"] * 1e3, opening["bytes"] / 1e6
    note = (
        f"{results['count']:,} x {results['dim']} in fp32, made-up clusters, {results['hardware']}, FAISS "
        f"{results['faiss']}, medians; the exact search's recall is {exact:.3f}. Opening the index takes "
        f"{milliseconds:.1f} ms and {megabytes:.1f} MB of memory; the first search, which checks every file, "
        f"{opening['first_search_seconds']:.2f} s. A build from JPEG files runs at {build['ratio']:.2f} of the bare "
        f"encoder's rate ({build['build']:.1f} and {build['encoder']:.1f} images a second)."
    )
    return "\n".join([*rows, "", note])
