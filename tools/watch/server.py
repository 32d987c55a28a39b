"""What a running server has counted in the buckets of a baseline, as its metrics tell it."""

import time
from collections import defaultdict

from handlers.baseline import Baseline
from handlers.metrics import WATCHED, plain
from tools.errors import ToolError
from tools.watch.drift import Counts

TIMEOUT_S = 10


def watched(url: str, model: str, version: str, baseline: Baseline, seconds: float) -> Counts:
    """Of one version of a model: since the server started, or in the seconds to come where these are not 0.

    Raises ToolError when there is no server, or when it tells nothing of this archive's baseline.
    """
    before = _look(url, model, version, baseline) if seconds else {}
    time.sleep(seconds)
    now = _look(url, model, version, baseline)
    if any(now[name][bucket] < count for name, each in before.items() for bucket, count in each.items()):
        raise ToolError(f"{url} counts from 0 again: the server was started anew meanwhile; ask once more")
    return {
        name: {bucket: count - before.get(name, {}).get(bucket, 0) for bucket, count in each.items()}
        for name, each in now.items()
    }


def _look(url: str, model: str, version: str, baseline: Baseline) -> dict[str, dict[str, float]]:
    import httpx
    from prometheus_client.parser import text_string_to_metric_families

    try:
        answer = httpx.get(url, timeout=TIMEOUT_S)
        answer.raise_for_status()
        families = list(text_string_to_metric_families(answer.text))
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ToolError(f"{url} gives no metrics ({error}); is it what `marina serve --metrics-port` shows?") from error
    except ValueError as error:
        raise ToolError(f"{url} gives no metrics in Prometheus' form ({error}); is the path /metrics?") from error
    found: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for sample in (sample for family in families for sample in family.samples):
        labels = sample.labels
        # A client adds `_total` to the names of counters, TorchServe does not.
        if sample.name.removesuffix("_total") == WATCHED and (labels["model"], labels["version"]) == (
            plain(model),
            plain(version),
        ):
            found[labels["quantity"]][labels["bucket"]] += sample.value
    if not found:
        raise ToolError(
            f"{url} tells nothing of {model} {version} with a baseline; does this server serve the archive?"
        )
    return _in_buckets(url, baseline, found)


def _in_buckets(url: str, baseline: Baseline, found: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """By the buckets as the baseline calls them. Raises ToolError for those of another."""
    told = {name: {plain(bucket) for bucket in known.buckets} for name, known in baseline.quantities.items()}
    if told != {name: set(each) for name, each in found.items()}:
        raise ToolError(f"{url} counts by another baseline; compare with the very archive that is served")
    return {
        name: {bucket: found[name][plain(bucket)] for bucket in known.buckets}
        for name, known in baseline.quantities.items()
    }
