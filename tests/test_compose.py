"""`docker/compose`: that it holds what every container asks for, and that its parts fit each other and Marina."""

import argparse
import asyncio
import json
import os
import re
import runpy
import shlex
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import store_places
import yaml

from tools.gateway.auth import Keys
from tools.gateway.metrics import Figures

DOCKER = Path(__file__).resolve().parent.parent / "docker"
COMPOSE = DOCKER / "compose"
FILES = [COMPOSE / "compose.yaml", COMPOSE / "compose.gpu.yaml"]
DASHBOARD = COMPOSE / "grafana" / "dashboards" / "marina.json"
PINNED = re.compile(r"[\w./-]+:[\w.-]+@sha256:[0-9a-f]{64}")
# Of NVIDIA's dcgm-exporter, from its list of default counters.
DCGM = {"DCGM_FI_DEV_GPU_UTIL", "DCGM_FI_DEV_FB_USED", "DCGM_FI_DEV_FB_FREE", "DCGM_FI_DEV_GPU_TEMP"}

Document = dict[str, Any]

secrets_script = runpy.run_path(str(COMPOSE / "make_secrets.py"))


@cache
def load(path: Path) -> Document:
    """With variables at their defaults."""
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", path.read_text())
    found: Document = yaml.safe_load(text)
    return found


@cache
def services() -> Document:
    """Of the main file, and those that the one for GPUs adds."""
    main, gpu = (load(path)["services"] for path in FILES)
    added = {name: gpu[name] for name in gpu.keys() - main.keys()}
    assert list(added) == ["dcgm-exporter"]
    return main | added


def lasting() -> Document:
    """Without those that do their work and end."""
    found = {name: service for name, service in services().items() if "restart" in service}
    ending = services().keys() - found.keys()
    assert ending == {"secrets", "bucket"}
    # Else `docker compose up --wait` takes their end for a failure.
    assert ending <= {other for service in services().values() for other in service.get("depends_on", {})}
    return found


@pytest.fixture(params=services())
def service(request: pytest.FixtureRequest) -> Document:
    found: Document = services()[request.param]
    return found


def mounts(service: Document) -> Iterator[tuple[str, str, bool]]:
    """Source, target, and whether it can be written."""
    for volume in service.get("volumes", []):
        if isinstance(volume, dict):
            yield volume["source"], volume["target"], not volume.get("read_only", False)
        else:
            source, target, *options = volume.split(":")
            yield source, target, options != ["ro"]


def environment(service: Document) -> dict[str, str]:
    found: dict[str, str] = service.get("environment", {})
    assert all(isinstance(value, str) for value in found.values())
    return found


def test_docker_compose_takes_the_files(tmp_path: Path) -> None:
    main, gpu = FILES
    if shutil.which("docker") and subprocess.run(["docker", "compose", "version"], capture_output=True).returncode == 0:
        command = ["docker", "compose"]
    elif shutil.which("docker-compose"):
        command = ["docker-compose"]
        # Version 1 does not know the name of a project, nor this option of a bind.
        content = yaml.safe_load(main.read_text())
        del content["services"]["serve"]["volumes"][0]["bind"]
        main = tmp_path / "compose.yaml"
        main.write_text(yaml.safe_dump({key: content[key] for key in ("services", "networks", "volumes")}))
    else:
        pytest.skip("FILES NOT CHECKED: no docker compose; only what is asked below")
    done = subprocess.run([*command, "-f", str(main), "-f", str(gpu), "config"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["services"].keys() == services().keys()


def test_keys_are_mounted_where_the_container_looks() -> None:
    (signed,) = load(COMPOSE / "compose.signed.yaml")["services"]["serve"]["volumes"]
    assert signed["source"].startswith("${MARINA_KEYS:?") and signed["read_only"] is True
    assert f'KEYS = Path("{signed["target"]}")' in (DOCKER / "serve.py").read_text()


def test_images_are_pinned_or_built_here(service: Document) -> None:
    if "build" not in service:
        assert PINNED.fullmatch(service["image"])
        return
    assert re.fullmatch(r"marina/(serve|tools):compose", service["image"])
    assert PINNED.fullmatch(service["build"]["args"]["BASE_IMAGE"])
    folder = COMPOSE / service["build"]["context"]
    dockerfile = (folder / service["build"].get("dockerfile", "Dockerfile")).read_text()
    assert all(f"\nARG {name}=" in dockerfile for name in service["build"]["args"])


def test_limits_are_everywhere(service: Document) -> None:
    assert re.fullmatch(r"\d+[mg]", service["mem_limit"])
    assert float(service["cpus"]) > 0 and service["pids_limit"] > 0
    assert all("size=" in tmpfs for tmpfs in service.get("tmpfs", []))
    assert {"max-size", "max-file"} <= service["logging"]["options"].keys()


def test_containers_are_locked_down(service: Document) -> None:
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "pid", "ipc", "devices", "volumes_from"} & service.keys()
    assert service.get("network_mode", "none") == "none"
    assert "docker.sock" not in str(service)


def test_one_service_alone_is_root_and_only_to_give_files_away() -> None:
    for name, service in services().items():
        if name == "secrets":
            assert (service["user"], service["cap_add"], service["network_mode"]) == ("0:0", ["CHOWN"], "none")
        else:
            # dcgm-exporter has no user that NVIDIA names.
            assert name == "dcgm-exporter" or re.fullmatch(r"[1-9]\d*:\d+", service["user"])
            assert "cap_add" not in service


def test_ports_are_open_to_this_machine_alone(service: Document) -> None:
    assert all(re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port) for port in service.get("ports", []))


def test_every_service_that_stays_says_whether_it_is_well() -> None:
    for service in lasting().values():
        check = service["healthcheck"]
        assert check["test"][0] == "CMD" and {"interval", "timeout", "retries", "start_period"} <= check.keys()


def test_services_wait_for_those_that_they_need() -> None:
    found = services()
    for name, service in found.items():
        for other, condition in service.get("depends_on", {}).items():
            ends = "restart" not in found[other]
            assert condition["condition"] == ("service_completed_successfully" if ends else "service_healthy")
        reads = any(source == "secrets" for source, _, _ in mounts(service))
        assert not reads or name == "secrets" or "secrets" in awaited(name, found)


def awaited(name: str, found: Document) -> set[str]:
    """All that is there before a service starts."""
    direct = found[name].get("depends_on", {})
    return {*direct}.union(*(awaited(other, found) for other in direct))


def test_torchserve_is_reached_by_the_gateway_and_prometheus_alone() -> None:
    main = load(FILES[0])
    assert main["networks"]["inference"] == {"internal": True} and main["networks"]["metrics"] == {"internal": True}
    there = {name for name, service in services().items() if "inference" in service.get("networks", [])}
    assert there == {"serve", "gateway", "prometheus"}
    assert main["services"]["serve"]["networks"] == ["inference"] and "ports" not in main["services"]["serve"]


def test_the_gateway_is_the_ml_backend_of_label_studio(made: Path) -> None:
    main = load(FILES[0])
    there = {name for name, service in services().items() if "labelling" in service.get("networks", [])}
    assert there == {"gateway", "label-studio"} and main["networks"]["labelling"] == {"internal": True}
    arguments = shlex.split(main["services"]["gateway"]["command"])
    assert arguments[arguments.index("--label-studio-url") + 1] == "http://label-studio:8080"
    token = made / Path(arguments[arguments.index("--label-studio-token-file") + 1]).name
    assert token.read_text() == json.loads((made / "all.json").read_text())["label_studio_token"]


def test_what_is_mounted_is_there() -> None:
    main = load(FILES[0])
    used = set()
    for service in services().values():
        for source, target, writable in mounts(service):
            assert target.startswith("/")
            if not source.startswith("."):
                used.add(source)
            elif target != "/models":
                assert (COMPOSE / source).exists() and not writable
    assert used == main["volumes"].keys()
    writers = {name for name, each in services().items() if ("secrets", "/secrets", True) in mounts(each)}
    assert writers == {"secrets"}


def test_no_secret_is_in_the_tree_or_in_an_environment() -> None:
    telling = re.compile(r"PASSWORD|SECRET|TOKEN|ACCESS_?KEY", re.IGNORECASE)
    for service in services().values():
        for name, value in environment(service).items():
            known = name.endswith("__FILE") or name == "LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN"
            assert not telling.search(name) or known, name
            assert not name.endswith("__FILE") or value.startswith("/secrets/")
    random = re.compile(r"(?=[\w-]*\d[\w-]*\d)(?=[\w-]*[A-Za-z])[\w-]{16,}|-----BEGIN")
    for path in COMPOSE.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            assert not random.search(re.sub(r"sha256:[0-9a-f]{64}", "", path.read_text())), path


def test_commands_are_commands_of_marina() -> None:
    words = shlex.split(load(FILES[0])["services"]["gateway"]["command"])
    parser = argparse.ArgumentParser()
    import_module("tools.gateway.command").add_arguments(parser)
    args = parser.parse_args(words[1:])
    assert (words[0], args.host, args.port, args.models) == ("gateway", "0.0.0.0", 8000, ["shapes"])
    assert args.backend == "http://serve:8080" and args.keys_file == Path("/secrets/gateway-keys")


def test_gpus_change_what_they_must() -> None:
    main, gpu = (load(path)["services"]["serve"] for path in FILES)
    assert environment(gpu).keys() == environment(main).keys()
    assert environment(gpu)["MARINA_ALLOW_CPU"] == "0" and environment(main)["MARINA_ALLOW_CPU"] == "1"
    assert gpu["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]


# --- secrets


def files_in(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


@pytest.fixture
def made(tmp_path: Path) -> Path:
    if os.geteuid() != 0:
        pytest.skip("SECRETS NOT MADE: only root gives files away")
    run_secrets(tmp_path)
    return tmp_path


def run_secrets(folder: Path, *arguments: str) -> int:
    """The exit code."""
    before, sys.argv = sys.argv, ["make_secrets.py", *arguments]
    try:
        code: int = secrets_script["main"](folder)
    finally:
        sys.argv = before
    return code


def test_secrets_are_for_their_service_alone(made: Path) -> None:
    for path in made.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert {path.stat().st_uid for path in made.iterdir() if path.name == "all.json"} == {0}
    read = set()
    for name, service in services().items():
        told = json.dumps(service)
        for config in (COMPOSE / "prometheus").iterdir():
            told += config.read_text() if name == "prometheus" else ""
        for file in set(re.findall(r"/secrets/([\w.-]+)", told)):
            read.add(file)
            assert (made / file).stat().st_uid == int(service["user"].split(":")[0]), (name, file)
    assert read | {"all.json"} == files_in(made).keys()


def test_secrets_are_kept(made: Path) -> None:
    before = files_in(made)
    # Of a start that was cut off.
    (made / "s3.json.part").write_text("half")
    (made / "grafana-password").unlink()
    assert run_secrets(made) == 0
    assert files_in(made) == before


def test_no_two_stacks_have_the_same_secrets(made: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    run_secrets(other)
    one, two = (json.loads((folder / "all.json").read_text()) for folder in (made, other))
    assert one.keys() == two.keys() and not set(one.values()) & set(two.values())
    # 96 bits and more, and none twice.
    assert all(len(value) >= 20 for value in one.values()) and len(set(one.values())) == len(one)


def test_a_secret_is_shown_to_who_asks_and_to_nobody_else(
    made: Path, tmp_path_factory: pytest.TempPathFactory, capfd: pytest.CaptureFixture[str]
) -> None:
    capfd.readouterr()
    known = json.loads((made / "all.json").read_text())
    assert run_secrets(made) == 0
    told = "".join(capfd.readouterr())
    assert "kept" in told and not [value for value in known.values() if value in told]
    assert run_secrets(made, "show") == 0
    shown = capfd.readouterr().out
    assert {name for name, value in known.items() if value in shown} == {
        *("gateway_key", "grafana_password", "label_studio_password"),
        *("label_studio_token", "s3_access_key", "s3_secret_key"),
    }
    published = {port for each in services().values() for port in each.get("ports", [])}
    assert {re.sub(r":\d+$", "", port) for port in published} == set(re.findall(r"127\.0\.0\.1:\d+", shown))
    assert run_secrets(tmp_path_factory.mktemp("empty"), "show") == 1
    assert "start the services first" in capfd.readouterr().err


def test_the_gateway_knows_its_callers(made: Path) -> None:
    known = json.loads((made / "all.json").read_text())
    keys = Keys(made / "gateway-keys")
    assert asyncio.run(keys.authenticate(known["gateway_key"])).id == "user"
    assert asyncio.run(keys.authenticate((made / "prometheus-key").read_text())).id == "prometheus"


def test_label_studio_gets_its_user_from_a_shell(made: Path) -> None:
    """As the entry point of its image reads the file."""
    command = f". {shlex.quote(str(made / 'label-studio.env'))}; env"
    told = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True, env={}).stdout
    found = dict(line.split("=", 1) for line in told.splitlines())
    known = json.loads((made / "all.json").read_text())
    assert found["LABEL_STUDIO_PASSWORD"] == known["label_studio_password"]
    # The column that holds it.
    assert found["LABEL_STUDIO_USER_TOKEN"] == known["label_studio_token"] and len(known["label_studio_token"]) == 40


def test_the_bucket_is_made_once(made: Path) -> None:
    service = services()["bucket"]
    told = environment(service)
    assert told["AWS_ENDPOINT_URL"] == "http://s3:8333"
    file = made / Path(told["AWS_SHARED_CREDENTIALS_FILE"]).name
    with store_places.moto() as endpoint:
        given = {key: value for key, value in os.environ.items() if not key.startswith("AWS_")}
        given |= {"AWS_ENDPOINT_URL": endpoint, "AWS_SHARED_CREDENTIALS_FILE": str(file)}
        # In one process, which is quicker, but without what the first time has left in it.
        twice = (
            "import s3fs\nfor command in sys.argv[1:]:\n    s3fs.S3FileSystem.clear_instance_cache()\n    exec(command)"
        )
        subprocess.run([sys.executable, "-c", f"import sys\n{twice}", *service["command"] * 2], env=given, check=True)
        buckets = store_places.client(endpoint).list_buckets()["Buckets"]
    assert [bucket["Name"] for bucket in buckets] == ["marina"]


# --- figures


@cache
def told() -> dict[str, set[str]]:
    """Every metric that is told, with its labels."""
    parts = yaml.safe_load((DOCKER / "metrics.yaml").read_text()).values()
    found = {
        metric["name"]: {*metric["dimensions"]}
        for part in parts
        if isinstance(part, dict)
        for metrics in part.values()
        for metric in metrics
    }
    figures = Figures()
    figures.requests.labels("GET", "/", 200).inc()
    figures.seconds.labels("/").observe(1)
    figures.up.labels("shapes").set(1)
    for sample in (sample for metric in figures.registry.collect() for sample in metric.samples):
        found[sample.name] = {*sample.labels}
    found |= {name: {"gpu", "modelName"} for name in DCGM}
    found["up"] = {"job", "instance"}
    recorded = [rule["record"] for rule in rules() if "record" in rule]
    found |= {name: {"model", "version", "quantity", "bucket", "window"} for name in recorded}
    return found


def panels() -> list[Document]:
    found: list[Document] = json.loads(DASHBOARD.read_text())["panels"]
    return found


def rules() -> list[Document]:
    """Of all files that Prometheus reads."""
    files = yaml.safe_load((COMPOSE / "prometheus" / "prometheus.yml").read_text())["rule_files"]
    groups = [yaml.safe_load((COMPOSE / "prometheus" / file).read_text())["groups"] for file in files]
    return [rule for (group,) in groups for rule in group["rules"]]


def alerts() -> list[Document]:
    return [rule for rule in rules() if "alert" in rule]


EXPRESSIONS = [
    pytest.param(target["expr"], id=f"{panel['title']} {target['refId']}")
    for panel in panels()
    for target in panel.get("targets", [])
]
EXPRESSIONS += [
    pytest.param(rule["expr"], id=f"{rule.get('alert') or rule['record']} {number}")
    for number, rule in enumerate(rules())
]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_what_is_asked_for_is_told(expression: str) -> None:
    known = told()
    grouped = re.findall(r"(?:by|on) \(([^)]*)\)", expression)
    outside = re.sub(r"\{[^}]*\}|\[[^]]*\]|(by|on|group_left) \([^)]*\)|\band\b", "", expression)
    names = {*re.findall(r"\b[a-zA-Z_][\w:]*\b(?!\s*\()", outside)}
    assert names and names <= known.keys()
    labels = {*re.findall(r'(\w+)(?:=|!=|=~|!~)"', expression)} | {*re.findall(r"\w+", " ".join(grouped))}
    held = [known[name] | ({"le"} if name.endswith("_bucket") else set()) for name in names]
    # Of metrics that are joined, one has it.
    assert labels <= (set.union(*held) if " on (" in expression else set.intersection(*held)), labels


def test_the_dashboard_is_whole() -> None:
    board = json.loads(DASHBOARD.read_text())
    (source,) = yaml.safe_load((COMPOSE / "grafana" / "datasources" / "prometheus.yaml").read_text())["datasources"]
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    (variable,) = board["templating"]["list"]
    assert re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"])
    for panel in board["panels"]:
        assert panel["title"] and {"x", "y", "w", "h"} == panel["gridPos"].keys()
        if panel["type"] in ("row", "alertlist"):
            continue
        assert panel["datasource"] == {"type": source["type"], "uid": source["uid"]}
        defaults = panel["fieldConfig"]["defaults"]
        assert "unit" in defaults or "mappings" in defaults
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        for target in panel["targets"]:
            many = "by (" in target["expr"] or len(panel["targets"]) > 1
            assert not many or target["legendFormat"]
    assert taken_twice(board["panels"]) == set()


def taken_twice(panels: list[Document]) -> set[tuple[int, int]]:
    seen: set[tuple[int, int]] = set()
    twice = set()
    for place in (panel["gridPos"] for panel in panels):
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        twice |= seen & cells
        seen |= cells
        assert place["x"] + place["w"] <= 24
    return twice


def test_prometheus_asks_services_that_are_there() -> None:
    config = yaml.safe_load((COMPOSE / "prometheus" / "prometheus.yml").read_text())
    targets = [
        name
        for job in config["scrape_configs"]
        for each in job.get("static_configs", []) + job.get("dns_sd_configs", [])
        for name in each.get("targets", each.get("names", []))
    ]
    found = services()
    reachable = {"inference", "metrics"}
    assert [*found["prometheus"]["networks"]] == sorted(reachable)
    for target in targets:
        assert reachable & {*found[target.split(":")[0]]["networks"]}
    properties = (DOCKER / "k8s" / "config" / "config.properties").read_text()
    assert "serve:8082" in targets and "metrics_address=http://0.0.0.0:8082" in properties
    assert "metrics_config=/opt/torchserve/metrics.yaml" in properties
    interval = config["global"]["scrape_interval"]
    assert f"timeInterval: {interval}" in (COMPOSE / "grafana" / "datasources" / "prometheus.yaml").read_text()


def test_alerts_say_what_is_wrong() -> None:
    for rule in alerts():
        assert rule["for"] and rule["labels"]["severity"] in ("warning", "critical")
        summary = rule["annotations"]["summary"]
        grouped = re.search(r"by \((\w+)\)", rule["expr"])
        assert not grouped or f"$labels.{grouped[1]}" in summary


def test_prometheus_takes_its_settings() -> None:
    if shutil.which("promtool") is None:
        pytest.skip("PROMETHEUS' FILES NOT CHECKED: no promtool (Debian's package prometheus)")
    config = COMPOSE / "prometheus" / "prometheus.yml"
    files = [str(config.with_name(name)) for name in yaml.safe_load(config.read_text())["rule_files"]]
    for command in (["config", "--syntax-only", str(config)], ["rules", *files]):
        done = subprocess.run(["promtool", "check", *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
