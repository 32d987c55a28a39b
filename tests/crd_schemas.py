"""JSON schemas of the custom resources in `docker/`: the keys that Marina uses, and no other.

Their CRDs are in no package. Written from the references of Tekton v1, KServe, Kubeflow's training operator, the
Prometheus operator and OpenShift's routes. What is a container or a pod in them is checked against Kubernetes' own.
"""

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
WHOLE: Schema = {"type": "integer"}
YES_NO: Schema = {"type": "boolean"}
ANY: Schema = {}
TEXTS: Schema = {"type": "array", "items": TEXT}
LABELS: Schema = {"type": "object", "additionalProperties": TEXT}
DURATION: Schema = {"type": "string", "pattern": r"^([0-9]+h)?([0-9]+m)?([0-9]+s)?$", "minLength": 2}
PORT: Schema = {"type": ["string", "integer"]}


def one_of(*values: str) -> Schema:
    return {"enum": list(values)}


def a_list(items: Schema) -> Schema:
    return {"type": "array", "items": items, "minItems": 1}


def an_object(needed: Schema, optional: Schema | None = None) -> Schema:
    return {
        "type": "object",
        "properties": needed | (optional or {}),
        "required": list(needed),
        "additionalProperties": False,
    }


def resource(api: str, kind: str, spec: Schema, named: bool = True) -> Schema:
    name = {"name": {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"}}
    metadata = an_object(name if named else {"generateName": TEXT}, {"labels": LABELS, "annotations": LABELS})
    return an_object({"apiVersion": {"const": api}, "kind": {"const": kind}, "metadata": metadata, "spec": spec})


TEKTON = "tekton.dev/v1"
NAMED_VALUE = an_object({"name": TEXT, "value": TEXT})
STEP = an_object(
    {
        "name": TEXT,
        "image": TEXT,
        "command": a_list(TEXT),
        "workingDir": TEXT,
        "env": a_list(ANY),
        "volumeMounts": a_list(ANY),
        "computeResources": ANY,
        "securityContext": ANY,
    }
)
TASK = resource(
    TEKTON,
    "Task",
    an_object(
        {
            "params": a_list(an_object({"name": TEXT, "type": one_of("string")})),
            "workspaces": a_list(an_object({"name": TEXT})),
            "volumes": a_list(ANY),
            "steps": a_list(STEP),
        },
        {"results": a_list(an_object({"name": TEXT, "type": one_of("string")}, {"description": TEXT}))},
    ),
)
PIPELINE_TASK = an_object(
    {
        "name": {"type": "string", "pattern": r"^[a-z]([-a-z0-9]*[a-z0-9])?$"},
        "taskRef": an_object({"name": TEXT}),
        "params": {"type": "array", "items": NAMED_VALUE},
        "workspaces": a_list(an_object({"name": TEXT})),
        "timeout": DURATION,
    },
    {
        "runAfter": TEXTS,
        "onError": one_of("continue", "stopAndFail"),
        "when": a_list(an_object({"input": TEXT, "operator": one_of("in", "notin"), "values": TEXTS})),
    },
)
PIPELINE = resource(
    TEKTON,
    "Pipeline",
    an_object(
        {
            "description": TEXT,
            "params": a_list(
                an_object({"name": TEXT, "type": one_of("string"), "description": TEXT}, {"default": TEXT})
            ),
            "workspaces": a_list(an_object({"name": TEXT}, {"description": TEXT})),
            "tasks": a_list(PIPELINE_TASK),
            "finally": a_list(PIPELINE_TASK),
        }
    ),
)
POD_TEMPLATE = an_object({}, {"automountServiceAccountToken": YES_NO, "securityContext": ANY, "tolerations": ANY})
PIPELINE_RUN = resource(
    TEKTON,
    "PipelineRun",
    an_object(
        {
            "pipelineRef": an_object({"name": TEXT}),
            "params": a_list(NAMED_VALUE),
            "workspaces": a_list(an_object({"name": TEXT, "volumeClaimTemplate": ANY})),
            "timeouts": an_object({"pipeline": DURATION}, {"tasks": DURATION, "finally": DURATION}),
            "taskRunTemplate": an_object({"serviceAccountName": TEXT}, {"podTemplate": POD_TEMPLATE}),
        },
        {
            "taskRunSpecs": a_list(
                an_object({"pipelineTaskName": TEXT}, {"timeout": DURATION, "podTemplate": POD_TEMPLATE})
            )
        },
    ),
    named=False,
)

SERVING_RUNTIME = resource(
    "serving.kserve.io/v1alpha1",
    "ServingRuntime",
    an_object(
        {
            "supportedModelFormats": a_list(an_object({"name": TEXT}, {"version": TEXT, "autoSelect": YES_NO})),
            "protocolVersions": a_list(one_of("v1", "v2", "grpc-v1", "grpc-v2")),
            "containers": a_list(ANY),
        },
        {"annotations": LABELS, "labels": LABELS, "volumes": a_list(ANY)},
    ),
)
INFERENCE_SERVICE = resource(
    "serving.kserve.io/v1beta1",
    "InferenceService",
    an_object(
        {
            "predictor": an_object(
                {
                    "model": an_object(
                        {
                            "modelFormat": an_object({"name": TEXT}, {"version": TEXT}),
                            "runtime": TEXT,
                            "storageUri": {"type": "string", "pattern": "^s3://"},
                        },
                        {"protocolVersion": one_of("v1", "v2")},
                    )
                },
                {
                    "canaryTrafficPercent": {"type": "integer", "minimum": 0, "maximum": 100},
                    "minReplicas": WHOLE,
                    "maxReplicas": WHOLE,
                    "scaleMetric": one_of("cpu", "memory", "concurrency", "rps"),
                    "scaleTarget": WHOLE,
                    "timeout": WHOLE,
                    "serviceAccountName": TEXT,
                    "automountServiceAccountToken": YES_NO,
                },
            )
        }
    ),
)

REPLICAS = an_object({"replicas": WHOLE, "restartPolicy": one_of("Never", "OnFailure", "ExitCode"), "template": ANY})
PYTORCH_JOB = resource(
    "kubeflow.org/v1",
    "PyTorchJob",
    an_object(
        {"nprocPerNode": TEXT, "pytorchReplicaSpecs": an_object({"Master": REPLICAS, "Worker": REPLICAS})},
        {
            "runPolicy": an_object(
                {},
                {
                    "cleanPodPolicy": one_of("Running", "None", "All"),
                    "backoffLimit": WHOLE,
                    "activeDeadlineSeconds": WHOLE,
                    "ttlSecondsAfterFinished": WHOLE,
                },
            )
        },
    ),
)

SERVICE_MONITOR = resource(
    "monitoring.coreos.com/v1",
    "ServiceMonitor",
    an_object(
        {
            "selector": an_object({"matchLabels": LABELS}),
            "endpoints": a_list(
                an_object({"port": TEXT}, {"path": TEXT, "interval": DURATION, "scrapeTimeout": DURATION})
            ),
        }
    ),
)
RULE = an_object(
    {"expr": TEXT}, {"record": TEXT, "alert": TEXT, "for": DURATION, "labels": LABELS, "annotations": LABELS}
)
PROMETHEUS_RULE = resource(
    "monitoring.coreos.com/v1",
    "PrometheusRule",
    an_object({"groups": a_list(an_object({"name": TEXT, "rules": a_list(RULE)}))}),
)
ROUTE = resource(
    "route.openshift.io/v1",
    "Route",
    an_object(
        {
            "to": an_object({"kind": one_of("Service"), "name": TEXT}, {"weight": WHOLE}),
            "tls": an_object(
                {
                    "termination": one_of("edge", "reencrypt", "passthrough"),
                    "insecureEdgeTerminationPolicy": one_of("Redirect", "None"),
                }
            ),
        },
        {"port": an_object({"targetPort": PORT})},
    ),
)

OURS = {
    schema["properties"]["kind"]["const"]: schema
    for schema in (
        TASK,
        PIPELINE,
        PIPELINE_RUN,
        SERVING_RUNTIME,
        INFERENCE_SERVICE,
        PYTORCH_JOB,
        SERVICE_MONITOR,
        PROMETHEUS_RULE,
        ROUTE,
    )
}
