"""What lies beside an archive and goes where it goes: its signature and its bill of materials."""

from pathlib import Path

SIGNATURE = ".sig.json"
SBOM = ".cdx.json"


def beside(archive: Path, suffix: str) -> Path:
    """Where it lies, or would."""
    return archive.with_name(archive.name + suffix)


def companions(archive: Path) -> list[Path]:
    """Those that are there."""
    return [path for path in (beside(archive, SIGNATURE), beside(archive, SBOM)) if path.exists()]


def remove_with_companions(archive: Path) -> None:
    for path in (*companions(archive), archive):
        path.unlink(missing_ok=True)
