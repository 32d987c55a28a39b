"""The secrets of compose.yaml: made at the first start, kept at every later one.

    make_secrets.py         before all other services: makes what they sign in with, and gives each its part as files
    make_secrets.py show    what people sign in with

All of them stand in one file that only root reads. The others are made of it at every start: mode 0600, each owned by
the user that its service runs as.
"""

import argparse
import json
import os
import secrets
import sys
from pathlib import Path

from tools.gateway.auth import new_key

FOLDER = Path("/secrets")
ALL = "all.json"
# The user ids of compose.yaml.
MARINA, S3, PROMETHEUS, GRAFANA, LABEL_STUDIO = 10001, 1000, 65534, 472, 1001
LABEL_STUDIO_USER = "marina@localhost"

SHOWN = """\
Gateway       http://127.0.0.1:8000/docs   Authorization: Bearer {gateway_key}
Grafana       http://127.0.0.1:3000        admin, {grafana_password}
Label Studio  http://127.0.0.1:8085        {label_studio_user}, {label_studio_password}
              API token                    {label_studio_token}
S3            http://127.0.0.1:9000        bucket marina; for `marina store`:
export MARINA_STORE=s3://marina AWS_ENDPOINT_URL=http://127.0.0.1:9000
export AWS_ACCESS_KEY_ID={s3_access_key} AWS_SECRET_ACCESS_KEY={s3_secret_key}
"""


def fresh() -> dict[str, str]:
    """All of them, anew."""
    gateway_key, gateway_line = new_key("user")
    prometheus_key, prometheus_line = new_key("prometheus")
    return {
        "gateway_key": gateway_key,
        "prometheus_key": prometheus_key,
        "gateway_lines": f"{gateway_line}\n{prometheus_line}\n",
        "s3_access_key": secrets.token_hex(10),
        "s3_secret_key": secrets.token_hex(20),
        "grafana_password": secrets.token_urlsafe(18),
        "grafana_secret_key": secrets.token_urlsafe(32),
        "label_studio_password": secrets.token_urlsafe(18),
        # As long as Label Studio's column.
        "label_studio_token": secrets.token_hex(20),
    }


def files_of(known: dict[str, str]) -> dict[str, tuple[int, str]]:
    """Owner and content of each file that a service reads."""
    identity = {
        "name": "marina",
        "credentials": [{"accessKey": known["s3_access_key"], "secretKey": known["s3_secret_key"]}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    profile = (
        f"[default]\naws_access_key_id = {known['s3_access_key']}\naws_secret_access_key = {known['s3_secret_key']}\n"
    )
    environment = {
        "LABEL_STUDIO_USERNAME": LABEL_STUDIO_USER,
        "LABEL_STUDIO_PASSWORD": known["label_studio_password"],
        "LABEL_STUDIO_USER_TOKEN": known["label_studio_token"],
    }
    return {
        "gateway-keys": (MARINA, known["gateway_lines"]),
        "aws-credentials": (MARINA, profile),
        "label-studio-token": (MARINA, known["label_studio_token"]),
        "s3.json": (S3, json.dumps({"identities": [identity]})),
        "prometheus-key": (PROMETHEUS, known["prometheus_key"]),
        "grafana-password": (GRAFANA, known["grafana_password"]),
        "grafana-secret-key": (GRAFANA, known["grafana_secret_key"]),
        "label-studio.env": (LABEL_STUDIO, "".join(f"export {name}={value}\n" for name, value in environment.items())),
    }


def write(path: Path, owner: int, content: str) -> None:
    """Whole or not at all, and never readable by another."""
    part = path.with_name(f"{path.name}.part")
    # Of a start that was cut off: it may belong to a user that even root must not write for, without capabilities.
    part.unlink(missing_ok=True)
    with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
        os.fchown(file.fileno(), owner, -1)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def make(folder: Path) -> int:
    everything = folder / ALL
    first = not everything.exists()
    if first:
        write(everything, os.geteuid(), json.dumps(fresh()))
    for name, (owner, content) in files_of(json.loads(everything.read_text())).items():
        write(folder / name, owner, content)
    print(f"secrets: {'made' if first else 'kept'}; `docker compose … run --rm secrets show` shows them")
    return 0


def show(folder: Path) -> int:
    everything = folder / ALL
    if not everything.exists():
        print(f"secrets: there are none in {folder} yet; start the services first", file=sys.stderr)
        return 1
    print(SHOWN.format(**json.loads(everything.read_text()), label_studio_user=LABEL_STUDIO_USER), end="")
    return 0


def main(folder: Path = FOLDER) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", nargs="?", choices=["make", "show"], default="make")
    return show(folder) if parser.parse_args().action == "show" else make(folder)


if __name__ == "__main__":
    sys.exit(main())
