"""The Slurm and Kubernetes examples start a job: what they run is run here, with the schedulers' part played by the test."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dmd_ds.recipe import REPOSITORY, dump_recipe
from tests.distributed.launch import free_port, metrics
from tests.mini import make_recipe

FAKE_SRUN = """#!/usr/bin/env bash
# two tasks on two nodes of one, as srun would start them
[[ $1 == --kill-on-bad-exit=1 ]] || exit 9
shift
for task in 0 1; do SLURM_PROCID=$task SLURM_NODEID=$task SLURM_LOCALID=0 SLURM_NTASKS=2 "$@" & tasks+=($!); done
for task in "${tasks[@]}"; do wait "$task" || code=$?; done
exit "${code:-0}"
"""


@pytest.fixture
def recipe(tmp_path):
    return make_recipe(tmp_path, data={"batch_size": 1}, max_steps=2)


def recipe_file(recipe, folder: Path) -> str:
    (folder / "mini.yaml").write_text(dump_recipe(recipe))
    return str(folder / "mini.yaml")


def assert_two_ranks_trained(recipe, output: str) -> None:
    assert "2 ranks x batch 1" in output, output
    assert [line["step"] for line in metrics(recipe)] == [1, 2]


def test_the_slurm_script_starts_a_task_a_rank(tmp_path, recipe):
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "srun").write_text(FAKE_SRUN)
    (tools / "scontrol").write_text("#!/usr/bin/env bash\n[[ $* == 'show hostnames here[1-2]' ]] && echo 127.0.0.1 && echo other\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "here[1-2]", "OMP_NUM_THREADS": "1"}
    environment["MASTER_PORT"] = str(free_port())
    command = ["bash", "hostfiles/slurm.sbatch", recipe_file(recipe, tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_two_ranks_trained(recipe, done.stdout)


def test_the_kubernetes_job_runs_a_node_a_pod(tmp_path, recipe):
    service, job = yaml.safe_load_all((REPOSITORY / "hostfiles" / "kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    container = pod["containers"][0]
    given = {variable["name"]: variable["value"] for variable in container["env"]}
    hosts = [line.split() for line in (REPOSITORY / given["HOSTFILE"]).read_text().splitlines()]
    assert len(hosts) == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert {slots for _, slots in hosts} == {f"slots={container['resources']['limits']['nvidia.com/gpu']}"}
    # a pod of an indexed Job is called JOB-INDEX, and SUBDOMAIN must be the headless service's name
    assert given["MASTER_ADDR"] == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert pod["subdomain"] == service["metadata"]["name"] and service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}

    (tmp_path / "hostfile").write_text("pod-0 slots=1\npod-1 slots=1\n")
    played = {"HOSTFILE": str(tmp_path / "hostfile"), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    played |= {"TRAIN": recipe_file(recipe, tmp_path), "OMP_NUM_THREADS": "1"}
    assert set(given) <= set(played)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    pods = [
        subprocess.Popen(
            container["command"] + container["args"],
            cwd=REPOSITORY,
            env={**os.environ, **played, "PATH": path, "JOB_COMPLETION_INDEX": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    outputs = [pod.communicate(timeout=300)[0] for pod in pods]
    assert [pod.returncode for pod in pods] == [0, 0], "\n".join(outputs)
    assert_two_ranks_trained(recipe, outputs[0])
