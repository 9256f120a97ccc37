"""Kubernetes: an Indexed Job with a headless Service, or a JobSet; each pod runs `safecl launch` for its node.

The pods share one claim with model, data, config and run folder. Exit codes mean the same as elsewhere: 75 is not a
failure (the pod starts again and goes on from the checkpoint), 2 and 3 end the job at once. Imports no torch.
"""

from __future__ import annotations

from typing import Any

import yaml

from safecl.config import ConfigError
from safecl.exits import ExitCode
from safecl.launching.job import FILES, Command, Job, Launch
from safecl.launching.variables import variables_of

Manifest = dict[str, Any]


def plan(job: Job) -> Launch:
    """Return the creation of the job's objects. Raises ConfigError."""
    path = job.folder / FILES / f"{job.settings.kubernetes.kind.lower()}.yaml"
    nodes, ranks = job.settings.node_range[1], job.ranks_per_node()
    namespace = job.settings.kubernetes.namespace
    variables = variables_of(job.settings, {})
    facts = [
        ("ranks", f"{nodes} pod{'s' * (nodes > 1)} x {ranks}, by Kubernetes ({job.settings.kubernetes.kind})"),
        ("manifest", str(path)),
        *variables.facts(travels=False),
    ]
    where = [f"--namespace={namespace}"] if namespace is not None else []
    text = yaml.safe_dump_all(manifests(job), sort_keys=False, width=120)
    return Launch(facts, Command(("kubectl", *where, "create", "-f", str(path))), {path: text})


def manifests(job: Job) -> list[Manifest]:
    """Return the Service and the Job, or the JobSet, which makes its own Service. Raises ConfigError."""
    settings = job.settings.kubernetes
    for key in ("image", "claim"):
        if getattr(settings, key) is None:
            raise ConfigError(f"launch.kubernetes.{key}: is needed, as launch.kubernetes.{key}=NAME")
    if job.sweep:
        raise ConfigError("--sweep: is for --via slurm; create one Job for each run on Kubernetes")
    return (
        [_job_set(job)] if settings.kind == "JobSet" else [_service(job), _object(job, "batch/v1", "Job", _spec(job))]
    )


def _object(job: Job, version: str, kind: str, spec: Manifest) -> Manifest:
    return {"apiVersion": version, "kind": kind, "metadata": {"name": job.name, "labels": _labels(job)}, "spec": spec}


def _labels(job: Job) -> dict[str, str]:
    return {"app.kubernetes.io/name": "safecl", "app.kubernetes.io/instance": job.name}


def _service(job: Job) -> Manifest:
    """The names of the pods, which are known before the pods are ready: they wait for each other."""
    spec = {
        "clusterIP": "None",
        "publishNotReadyAddresses": True,
        "selector": _labels(job),
        "ports": [{"name": "rendezvous", "port": job.settings.port}],
    }
    return _object(job, "v1", "Service", spec)


def _spec(job: Job) -> Manifest:
    """The spec of an Indexed Job, one pod a node."""
    nodes, failures = job.settings.node_range[1], job.settings.max_restarts
    is_set = job.settings.kubernetes.kind == "JobSet"
    rules = [_rule("Ignore", ExitCode.STOPPED), _rule("FailJob", ExitCode.USAGE, ExitCode.GATE)]
    # A JobSet counts the failures of all pods together, and restarts them together.
    spec: Manifest = {
        "completionMode": "Indexed",
        "completions": nodes,
        "parallelism": nodes,
        "backoffLimit": 0 if is_set else failures * nodes,
    }
    spec["podFailurePolicy"] = {"rules": [*rules, _lost_node()]}
    return spec | {"template": {"metadata": {"labels": _labels(job)}, "spec": _pod(job)}}


def _rule(action: str, *codes: ExitCode) -> Manifest:
    return {
        "action": action,
        "onExitCodes": {"containerName": "safecl", "operator": "In", "values": [int(code) for code in codes]},
    }


def _lost_node() -> Manifest:
    """A pod that is evicted, or whose node is lost, is not a failure of the run."""
    return {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}


def _pod(job: Job) -> Manifest:
    settings = job.settings.kubernetes
    pod: Manifest = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": job.settings.stop_timeout,
        "containers": [_container(job)],
        "volumes": [
            {"name": "workspace", "persistentVolumeClaim": {"claimName": settings.claim}},
            {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": settings.shared_memory}},
        ],
    }
    return pod if settings.kind == "JobSet" else {"subdomain": job.name, **pod}


def _container(job: Job) -> Manifest:
    settings = job.settings.kubernetes
    container: Manifest = {
        "name": "safecl",
        "image": settings.image,
        "workingDir": settings.mount,
        "command": ["python3", "-m", "safecl", *_arguments(job)],
        "env": [{"name": name, "value": value} for name, value in job.settings.environment.items()],
        "ports": [{"name": "rendezvous", "containerPort": job.settings.port}],
        "volumeMounts": [
            {"name": "workspace", "mountPath": settings.mount},
            {"name": "shared-memory", "mountPath": "/dev/shm"},
        ],
    }
    if limits := _limits(job):
        container["resources"] = {"limits": limits}
    return container


def _arguments(job: Job) -> list[str]:
    """The arguments of safecl in every pod. The restarts are those of Kubernetes."""
    nodes, ranks = job.settings.node_range[1], job.ranks_per_node()
    own = ["launch", str(job.config), "--via", "torchrun", "--nodes", str(nodes), "--gpus-per-node", str(ranks)]
    first = [] if nodes == 1 else ["--rendezvous", f"{_first_pod(job)}:{job.settings.port}"]
    return [*own, *first, "--max-restarts", "0", "--", *job.overrides, *job.options]


def _first_pod(job: Job) -> str:
    """The host name of the first pod: JOB-INDEX.SERVICE, or SET-JOB-INDEX-INDEX.SET."""
    middle = "-node-0" if job.settings.kubernetes.kind == "JobSet" else ""
    return f"{job.name}{middle}-0.{job.name}"


def _limits(job: Job) -> dict[str, str]:
    settings = job.settings.kubernetes
    gpus = str(job.ranks_per_node()) if settings.gpus else None
    wanted = {settings.gpu_resource: gpus, "cpu": settings.cpus, "memory": settings.memory}
    return {name: str(value) for name, value in wanted.items() if value is not None}


def _job_set(job: Job) -> Manifest:
    """All nodes start again together after a failure; a wrong config and a failed gate end the set."""
    final = {"name": "not-to-be-repeated", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    spec = {
        "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True, "subdomain": job.name},
        "failurePolicy": {"maxRestarts": job.settings.max_restarts, "rules": [final]},
        "replicatedJobs": [{"name": "node", "replicas": 1, "template": {"spec": _spec(job)}}],
    }
    return _object(job, "jobset.x-k8s.io/v1alpha2", "JobSet", spec)
