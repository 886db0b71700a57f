"""The recipes of docs/scale, and what `--processes auto` takes from an environment, as far as one machine can tell."""

import contextlib
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest
import yaml
from jax._src.clusters import cloud_tpu_cluster

from flax_transformer.cli.process_group import take_flags
from flax_transformer.cli.train import read_recipe
from flax_transformer.config.reading import read_config, write_config
from flax_transformer.parallel.processes import ProcessGroup

ROOT = Path(__file__).parent.parent
SCALE = ROOT / "docs" / "scale"
SCRIPTS = ("slurm.sbatch", "tpu_slice.sh")
JOBSETS = ("jobset.yaml", "jobset_tpu.yaml")

# --- Detection of environments

WORKER = """
import json, os, sys
import jax
os.environ.pop("TPU_SKIP_MDS_QUERY", None)  # which JAX sets where it finds no TPU
from flax_transformer.errors import ConfigError
from flax_transformer.parallel import processes
from flax_transformer.parallel.processes import ProcessGroup

try:
    processes.join(ProcessGroup.parse(json.loads(sys.argv[1])))
except ConfigError as error:
    sys.exit(f"ConfigError: {error}")
me = [processes.process_id(), processes.num_processes(), jax.config.values["jax_cuda_visible_devices"]]
print(json.dumps(processes.exchange(me)))
processes.leave()
"""

# Answers as the metadata server of a TPU host. It takes the place of a package that jax[tpu] brings.
REQUESTS = """
import os

class get:
    def __init__(self, url, headers, timeout):
        value = os.environ.get("METADATA_" + url.rpartition("/")[2].replace("-", "_"))
        self.text, self.status_code = value or "", 404 if value is None else 200
"""

OF_ENVIRONMENTS = ("SLURM", "OMPI", "JAX", "XLA", "TPU", "MEGASCALE", "KUBERNETES", "METADATA")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def run_workers(pairs: list[tuple[dict[str, str], dict[str, str]]]) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of workers that run together, given the flags and the environment of each.

    They see nothing of a cluster but what these environments say. None outlives this call.
    """
    plain = {name: value for name, value in os.environ.items() if not name.startswith(OF_ENVIRONMENTS)}
    found = []
    with contextlib.ExitStack() as opened:
        workers = []
        for flags, more in pairs:
            command = [sys.executable, "-W", "error", "-c", WORKER, json.dumps(flags)]
            environment = plain | {"JAX_PLATFORMS": "cpu"} | more
            worker = subprocess.Popen(command, env=environment, stdout=PIPE, stderr=PIPE, text=True)
            opened.enter_context(worker)
            opened.callback(worker.kill)
            workers.append(worker)
        for worker in workers:
            output, errors = worker.communicate(timeout=60)
            found.append((worker.returncode, output, errors))
    return found


def exchanged(pairs: list[tuple[dict[str, str], dict[str, str]]]) -> list[list]:
    """What each of the workers got from all, given their flags and environments."""
    found = []
    for code, output, errors in run_workers(pairs):
        assert code == 0, errors
        found.append(json.loads(output))
    return found


def slurm(number: int, local: int) -> dict[str, str]:
    names = {"JOB_ID": "77", "STEP_NODELIST": "localhost,node[2-3]", "NTASKS": "2"}
    return {f"SLURM_{name}": value for name, value in names.items()} | {
        "SLURM_PROCID": str(number),
        "SLURM_LOCALID": str(local),
    }


def open_mpi(number: int) -> dict[str, str]:
    return {
        "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1,10.0.0.1:34911",
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": str(number),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(number),
    }


def gke(number: int) -> dict[str, str]:
    return {"JAX_FORCE_TPU_INIT": "1", "TPU_WORKER_HOSTNAMES": "localhost,other", "TPU_WORKER_ID": str(number)}


def cloud_tpu(number: int) -> dict[str, str]:
    return {
        "JAX_FORCE_TPU_INIT": "1",
        "METADATA_agent_worker_number": str(number),
        "METADATA_tpu_env": "",
        "METADATA_worker_network_endpoints": "name:1:127.0.0.1,name:2:10.0.0.2",
    }


@pytest.mark.parametrize("environment", [open_mpi, pytest.param(gke, marks=pytest.mark.slow), cloud_tpu])
def test_processes_find_each_other_in_a_faked_environment(environment, tmp_path):
    (tmp_path / "requests.py").write_text(REQUESTS)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    both = {"JAX_COORDINATOR_PORT": str(free_port()), "PYTHONPATH": path}
    if environment is gke:  # one slice; GKE sets these for several
        both |= {"MEGASCALE_COORDINATOR_ADDRESS": "localhost", "MEGASCALE_NUM_SLICES": "1", "MEGASCALE_SLICE_ID": "0"}
    found = exchanged([({"processes": "auto"}, both | environment(number)) for number in (0, 1)])
    devices = ["0", "1"] if environment is open_mpi else ["all", "all"]
    assert found == [[[0, 2, devices[0]], [1, 2, devices[1]]]] * 2


def test_a_task_of_slurm_has_all_devices_that_it_is_to_have():
    """Alone the one of its local number, more with a list, and all with flags."""
    port = str(free_port())
    auto = {"processes": "auto"}
    listed = slurm(0, 0) | {"JAX_LOCAL_DEVICE_IDS": "0,1,2,3"}
    both = {"JAX_COORDINATOR_PORT": port}
    assert exchanged([(auto, both | listed), (auto, both | slurm(1, 1))]) == [[[0, 2, "0,1,2,3"], [1, 2, "1"]]] * 2
    flags = {"processes": "2", "coordinator": f"localhost:{free_port()}"}
    assert (
        exchanged([(flags | {"process-id": str(n)}, slurm(n, 0)) for n in (0, 1)])
        == [[[0, 2, "all"], [1, 2, "all"]]] * 2
    )


def test_auto_without_an_environment_is_an_error_at_once():
    incomplete = {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://127.0.0.1:1"}
    for code, _, errors in run_workers([({"processes": "auto"}, more) for more in ({}, incomplete)]):
        assert code == 1
        assert "ConfigError: --processes auto needs processes that SLURM, Open MPI, Cloud TPU or GKE" in errors
        assert "--process-id" in errors and "Traceback" not in errors


# --- Scripts


def shellcheck(script: str) -> None:
    """Raises unless bash and ShellCheck understand a script and find no fault."""
    for command in (["bash", "-n"], [str(Path(sys.executable).parent / "shellcheck"), "--shell=bash", "-"]):
        done = subprocess.run(command, input=script, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_have_no_fault_that_bash_or_shellcheck_knows(name):
    shellcheck((SCALE / name).read_text(encoding="utf-8"))
    with pytest.raises(AssertionError, match="SC2086"):  # a fault is found
        shellcheck("#!/bin/bash\nrm $1\n")


class FakePrograms:
    """A folder of programs that note their arguments, with a checkout's recipes beside it."""

    def __init__(self, folder: Path):
        self.folder, self.bin, self.log = folder, folder / "bin", folder / "log"
        self.bin.mkdir()
        shutil.copytree(ROOT / "configs", folder / "configs")

    def add(self, name: str, then: str = "", path: Path | None = None) -> None:
        path = path or self.bin / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\nprintf '%s\\0' {name} \"$@\" $'\\n' >>'{self.log}'\n{then}\n")
        path.chmod(0o755)

    def environment(self, **more: str) -> dict[str, str]:
        return os.environ | {"PATH": f"{self.bin}:{os.environ['PATH']}"} | more

    def run(self, *command: str, **more: str) -> int:
        return subprocess.run(command, cwd=self.folder, env=self.environment(**more)).returncode

    def calls(self) -> list[list[str]]:
        """The calls since the last call of this method."""
        if not self.log.exists():
            return []
        found = [call.split("\0") for call in self.log.read_text().split("\0\n\0")[:-1]]
        self.log.unlink()
        return found

    def begin_run(self, run: str) -> None:
        (self.folder / run).mkdir(parents=True)
        write_config(read_config(ROOT / "configs" / "multi30k_en_de.yaml"), self.folder / run / "config.yaml")


@pytest.fixture
def programs(tmp_path, monkeypatch) -> FakePrograms:
    monkeypatch.chdir(tmp_path)
    return FakePrograms(tmp_path)


def understood(call: list[str]) -> tuple[ProcessGroup, str, bool, int]:
    """The processes, the run, whether it is resumed, and the row multiple that the arguments of train.py ask for."""
    flags, arguments = take_flags(call[call.index("train.py") + 1 :])
    config, resume = read_recipe(arguments, "train.py")
    return ProcessGroup.parse(flags), config.run, resume, config.batching.row_multiple


NODE = {
    "SLURM_JOB_ID": "7",
    "SLURM_NNODES": "2",
    "SLURM_GPUS_ON_NODE": "8",
    "SLURM_CPUS_PER_TASK": "4",
    "RUN": "runs/x",
}


def test_the_batch_script_starts_and_resumes(programs):
    programs.add("srun", f'echo "$JAX_LOCAL_DEVICE_IDS" >{programs.folder}/devices')
    assert programs.run("bash", str(SCALE / "slurm.sbatch"), "--mesh.data", "2", **NODE) == 0
    (call,) = programs.calls()
    assert understood(call) == (ProcessGroup("auto"), "runs/x", False, 16)
    assert call[-2:] == ["--mesh.data", "2"]
    assert (programs.folder / "devices").read_text() == "0,1,2,3,4,5,6,7\n"
    programs.begin_run("runs/x")
    assert programs.run("bash", str(SCALE / "slurm.sbatch"), **NODE) == 0
    assert understood(programs.calls()[0])[:3] == (ProcessGroup("auto"), "runs/x", True)


def test_the_batch_script_queues_itself_again_after_code_3_alone(programs):
    programs.add("scontrol")
    for code, state, again in (
        (0, "RUNNING", False),
        (2, "RUNNING", False),
        (3, "CANCELLED", False),
        (3, "RUNNING", True),
    ):
        programs.add("srun", f"exit {code}")
        programs.add("squeue", f"echo {state}")
        assert programs.run("bash", str(SCALE / "slurm.sbatch"), **NODE) == code
        assert (["scontrol", "requeue", "7"] in programs.calls()) == again


def test_the_batch_script_outlives_the_signal(programs):
    programs.add("scontrol")
    programs.add("squeue", "echo RUNNING")
    programs.add("srun", f"until [[ -e {programs.folder}/go ]]; do sleep 0.02; done; exit 3")
    command = ["bash", str(SCALE / "slurm.sbatch")]
    with subprocess.Popen(command, cwd=programs.folder, env=programs.environment(**NODE)) as script:
        while not programs.log.exists():
            time.sleep(0.02)
        script.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        (programs.folder / "go").touch()
    assert script.returncode == 3
    assert ["scontrol", "requeue", "7"] in programs.calls()


def test_the_script_of_a_slice_starts_and_resumes_on_all_workers(programs):
    of_slice = {"PROJECT": "p", "ZONE": "z", "SHARE": "10.0.0.2:/share", "RUN": str(programs.folder / "runs" / "a run")}
    programs.add("gcloud", "echo ACTIVE")
    programs.add("git")
    programs.add("python", path=programs.folder / "flax_transformer" / ".venv" / "bin" / "python")
    shutil.copytree(ROOT / "configs", programs.folder / "flax_transformer" / "configs")

    def call_of(*verb: str) -> list[str]:
        assert programs.run("bash", str(SCALE / "tpu_slice.sh"), *verb, **of_slice) == 0
        call = [call for call in programs.calls() if call[0] == "gcloud"][-1]
        assert {"--project=p", "--zone=z"} <= set(call)
        return call

    def command(call: list[str]) -> str:
        (text,) = [word.partition("=")[2] for word in call if word.startswith("--command=")]
        assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
        return text

    assert {"queued-resources", "create", "--spot", "--accelerator-type=v5litepod-16"} <= set(call_of("create"))
    assert "describe" in call_of("wait")
    install, begin = call_of("install"), call_of("start", "--mesh.fsdp", "4", "--model.num-layers", "1")
    assert "--worker=all" in install and "jax[tpu]" in command(install)
    assert "--worker=all" in begin and "--worker=0" in call_of("stop")
    for resume in (False, True):
        assert programs.run("bash", "-c", command(begin)) == 0
        while not programs.log.exists() or not programs.log.read_text().endswith("\n\0"):
            time.sleep(0.02)
        (call,) = programs.calls()
        assert call[-4:] == ["--mesh.fsdp", "4", "--model.num-layers", "1"]
        call = call[:-4]
        assert understood(call)[:3] == (ProcessGroup("auto"), of_slice["RUN"], resume)
        assert resume or understood(call)[3] == 16
        assert (programs.folder / "flax_transformer" / "train.pid").read_text().strip().isdigit()
        if not resume:
            programs.begin_run("runs/a run")
    assert programs.run("bash", str(SCALE / "tpu_slice.sh"), "begin", **of_slice) == 2


# --- JobSets

# Public fields of JobSet v1alpha2 and of a pod, as far as they may be needed. "!" marks those that must be there.
NAMED = {"name!": str, "value!": str}
CONTAINER = {
    "name!": str, "image!": str, "command": [str], "args": [str], "workingDir": str, "env": [NAMED],
    "ports": [{"containerPort!": int, "name": str, "protocol": ("TCP", "UDP")}],
    "resources": {"limits": {"*": int}, "requests": {"*": int}},
    "volumeMounts": [{"name!": str, "mountPath!": str, "readOnly": bool, "subPath": str}],
}  # fmt: skip
VOLUME = {
    "name!": str, "persistentVolumeClaim": {"claimName!": str, "readOnly": bool},
    "emptyDir": {"medium": ("", "Memory"), "sizeLimit": str},
}  # fmt: skip
POD = {
    "containers!": [CONTAINER], "restartPolicy!": ("Never", "OnFailure"), "terminationGracePeriodSeconds": int,
    "nodeSelector": {"*": str},
    "tolerations": [{"key": str, "operator": ("Exists", "Equal"), "value": str, "effect": str}],
    "volumes": [VOLUME], "hostNetwork": bool, "dnsPolicy": str,
}  # fmt: skip
METADATA = {"name": str, "labels": {"*": str}, "annotations": {"*": str}}
JOB = {
    "completionMode!": ("Indexed",), "completions!": int, "parallelism!": int, "backoffLimit!": int,
    "activeDeadlineSeconds": int, "template!": {"metadata": METADATA, "spec!": POD},
}  # fmt: skip
JOBSET = {
    "apiVersion!": ("jobset.x-k8s.io/v1alpha2",),
    "kind!": ("JobSet",),
    "metadata!": METADATA | {"name!": str},
    "spec!": {
        "network": {"enableDNSHostnames": bool, "subdomain": str, "publishNotReadyAddresses": bool},
        "failurePolicy": {"maxRestarts": int, "restartStrategy": ("Recreate", "BlockingRecreate", "InPlaceRestart")},
        "replicatedJobs!": [{"name!": str, "replicas": int, "template!": {"metadata": METADATA, "spec!": JOB}}],
        "suspend": bool,
        "ttlSecondsAfterFinished": int,
    },
}


def faults(value: Any, schema: Any, place: str = "") -> list[str]:
    """What is wrong with a value: places with fields that are unknown, missing or of another type."""
    if isinstance(schema, type):
        return [] if type(value) is schema else [f"{place}: expected {schema.__name__}, got {value!r}"]
    if isinstance(schema, tuple):
        return [] if value in schema else [f"{place}: expected one of {schema}, got {value!r}"]
    if isinstance(schema, list):
        if not isinstance(value, list):
            return [f"{place}: expected a list"]
        return [fault for i, each in enumerate(value) for fault in faults(each, schema[0], f"{place}[{i}]")]
    if not isinstance(value, dict):
        return [f"{place}: expected fields"]
    fields = {name.rstrip("!"): of for name, of in schema.items()}
    found = [f"{place}.{name[:-1]} is missing" for name in schema if name.endswith("!") and name[:-1] not in value]
    found += [f"{place}.{name} is unknown" for name in value if name not in fields and "*" not in fields]
    for name in value.keys() & (value.keys() if "*" in fields else fields.keys()):
        found += faults(value[name], fields.get(name, fields.get("*")), f"{place}.{name}")
    return found


def jobset(name: str) -> dict:
    return yaml.safe_load((SCALE / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", JOBSETS)
def test_a_jobset_has_only_fields_of_its_schema(name):
    read = jobset(name)
    assert not faults(read, JOBSET)
    job = read["spec"]["replicatedJobs"][0]["template"]["spec"]
    job["completions"], job["parallelisms"] = "2", job.pop("parallelism")  # such faults are found
    assert len(faults(read, JOBSET)) == 3


@pytest.mark.parametrize("name", JOBSETS)
def test_what_a_jobset_says_twice_agrees(name):
    read = jobset(name)
    (workers,) = read["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    settings = {each["name"]: each["value"] for each in container["env"]}
    ports = [port["containerPort"] for port in container["ports"]]
    num_nodes, (devices,) = job["completions"], container["resources"]["limits"].values()
    assert num_nodes == job["parallelism"] > 1 and workers["replicas"] == 1
    assert job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"  # one failure is noticed at once
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert int(settings["ROW_MULTIPLE"]) % (num_nodes * devices) == 0
    assert settings["RUN"].startswith("/share/") and "/share" in {
        mount["mountPath"] for mount in container["volumeMounts"]
    }
    if name == "jobset.yaml":
        host = f"{read['metadata']['name']}-{workers['name']}-0-0.{read['spec']['network']['subdomain']}"
        assert settings["COORDINATOR"] in {f"{host}:{port}" for port in ports} and settings["NODES"] == str(num_nodes)
    else:
        sides = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
        assert math.prod(sides) == num_nodes * devices
        assert int(cloud_tpu_cluster.coordinator_port) in ports


@pytest.mark.parametrize("name", JOBSETS)
def test_a_pod_starts_and_resumes(name, programs):
    job = jobset(name)["spec"]["replicatedJobs"][0]["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    shellcheck(
        "#!/bin/bash\n"
        + "".join(f"export {each['name']}={each['value']}\n" for each in container["env"])
        + container["args"][0]
    )
    settings = {each["name"]: each["value"] for each in container["env"]} | {
        "RUN": "runs/x",
        "JOB_COMPLETION_INDEX": "1",
    }
    programs.add("python")
    expected = ProcessGroup("auto", seconds_to_join=1800)
    if name == "jobset.yaml":
        expected = ProcessGroup(job["completions"], 1, settings["COORDINATOR"], 1800)
    for resume in (False, True):
        assert programs.run(*container["command"], *container["args"], **settings) == 0
        found = understood(programs.calls()[0])
        assert found[:3] == (expected, "runs/x", resume)
        assert resume or found[3] == int(settings["ROW_MULTIPLE"])
        if not resume:
            programs.begin_run("runs/x")
