"""JSON schemas of the files in cluster/, closed: exactly the keys that those files use, so that a misspelt one fails.

Only what nobody else checks offline. Ray's own schema has the launcher's top level, but leaves open what goes to the
cloud; Kubernetes checks manifests on its server, and lets unknown keys pass.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]
TEXT: Schema = {"type": "string", "minLength": 1}
NUMBER: Schema = {"type": "integer", "minimum": 0}
FLAG: Schema = {"type": "boolean"}


def one_of(*values: object) -> Schema:
    return {"enum": list(values)}


def many(item: Schema) -> Schema:
    return {"type": "array", "items": item, "minItems": 1}


def closed(properties: dict[str, Schema], optional: dict[str, Schema] | None = None) -> Schema:
    """These keys and no other; all of them, but for the optional."""
    return {
        "type": "object", "additionalProperties": False, "required": list(properties),
        "properties": properties | (optional or {}),
    }


LABELS = closed({"ray.io/market-type": one_of("spot", "on-demand")})

# ---- the launcher's files

AWS_NODE = closed(
    {
        "InstanceType": TEXT, "ImageId": TEXT, "IamInstanceProfile": closed({"Name": TEXT}),
        "BlockDeviceMappings": many(
            closed({"DeviceName": TEXT, "Ebs": closed({"VolumeSize": NUMBER, "VolumeType": TEXT})})
        ),
    },
    {"InstanceMarketOptions": closed({"MarketType": one_of("spot")})},
)
GCP_NODE = closed(
    {
        "machineType": TEXT,
        "disks": many(
            closed({
                "boot": FLAG, "autoDelete": FLAG, "type": one_of("PERSISTENT"),
                "initializeParams": closed({"diskSizeGb": NUMBER, "sourceImage": TEXT}),
            })
        ),
        "serviceAccounts": many(closed({"email": TEXT, "scopes": many(TEXT)})),
    },
    {
        "metadata": closed({"items": many(closed({"key": TEXT, "value": TEXT}))}),
        "scheduling": closed(
            {"onHostMaintenance": one_of("TERMINATE"), "automaticRestart": FLAG},
            {"provisioningModel": one_of("SPOT"), "instanceTerminationAction": one_of("DELETE")},
        ),
    },
)
PROVIDERS = {
    "aws": closed({"type": one_of("aws"), "region": TEXT, "availability_zone": TEXT, "cache_stopped_nodes": FLAG}),
    "gcp": closed({
        "type": one_of("gcp"), "project_id": TEXT, "region": TEXT, "availability_zone": TEXT,
        "cache_stopped_nodes": FLAG,
    }),
}


def launcher(cloud: str) -> Schema:
    node = {"aws": AWS_NODE, "gcp": GCP_NODE}[cloud]
    head: dict[str, Schema] = {"resources": closed({"CPU": NUMBER}), "labels": LABELS, "node_config": node}
    worker = closed({
        **head, "resources": closed({"CPU": NUMBER, "GPU": NUMBER}), "min_workers": NUMBER, "max_workers": NUMBER,
    })
    commands = {
        f"{when}_commands": {"type": "array", "items": TEXT}
        for when in ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    }
    return closed({
        "cluster_name": TEXT, "max_workers": NUMBER, "upscaling_speed": NUMBER, "idle_timeout_minutes": NUMBER,
        "provider": PROVIDERS[cloud], "auth": closed({"ssh_user": TEXT}),
        "docker": closed({"image": TEXT, "container_name": TEXT, "pull_before_run": FLAG, "run_options": many(TEXT)}),
        "file_mounts": closed({"/home/ray/.ray/auth_token": TEXT}), "head_node_type": one_of("head"),
        "available_node_types": closed({"head": closed(head), "imagination": worker, "distillation": worker}),
        **commands,
    })


# ---- the manifests

QUANTITY: Schema = {"type": "string", "pattern": "^[0-9]+(m|Mi|Gi)?$"}
AMOUNTS = closed({"cpu": QUANTITY, "memory": QUANTITY}, {"nvidia.com/gpu": QUANTITY})
TERM = closed({"key": TEXT, "operator": one_of("DoesNotExist")})
AFFINITY = closed({
    "nodeAffinity": closed({
        "requiredDuringSchedulingIgnoredDuringExecution": closed({
            "nodeSelectorTerms": many(closed({"matchExpressions": many(TERM)}))
        })
    })
})
TOLERATION = closed(
    {"key": TEXT, "operator": one_of("Equal", "Exists"), "effect": one_of("NoSchedule")}, {"value": TEXT}
)
CONTAINER = closed(
    {
        "name": TEXT, "image": TEXT, "envFrom": many(closed({"secretRef": closed({"name": TEXT, "optional": FLAG})})),
        "resources": closed({"requests": AMOUNTS, "limits": AMOUNTS}),
    },
    {"ports": many(closed({"name": TEXT, "containerPort": NUMBER}))},
)
POD = closed({
    "spec": closed(
        {"serviceAccountName": TEXT, "containers": many(CONTAINER)},
        {
            "affinity": AFFINITY, "tolerations": many(TOLERATION),
            "nodeSelector": closed({"cloud.google.com/gke-accelerator": TEXT}, {"cloud.google.com/gke-spot": TEXT}),
        },
    )
})
RAY_CLUSTER_SPEC = closed({
    "rayVersion": TEXT, "enableInTreeAutoscaling": one_of(True), "authOptions": closed({"mode": one_of("token")}),
    "autoscalerOptions": closed({
        "version": one_of("v2"), "upscalingMode": one_of("Default", "Aggressive", "Conservative"),
        "idleTimeoutSeconds": NUMBER,
    }),
    "headGroupSpec": closed({"rayStartParams": closed({"num-cpus": one_of("0")}), "labels": LABELS, "template": POD}),
    "workerGroupSpecs": many(closed({
        "groupName": one_of("imagination", "distillation"), "replicas": NUMBER, "minReplicas": NUMBER,
        "maxReplicas": NUMBER, "rayStartParams": closed({}), "labels": LABELS, "template": POD,
    })),
})


def manifest(kind: str, spec: Schema) -> Schema:
    return closed({
        "apiVersion": one_of("ray.io/v1"), "kind": one_of(kind), "metadata": closed({"name": TEXT}), "spec": spec,
    })


RAY_CLUSTER = manifest("RayCluster", RAY_CLUSTER_SPEC)
RAY_JOB = manifest("RayJob", closed({
    "entrypoint": TEXT, "runtimeEnvYAML": TEXT, "backoffLimit": NUMBER, "shutdownAfterJobFinishes": one_of(True),
    "ttlSecondsAfterFinished": NUMBER, "rayClusterSpec": RAY_CLUSTER_SPEC,
}))
