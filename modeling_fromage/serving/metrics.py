"""What Prometheus sees of a server."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_ROUTES = ("/v1/chat/completions", "/v1/embeddings", "/v1/images/search", "/v1/models")
_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """Counters of one server, apart from those of others in the same process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = Counter(
            "fromage_requests", "Requests by route and HTTP status (499: the client went away).", ["route", "status"],
            registry=self.registry,
        )  # fmt: skip
        self.seconds = Histogram(
            "fromage_request_seconds", "Time of whole requests.", ["route"], buckets=_SECONDS, registry=self.registry
        )
        self.first_seconds = Histogram(
            "fromage_first_token_seconds", "Time from a request for an answer to its first part.", buckets=_SECONDS,
            registry=self.registry,
        )  # fmt: skip
        self.tokens = Counter("fromage_tokens", "Tokens read and written.", ["kind"], registry=self.registry)
        self.images = Counter("fromage_images_shown", "Images in answers.", registry=self.registry)
        self.running = Gauge("fromage_requests_running", "Requests that are being answered.", registry=self.registry)
        self.connections = Gauge("fromage_connections", "Open connections.", registry=self.registry)

    def count_request(self, path: str, status: int, seconds: float) -> None:
        route = path if path in _ROUTES else "/v1/images/{id}" if path.startswith("/v1/images/") else "other"
        self.requests.labels(route, str(status or 499)).inc()
        self.seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self.registry)


__all__ = ["CONTENT_TYPE", "Metrics"]
