"""An archive from the store onto a running TorchServe."""

from pathlib import Path

from tools.archive.companions import remove_with_companions
from tools.errors import ToolError
from tools.serve.rollout import Address, Report, alone, file_name, roll_out
from tools.store.manifest import Manifest
from tools.store.promote import check
from tools.store.store import Store
from tools.store.transfer import is_there
from tools.store.trust import check_signature


def deploy(store: Store, manifest: Manifest, address: Address, store_dir: Path, report: Report) -> None:
    """Have the server serve what was pushed; see `roll_out`. store_dir: its model store, which gets a new file.

    Raises ToolError or BadArchive; the server then serves what it did, and the new file is gone.
    """
    if manifest.kind != "archives":
        raise ToolError(f"{manifest} is no archive; `marina archive build` makes one")
    file = manifest.files[0]
    with alone(store_dir):
        name = file_name(manifest.name, manifest.version or "", file.sha256)
        # It may lie there already under another name, and be served from it.
        path = next((each for each in store_dir.glob("*.mar") if is_there(file, each)), store_dir / name)
        was_there = path.exists()
        try:
            check(store, manifest, path)
            check_signature(store, path)
            if not roll_out(address, path, report):
                if not was_there:
                    raise ToolError(
                        f"{manifest.name} {manifest.version} is served already, from another folder than {store_dir};"
                        " give the server's own model store with --store-dir"
                    )
                report(f"{manifest.name} {manifest.version} is served already")
        except BaseException:
            if not was_there:
                remove_with_companions(path)
            raise
