"""Two host names that both are this machine: two sshd on loopback addresses, with keys, port and settings of their own."""

import contextlib
import getpass
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.distributed.launch import free_port

HOSTS = {"machine-a": "127.0.0.2", "machine-b": "127.0.0.3"}
TOOLS = {"sshd": "openssh-server", "pdsh": "pdsh"}  # command: Debian package


def need_tools() -> None:
    """Installs what is missing where it can be installed, and skips with the reason where it cannot."""
    os.environ["PATH"] += ":/usr/sbin"
    missing = [package for command, package in TOOLS.items() if not shutil.which(command)]
    if not missing:
        return
    if os.geteuid() or not shutil.which("apt-get"):
        pytest.skip(f"needs the Debian packages {' and '.join(missing)}, and this is not root on a machine with apt-get")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(["apt-get", "update", "-q"], env=environment, capture_output=True)
    install = subprocess.run(["apt-get", "install", "-qy", *missing], env=environment, capture_output=True, text=True)
    if install.returncode:
        pytest.skip(f"apt-get cannot install {' and '.join(missing)}: {install.stderr.strip().splitlines()[-1]}")


@contextlib.contextmanager
def ssh_hosts(folder: Path):
    """The environment under which ssh and pdsh reach both hosts; the sshd are gone afterwards."""
    need_tools()
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # where sshd of root locks itself in
    for name in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    shutil.copy(folder / "user_key.pub", folder / "authorized_keys")
    port = free_port()
    servers, client = [], []
    for host, address in HOSTS.items():
        config = folder / f"{host}.sshd"
        config.write_text(
            f"ListenAddress {address}\nPort {port}\nHostKey {folder}/host_key\nAuthorizedKeysFile {folder}/authorized_keys\n"
            f"PidFile {folder}/{host}.pid\nStrictModes no\nUsePAM no\nPermitRootLogin yes\nPasswordAuthentication no\n"
            "SetEnv OMP_NUM_THREADS=1\n"
        )
        servers.append(subprocess.Popen([shutil.which("sshd"), "-D", "-e", "-f", str(config)], stderr=(folder / f"{host}.log").open("w")))
        client.append(
            f"Host {host}\n  HostName {address}\n  Port {port}\n  User {getpass.getuser()}\n  IdentityFile {folder}/user_key\n"
            "  IdentitiesOnly yes\n  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n  ConnectTimeout 10\n"
        )
    (folder / "ssh_config").write_text("\n".join(client))
    try:
        for host in HOSTS:
            wait_for(["ssh", "-F", str(folder / "ssh_config"), host, "true"], (folder / f"{host}.log"))
        yield {**os.environ, "PDSH_SSH_ARGS_APPEND": f"-F {folder}/ssh_config", "OMP_NUM_THREADS": "1"}
    finally:
        for server in servers:
            server.terminate()
            server.wait(timeout=10)


def wait_for(command: list[str], log: Path) -> None:
    deadline = time.monotonic() + 20
    while subprocess.run(command, capture_output=True).returncode:
        assert time.monotonic() < deadline, f"{command} fails: {log.read_text()}"
        time.sleep(0.2)
