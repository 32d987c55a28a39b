"""The steps as Tekton v1 Tasks and a Pipeline, in YAML.

A parameter reaches a script as an environment variable and in no other way: Tekton pastes `$(params.x)` into whatever
text it stands in, and in a script that would be code. The scripts themselves come from a ConfigMap, which
`docker/tekton/kustomization.yaml` makes of the files.

Waiting for a GPU is a task whose pod asks for one: it stands in the queue, and makes an autoscaler add a machine. When
its time is over it has failed, which `onError: continue` allows, and `choose-device` finds that it left nothing.
"""

from typing import Any

import yaml
from pydantic_core import PydanticUndefined

from tools.pipeline.parameters import HERE_ONLY, Parameters, as_text, variable
from tools.pipeline.steps import STATUSES, STEPS, SUMMARY, Step

API = "tekton.dev/v1"
SCRIPTS = "marina-steps"
HEADER = "# Written by `marina pipeline tekton` from tools/pipeline/; a test compares.\n"
GPU = {"nvidia.com/gpu": "1"}
LIGHT = {"requests": {"cpu": "250m", "memory": "1Gi"}, "limits": {"cpu": "2", "memory": "4Gi"}}
HEAVY = {"requests": {"cpu": "2", "memory": "8Gi"}, "limits": {"cpu": "8", "memory": "24Gi"}}
TIMEOUTS = {"train-gpu": "24h", "train-cpu": "72h"}
TIMEOUT = "2h"
CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
# Any user id must do, and nothing is written but the workspace and /tmp.
SECURITY = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "readOnlyRootFilesystem": True,
    "runAsNonRoot": True,
    "seccompProfile": {"type": "RuntimeDefault"},
}


def documents() -> str:
    tasks = [_task(step, name) for step in (*STEPS, SUMMARY) for name in _names(step)]
    return HEADER + yaml.safe_dump_all([*tasks, _pipeline()], sort_keys=False, width=120, allow_unicode=True)


def _names(step: Step) -> list[str]:
    """Of the tasks that run a step's script: training is another one with a GPU."""
    return ["train-gpu", "train-cpu"] if step.name == "train" else [step.name]


def _seen(step: Step) -> list[str]:
    return [name for name in step.sees if name not in HERE_ONLY]


def _params(step: Step) -> list[str]:
    """Of the step's task: what the script sees, and what the pod is made of."""
    others = ["tools_image", *(["s3_secret"] if step.store else [])]
    return [*_seen(step), *(name for name in others if name not in step.sees)]


def _task(step: Step, name: str) -> dict[str, Any]:
    gpu = name in ("wait-for-gpu", "train-gpu")
    resources = HEAVY if step.heavy else LIGHT
    if gpu:
        resources = {"requests": resources["requests"] | GPU, "limits": resources["limits"] | GPU}
    params = [{"name": param, "type": "string"} for param in _params(step)]
    # The image asks for every GPU of its machine.
    environment: list[dict[str, Any]] = [] if gpu else [{"name": "NVIDIA_VISIBLE_DEVICES", "value": "void"}]
    environment += [{"name": variable(param), "value": f"$(params.{param})"} for param in _seen(step)]
    results = {}
    if step is SUMMARY:
        params.append({"name": "statuses", "type": "string"})
        environment.append({"name": STATUSES, "value": "$(params.statuses)"})
    if name == "choose-device":
        results = {"results": [{"name": "device", "type": "string", "description": "gpu or cpu: what trains"}]}
        environment.append({"name": "MARINA_RESULT", "value": "$(results.device.path)"})
    if step.store:
        # Last: Kubernetes puts earlier variables into a value that says `$(NAME)`, and a parameter might.
        environment += [
            {"name": key, "valueFrom": {"secretKeyRef": {"name": "$(params.s3_secret)", "key": key}}}
            for key in CREDENTIALS
        ]
    mounts = [{"name": "steps", "mountPath": "/steps", "readOnly": True}, {"name": "tmp", "mountPath": "/tmp"}]  # noqa: S108  # inside the container
    volumes: list[dict[str, Any]] = [{"name": "steps", "configMap": {"name": SCRIPTS}}, {"name": "tmp", "emptyDir": {}}]
    if step.heavy:
        # The processes that read pictures hand them on there; the 64 MB that a container has are too few.
        mounts.append({"name": "shm", "mountPath": "/dev/shm"})  # noqa: S108  # inside the container
        volumes.append({"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "4Gi"}})
    script = {
        "name": step.name,
        "image": "$(params.tools_image)",
        "command": ["sh", f"/steps/{step.name}.sh"],
        "workingDir": "$(workspaces.work.path)",
        "env": environment,
        "volumeMounts": mounts,
        "computeResources": resources,
        "securityContext": SECURITY,
    }
    spec = {"params": params, "workspaces": [{"name": "work"}], **results, "volumes": volumes, "steps": [script]}
    return {"apiVersion": API, "kind": "Task", "metadata": {"name": f"marina-{name}"}, "spec": spec}


def _pipeline() -> dict[str, Any]:
    tasks: list[dict[str, Any]] = []
    before: list[str] = []
    for step in STEPS:
        names = _names(step)
        tasks += [_pipeline_task(step, name, before) for name in names]
        before = names
    statuses = " ".join(f"{task['name']}=$(tasks.{task['name']}.status)" for task in tasks)
    summary = _pipeline_task(SUMMARY, SUMMARY.name, [])
    summary["params"].append({"name": "statuses", "value": statuses})
    spec = {
        "description": "Data set in the store to an archive that servers follow; docker/tekton/run.yaml starts one.",
        "params": [_param(name) for name in Parameters.model_fields if name not in HERE_ONLY],
        "workspaces": [{"name": "work", "description": "for all steps: data, run and archive"}],
        "tasks": tasks,
        "finally": [summary],
    }
    return {"apiVersion": API, "kind": "Pipeline", "metadata": {"name": "marina-train"}, "spec": spec}


def _param(name: str) -> dict[str, Any]:
    field = Parameters.model_fields[name]
    param = {"name": name, "type": "string", "description": field.description}
    # Tekton pulls an image before anything could be said about its name.
    if field.default is PydanticUndefined or name == "tools_image":
        return param
    return param | {"default": as_text(field.default)}


def _pipeline_task(step: Step, name: str, after: list[str]) -> dict[str, Any]:
    task: dict[str, Any] = {"name": name, "taskRef": {"name": f"marina-{name}"}}
    if after:
        task["runAfter"] = after
    if name == "wait-for-gpu":
        task["when"] = [{"input": "$(params.device)", "operator": "notin", "values": ["cpu"]}]
        task["onError"] = "continue"
    if step.name == "train":
        device = name.removeprefix("train-")
        task["when"] = [{"input": "$(tasks.choose-device.results.device)", "operator": "in", "values": [device]}]
    # A timeout cannot be a param: `taskRunSpecs` of a PipelineRun sets another.
    waiting = Parameters.model_fields["gpu_timeout"].default
    task["timeout"] = waiting if name == "wait-for-gpu" else TIMEOUTS.get(name, TIMEOUT)
    task["params"] = [{"name": param, "value": f"$(params.{param})"} for param in _params(step)]
    task["workspaces"] = [{"name": "work"}]
    return task
