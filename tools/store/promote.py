"""Whether a push may be used: it passed its gates, is what was pushed, and this Marina can read it."""

import tempfile
from importlib import metadata
from pathlib import Path

from packaging.version import InvalidVersion, Version

from tools.archive.reader import open_archive
from tools.archive.verify import check_entries
from tools.errors import ToolError
from tools.store.manifest import GATED, Kind, Manifest
from tools.store.store import Store, parallel
from tools.store.tags import Move, Tag
from tools.store.transfer import verify
from tools.store.trust import check_signature

PRODUCTION: Tag = "production"


def promote(store: Store, manifest: Manifest, tag: Tag, why: str | None, force: str | None) -> Move:
    """Move a tag to a push that is fit for it. why: for the history, the gates by default. force: the reason why it
    is, although no evidence says so; checksums, version and signature are never forced.

    Raises ToolError or BadArchive with what is not right.
    """
    lacking = evidence_problem(manifest)
    if lacking and not force:
        raise ToolError(f"{manifest} is not promoted: {lacking}; or give a reason with --force REASON")
    with tempfile.TemporaryDirectory(prefix="marina-") as folder:
        path = Path(folder) / manifest.files[0].path
        check(store, manifest, path)
        if manifest.kind == "archives" and tag == PRODUCTION:
            check_signature(store, path)
    if lacking:
        why = f"forced: {force} ({lacking})"
    elif why is None:
        why = manifest.evidence.line() if manifest.evidence else ""
    return store.tags(manifest.kind, manifest.name).move(tag, manifest, "promote", why)


def roll_back(store: Store, kind: Kind, name: str, tag: Tag, why: str) -> Move:
    """Point a tag at what it pointed at before. Raises ToolError when there is nothing, or for an archive without the
    signature that production wants by now."""

    def is_fit(id: str) -> None:
        manifest = store.find(id, kind)
        with tempfile.TemporaryDirectory(prefix="marina-") as folder:
            path = Path(folder) / manifest.files[0].path
            check(store, manifest, path)
            check_signature(store, path)

    tags = store.tags(kind, name)
    return tags.roll_back(tag, why, is_fit) if kind == "archives" and tag == PRODUCTION else tags.roll_back(tag, why)


def tag(store: Store, manifest: Manifest, tag: Tag, why: str | None) -> Move:
    """Move a tag to a push without asking for evidence; for what has failed its gate, and for production, ToolError."""
    if manifest.kind in GATED:
        if tag == PRODUCTION:
            raise ToolError("production is for what has passed its gate: `marina store promote … --to production`")
        if manifest.evidence and manifest.evidence.failed():
            raise ToolError(f"{manifest} is not tagged: {evidence_problem(manifest)}")
    return store.tags(manifest.kind, manifest.name).move(tag, manifest, "tag", why or "")


def evidence_problem(manifest: Manifest) -> str | None:
    """Why nobody can say that it is good enough; None when its gates are passed, or it is of a kind that has none."""
    if manifest.kind not in GATED:
        return None
    again = "push it again with --evaluation DIR --require FIGURE=NUMBER"
    if manifest.evidence is None:
        return f"it was pushed without an evaluation; {again}"
    if not manifest.evidence.gates:
        return f"it was pushed without a gate; {again}"
    if manifest.evidence.failed():
        return f"it failed its gate: {manifest.evidence.line()}"
    return None


def check(store: Store, manifest: Manifest, path: Path) -> None:
    """See that the store holds what was pushed. An archive is written to `path`.

    Raises ToolError or BadArchive: a checksum differs, or the archive is of a newer Marina.
    """
    if manifest.kind != "archives":
        parallel(lambda file: verify(store.objects, file), manifest.files)
        return
    ours = metadata.version("marina")
    if manifest.marina and _is_newer(manifest.marina, ours):
        raise ToolError(
            f"{manifest} was built by Marina {manifest.marina}, newer than this one ({ours}); upgrade marina"
        )
    store.pull(manifest, path)
    with open_archive(path) as archive:
        built_by_us = archive.settings is not None
    if built_by_us:
        check_entries(path)


def _is_newer(one: str, other: str) -> bool:
    try:
        return Version(one) > Version(other)
    except InvalidVersion:
        return False
