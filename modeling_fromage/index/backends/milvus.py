"""A collection of Milvus: the only code that talks to `pymilvus`, to a file of Milvus Lite and to a cluster alike."""

import contextlib
import dataclasses
import hashlib
import inspect
import json
import logging
import threading
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import torch

from ..columns import comparable
from ..values import as_wanted, is_utf8

if TYPE_CHECKING:
    from pymilvus import MilvusClient

KEY, ID, POSITION, EMBEDDING, METADATA, FACTS = "key", "id", "position", "embedding", "metadata", "facts"
MOST_HITS = 16_384  # that Milvus returns a query
MOST_FACTS = 4096  # that an array of Milvus holds
LONGEST_TEXT = 65_535  # bytes of a text or of JSON
_KEYS_AT_A_TIME = 1000  # in one expression
_BATCH_BYTES = 1 << 23  # of one insertion; servers refuse messages of 64 MB
_TIMEOUT = 120.0  # seconds
_NEVER = (1 << 31) - 1  # milliseconds, for gRPC
# The index types that Milvus Lite has too, with the names of their `index_params` and `search_params`. Others and other
# names it overlooks, and searches exactly, or as if nothing were given.
_KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "FLAT": ((), ()), "HNSW": (("M", "efConstruction"), ("ef",)), "IVF_FLAT": (("nlist",), ("nprobe",)),
    "IVF_SQ8": (("nlist",), ("nprobe",)),
}  # fmt: skip
_DIGEST_BYTES = 16


class MilvusIndexError(OSError):
    """Milvus cannot be reached, refused something, or holds what no index of ours does."""


@dataclasses.dataclass(frozen=True)
class MilvusOptions:
    """The options of `use_backend("milvus", ...)`.

    Attributes:
        uri: A file whose name ends in ".db", for Milvus Lite, or the address of a server, such as
            "https://host:19530" or "https://host:19530/database".
        collection: Name of the collection.
        index_type: `"FLAT"` is exact; `"HNSW"`, `"IVF_FLAT"` and `"IVF_SQ8"` are approximate. A server may have others.
        index_params: How that index is built: `{"M": 16, "efConstruction": 200}` for HNSW, `{"nlist": 1024}` for IVF.
        search_params: How it is searched: `{"ef": 64}` for HNSW, `{"nprobe": 16}` for IVF.
        token: Of a server that asks for one, such as "user:password". It is never saved.
    """

    uri: str
    collection: str = "fromage"
    index_type: str = "FLAT"
    index_params: dict[str, Any] = dataclasses.field(default_factory=dict)
    search_params: dict[str, Any] = dataclasses.field(default_factory=dict)
    token: str | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self) -> None:
        kinds: dict[str, Any] = {"uri": str, "collection": str, "index_type": str, "index_params": dict,
                                 "search_params": dict, "token": (str, type(None))}  # fmt: skip
        for name, kind in kinds.items():
            if not isinstance(getattr(self, name), kind):
                raise ValueError(f"The milvus backend's `{name}` is a {kind}, got {type(getattr(self, name))}.")
        known = _KINDS.get(self.index_type)
        for name, allowed in zip(("index_params", "search_params"), known or (), strict=False):
            _check_numbers(name, getattr(self, name), allowed, self.index_type)
        if self.is_file:
            if known is None:
                raise ValueError(f"A file of Milvus Lite has the index types {[*_KINDS]}, got {self.index_type!r}.")
            return
        parts = urlsplit(self.uri)
        if parts.scheme not in ("http", "https", "tcp") or not parts.hostname:
            raise ValueError(f"`uri` is a file whose name ends in .db, or http(s)://host:port, got {self.uri!r}.")
        if parts.username or parts.password:
            raise ValueError("`uri` is saved with the index, so it may hold no password. Give `token='user:password'`.")

    @classmethod
    def of(cls, options: dict[str, Any]) -> "MilvusOptions":
        """Options as a caller gave them; the path of a file is made absolute.

        Raises:
            ValueError: `uri` is missing, or an option is not known or not of its kind.
        """
        allowed = list(inspect.signature(cls).parameters)
        if unknown := sorted(set(options) - set(allowed)):
            raise ValueError(f"The milvus backend takes the options {allowed}, got {unknown}.")
        if "uri" not in options:
            raise ValueError("The milvus backend needs `uri`: a file that ends in .db, or the address of a server.")
        uri = str(options["uri"])
        return cls(**{**options, "uri": str(Path(uri).resolve()) if is_file(uri) else uri})

    @property
    def is_file(self) -> bool:
        return is_file(self.uri)


def is_file(uri: str) -> bool:
    """Whether an address is a file, for Milvus Lite."""
    return uri.endswith(".db") and "://" not in uri


def _check_numbers(name: str, params: dict[str, Any], allowed: Sequence[str], kind: str) -> None:
    if unknown := sorted(set(params) - set(allowed)):
        raise ValueError(f"`{name}` of {kind} are {list(allowed)}, got {unknown}.")
    for key, value in params.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"`{key}` of {kind} is a whole number of at least 1, got {value!r}.")


class MilvusCollection:
    """One collection: rows by a key, which is a digest of the image's id, so that nothing in an expression needs
    quoting.

    Milvus compares JSON otherwise than `where` does: for it, `null` is as if it were not there, 1 is not `True`, and
    names may hold no quotes. So each value of the metadata is also stored as a digest, in the array `facts`, and a
    filter is an expression of digests. Other programs find the metadata as JSON.

    Raises:
        ImportError: `pymilvus` (or, for a file, `milvus-lite`) is not installed.
    """

    def __init__(self, options: MilvusOptions):
        for module, needed in {"pymilvus": True, "milvus_lite": options.is_file}.items():
            if needed and find_spec(module) is None:
                raise ImportError(f"backend='milvus' needs {module}: pip install 'modeling-fromage[milvus]'.")
        self.options = options
        self._client: MilvusClient | None = None
        self._connecting = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"options": dataclasses.replace(self.options, token=None)}  # nor is it pickled

    def __setstate__(self, state: dict[str, Any]) -> None:
        MilvusCollection.__init__(self, state["options"])

    def error(self, detail: str) -> MilvusIndexError:
        return MilvusIndexError(f"Milvus at {self.options.uri}, collection {self.options.collection!r}: {detail}")

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        import grpc
        from pymilvus import MilvusException

        try:
            yield
        except (MilvusException, grpc.RpcError) as error:
            raise self.error(str(error)) from error

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        client = self.client
        with self._errors():
            return getattr(client, method)(*args, timeout=_TIMEOUT, **kwargs)

    @property
    def client(self) -> "MilvusClient":
        with self._connecting:
            if self._client is None:
                self._client = self._connect()
            return self._client

    def _connect(self) -> "MilvusClient":
        from pymilvus import MilvusClient

        if self.options.is_file:
            Path(self.options.uri).parent.mkdir(parents=True, exist_ok=True)
            # It has no timestamps, of which the client would warn at each iteration.
            logging.getLogger("pymilvus.client.iterator.query_iterator").setLevel(logging.ERROR)
            hint = "one process at a time opens a file of Milvus Lite; is another one using it?"
            options = {"grpc.keepalive_time_ms": _NEVER}  # it hangs up on a client that asks whether it is there
        else:
            options = {}
            hint = "is the server there, and does it want another `token`?"
        with self._errors():
            try:
                return MilvusClient(self.options.uri, token=self.options.token or "", timeout=_TIMEOUT,
                                    grpc_options=options)  # fmt: skip
            except Exception as error:  # noqa: BLE001 - whatever the client or the file's reader raises
                raise self.error(f"it does not open ({error}): {hint}") from error

    # ---- the collection as a whole --------------------------------------------------------------------------------

    def exists(self) -> bool:
        return bool(self._call("has_collection", self.options.collection))

    def create(self, dim: int) -> None:
        """Create it, empty. Every search and query sees all that was acknowledged before."""
        from pymilvus import DataType, MilvusClient

        schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field(KEY, DataType.VARCHAR, is_primary=True, max_length=2 * _DIGEST_BYTES)
        schema.add_field(ID, DataType.VARCHAR, max_length=LONGEST_TEXT)
        schema.add_field(POSITION, DataType.INT64)
        schema.add_field(EMBEDDING, DataType.FLOAT_VECTOR, dim=dim)
        schema.add_field(METADATA, DataType.JSON)
        schema.add_field(FACTS, DataType.ARRAY, element_type=DataType.VARCHAR, max_length=2 * _DIGEST_BYTES,
                         max_capacity=MOST_FACTS)  # fmt: skip
        indexes = MilvusClient.prepare_index_params()
        kind, params = self.options.index_type, self.options.index_params
        if self.options.is_file:  # Milvus Lite overlooks parameters that are not one level deeper
            params = {"params": params}
        indexes.add_index(EMBEDDING, index_type=kind, metric_type="IP", params=params)
        if not self.options.is_file:  # which has none for arrays
            indexes.add_index(FACTS, index_type="INVERTED")
        self._call("create_collection", self.options.collection, schema=schema, index_params=indexes,
                   consistency_level="Strong")  # fmt: skip

    def open(self, dim: int) -> None:
        """Make an existing collection ready for searches.

        Raises:
            MilvusIndexError: It is not there, or is no index of embeddings of width `dim`.
        """
        if self.options.is_file and not Path(self.options.uri).exists():  # Milvus Lite would create it
            raise self.error("there is no such file")
        if not self.exists():
            raise self.error("there is no such collection")
        described = {
            field["name"]: field for field in self._call("describe_collection", self.options.collection)["fields"]
        }
        width = described.get(EMBEDDING, {}).get("params", {}).get("dim")
        if not {KEY, ID, POSITION, METADATA, FACTS} <= described.keys() or int(width or 0) != dim:
            raise self.error(f"it has the fields {sorted(described)} and embeddings of width {width}, not {dim}")
        self._call("load_collection", self.options.collection)

    def drop(self) -> None:
        self._call("drop_collection", self.options.collection)

    def rename(self, name: str) -> None:
        """Give it another name, under which this object then knows it."""
        self._call("rename_collection", self.options.collection, name)
        self.options = dataclasses.replace(self.options, collection=name)
        self._call("load_collection", name)

    def flush(self) -> None:
        """Turn what was added into segments, which are searched faster. It is safe without."""
        self._call("flush", self.options.collection)

    # ---- rows -----------------------------------------------------------------------------------------------------

    def count(self) -> int:
        return int(self._call("query", self.options.collection, filter="", output_fields=["count(*)"])[0]["count(*)"])

    def put(self, rows: Iterable[dict[str, Any]], done: list[str], replace: bool = False) -> None:
        """Insert rows of [`make_row`], some at a time, and note the keys of each that was acknowledged, or may have
        been, in `done`."""
        batch: list[dict[str, Any]] = []
        size = 0
        for row in rows:
            batch.append(row)
            size += 4 * len(row[EMBEDDING]) + len(row[ID]) + len(row[FACTS]) * 40 + len(json.dumps(row[METADATA]))
            if size > _BATCH_BYTES:
                self._put(batch, done, replace)
                batch, size = [], 0
        if batch:
            self._put(batch, done, replace)

    def _put(self, batch: list[dict[str, Any]], done: list[str], replace: bool) -> None:
        done += [row[KEY] for row in batch]
        self._call("upsert" if replace else "insert", self.options.collection, batch)

    def delete(self, keys: Sequence[str]) -> None:
        for some in _pieces(keys):
            self._call("delete", self.options.collection, filter=f"{KEY} in {json.dumps(some)}")

    def rows(self, keys: Sequence[str], fields: Sequence[str]) -> dict[str, dict[str, Any]]:
        """The `fields` of the rows that are there, by key."""
        found: dict[str, dict[str, Any]] = {}
        for some in _pieces(keys):
            expression = f"{KEY} in {json.dumps(some)}"
            answer = self._call("query", self.options.collection, filter=expression, output_fields=[KEY, *fields])
            found.update({row[KEY]: row for row in answer})
        return found

    def positions(self) -> Iterator[list[tuple[int, str]]]:
        """Position and key of all rows, some at a time, in no order."""
        iterator = self._call("query_iterator", self.options.collection, batch_size=10_000,
                              output_fields=[KEY, POSITION])  # fmt: skip
        while True:
            with self._errors():
                rows = iterator.next()
            if not rows:
                break
            yield [(row[POSITION], row[KEY]) for row in rows]
        iterator.close()

    def search(self, queries: torch.Tensor, limit: int, expression: str) -> list[list[dict[str, Any]]]:
        """Up to `limit` rows for each query (Q, q), all fields of them."""
        params = dict(self.options.search_params)
        if "ef" in params:  # a server refuses one that is less
            params["ef"] = max(params["ef"], limit)
        found = self._call(
            "search", self.options.collection, queries.numpy(), filter=expression, limit=limit, anns_field=EMBEDDING,
            search_params={"metric_type": "IP", "params": params}, output_fields=[ID, POSITION, METADATA, EMBEDDING],
        )  # fmt: skip
        return [[hit["entity"] for hit in hits] for hits in found]


def _pieces(keys: Sequence[str]) -> Iterator[list[str]]:
    for start in range(0, len(keys), _KEYS_AT_A_TIME):
        yield list(keys[start : start + _KEYS_AT_A_TIME])


def key_of(image_id: str) -> str:
    """The primary key of an image."""
    return hashlib.blake2b(image_id.encode(), digest_size=_DIGEST_BYTES).hexdigest()


def make_row(image_id: str, position: int, embedding: torch.Tensor, metadata: str) -> dict[str, Any]:
    """A row of the collection, from an embedding (q,) and metadata as JSON.

    Raises:
        ValueError: Milvus cannot hold it.
    """
    if len(image_id.encode()) > LONGEST_TEXT or len(metadata.encode()) > LONGEST_TEXT:
        raise ValueError(f"Milvus holds ids and metadata of up to {LONGEST_TEXT:,} bytes; {image_id[:100]!r} has more.")
    values = json.loads(metadata)
    _check_storable(values, image_id)
    facts = sorted({fact for name, value in values.items() for fact in _facts(name, value)})
    if len(facts) > MOST_FACTS:
        raise ValueError(
            f"Milvus holds up to {MOST_FACTS:,} values of an image's metadata; {image_id!r} has {len(facts):,}."
        )
    return {KEY: key_of(image_id), ID: image_id, POSITION: position, EMBEDDING: embedding.float().numpy(),
            METADATA: values, FACTS: facts}  # fmt: skip


def _check_storable(value: Any, image_id: str) -> None:
    """Raise a `ValueError` if the JSON of Milvus has no such value."""
    if isinstance(value, (dict, list)):
        for each in [*value, *value.values()] if isinstance(value, dict) else value:
            _check_storable(each, image_id)
    elif isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
        raise ValueError(f"The metadata of {image_id!r} has the number {value}; Milvus has whole numbers of 64 bits.")
    elif isinstance(value, str) and not is_utf8(value):
        raise ValueError(
            f"The metadata of {image_id!r} has the text {value!r}, which is no Unicode; Milvus cannot hold it."
        )


def _facts(name: str, value: Any) -> Iterator[str]:
    """Digests of what a filter finds a value by: itself or, of a list, its items."""
    for item in value if isinstance(value, list) else [value]:
        if not isinstance(item, (dict, list)):
            yield _digest(name, item)


def _digest(name: str, value: Any) -> str:
    value = comparable(value)
    if isinstance(value, bool) or (isinstance(value, float) and value.is_integer()):
        value = int(value)  # True, 1 and 1.0 are equal
    return hashlib.blake2b(json.dumps([name, value]).encode(), digest_size=_DIGEST_BYTES).hexdigest()


def filter_expression(where: dict[str, Any] | None, excluded: Iterable[str]) -> str | None:
    """The filter of `where` without the excluded ids as an expression of Milvus, "" for all; `None` if nothing can pass
    it.

    Raises:
        ValueError: `where` is not a dict of texts, numbers, booleans and `None`.
    """
    clauses = []
    for name, values in as_wanted(where or {}).items():
        if not values:
            return None
        clauses.append(f"array_contains_any({FACTS}, {json.dumps(sorted({_digest(name, value) for value in values}))})")
    if keys := sorted({key_of(image_id) for image_id in excluded}):
        clauses.append(f"{KEY} not in {json.dumps(keys)}")
    return " and ".join(clauses)
