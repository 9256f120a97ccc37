"""The config section of `safecl launch`: how many ranks run where, and what they are told."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from safecl.config.base import Section, Text

Seconds = Annotated[int, Field(ge=1)]
Way = Literal["torchrun", "deepspeed", "slurm", "kubernetes"]

_HOST_AND_PORT = re.compile(r"[^\s:]+(:\d{1,5})?")


class SlurmConfig(Section):
    """The batch job of `launch.via: slurm`."""

    partition: Text | None = None
    """Partition; by default the cluster's."""
    account: Text | None = None
    """Account that the job is charged to."""
    qos: Text | None = None
    """Quality of service."""
    time: Text | Annotated[int, Field(ge=1)] | None = None
    """Time limit of the job, as Slurm writes it: minutes, or days-hours:minutes:seconds."""
    cpus_per_task: Annotated[int, Field(ge=1)] | None = None
    """CPUs of a node; by default what the partition gives."""
    gpus: bool = True
    """Request gpus_per_node GPUs on each node; false on clusters of CPUs."""
    container: Text | None = None
    """Container image that safecl runs in."""
    container_runtime: Literal["pyxis", "apptainer"] = "pyxis"
    """pyxis: srun --container-image; apptainer: apptainer exec --nv."""
    container_mounts: list[Text] = []
    """Folders to mount into the container, as source:target; the run folder and the data must be among them."""
    setup: list[Text] = []
    """Shell lines that the batch script runs first, such as `module load cuda` or `. venv/bin/activate`."""
    extra: list[Text] = []
    """Further #SBATCH options, such as `--constraint=a100`."""


class KubernetesConfig(Section):
    """The pods of `launch.via: kubernetes`."""

    image: Text | None = None
    """Container image with safecl; needed."""
    namespace: Text | None = None
    """Namespace; by default that of kubectl's context."""
    kind: Literal["Job", "JobSet"] = "Job"
    """Job: an Indexed Job. JobSet: the same as a JobSet, whose controller restarts all nodes together."""
    claim: Text | None = None
    """PersistentVolumeClaim (ReadWriteMany) with model, data, config and run folder; needed."""
    mount: Text = "/workspace"
    """Folder at which the claim is mounted. Relative paths of the config begin here."""
    shared_memory: Text = "64Gi"
    """Size limit of /dev/shm, which holds the reference weights of a node; 2 bytes per weight, and 1 GiB."""
    gpu_resource: Text = "nvidia.com/gpu"
    """Name of the GPU resource."""
    gpus: bool = True
    """Request gpus_per_node GPUs for each pod; false on clusters of CPUs."""
    cpus: Annotated[int, Field(ge=1)] | None = None
    """CPUs of each pod."""
    memory: Text | None = None
    """Host memory of each pod."""


class LaunchConfig(Section):
    """Defaults of `safecl launch`. Options on the command line come first. No key changes what is trained."""

    nodes: Text | Annotated[int, Field(ge=1)] = 1
    """Number of nodes; `1:4` takes those that are there, from 1 to 4."""
    gpus_per_node: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Ranks on each node. auto: one per GPU of this machine, or one without a GPU."""
    via: Way = "torchrun"
    """torchrun, deepspeed: start the ranks of this node. slurm, kubernetes: submit a job that does."""
    rendezvous: Text | None = None
    """First node as host:port, the same on all nodes; needed for several nodes by torchrun or deepspeed. Slurm and
    Kubernetes know it."""
    port: Annotated[int, Field(ge=1, le=65535)] = 29500
    """Port of the first node, where rendezvous names none."""
    interface: Text | None = None
    """Network interface of this node; by default the one that the route to the first node takes."""
    environment: dict[str, str] = {}
    """Environment variables of all ranks; they replace those of your environment."""
    start_timeout: Seconds = 600
    """Seconds that the first nodes wait for the others."""
    last_call: Seconds = 30
    """Seconds to wait for more nodes when the smallest number is there; with nodes: 1:4."""
    stop_timeout: Seconds = 600
    """Seconds that ranks have after a signal to finish their step and save."""
    max_restarts: Annotated[int, Field(ge=0)] = 0
    """Restarts after a failure; a wrong config, a failed gate and a stop are not repeated."""
    hosts: list[Text] = []
    """Names of the nodes, for the hostfile of the deepspeed launcher."""
    hostfile: Text | None = None
    """Hostfile of your own for the deepspeed launcher, instead of hosts."""
    ssh: bool = False
    """Let the deepspeed launcher start all nodes by pdsh and ssh. false: run the same command on every node."""
    slurm: SlurmConfig = SlurmConfig()
    """The Slurm job."""
    kubernetes: KubernetesConfig = KubernetesConfig()
    """The Kubernetes job."""

    @property
    def node_range(self) -> tuple[int, int]:
        """Smallest and largest number of nodes."""
        first, _, last = str(self.nodes).partition(":")
        return int(first), int(last or first)

    @field_validator("nodes")
    @classmethod
    def _nodes_are_a_number_or_a_range(cls, nodes: str | int) -> str | int:
        if isinstance(nodes, int):
            return nodes
        found = re.fullmatch(r"(\d+)(?::(\d+))?", nodes.strip())
        if found is None or not 1 <= int(found[1]) <= int(found[2] or found[1]):
            raise ValueError(f"{nodes!r} is not a number of nodes; give 2, or 1:4 for 1 to 4 nodes")
        return int(found[1]) if found[2] is None else nodes.strip()

    @field_validator("rendezvous")
    @classmethod
    def _a_rendezvous_is_a_host(cls, place: str | None) -> str | None:
        if place is not None and _HOST_AND_PORT.fullmatch(place) is None:
            raise ValueError(f"{place!r} is not host:port; give the first node, such as node-0:29500 or 10.0.0.1")
        return place

    @model_validator(mode="after")
    def _only_torchrun_takes_the_nodes_that_are_there(self) -> LaunchConfig:
        first, last = self.node_range
        if self.via != "torchrun" and first != last:
            raise ValueError(f"nodes: {self.nodes} is for torchrun; {self.via} starts a fixed number of nodes")
        return self
