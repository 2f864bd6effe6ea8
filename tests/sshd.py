"""A real sshd on a loopback port, with a host key, a user's key and a home folder made for the test."""

import getpass
import os
import shlex
import shutil
import socket
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from quick_runs import free_port

SSHD = shutil.which("sshd", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")


def skip_without_sshd():
    missing = [name for name in ("ssh", "ssh-keygen", "rsync", "git", "setsid") if not shutil.which(name)]
    missing += [] if SSHD else ["sshd"]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: bash tests/run.sh --all installs ssh, sshd and rsync")


def has_ipv6():
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


@contextmanager
def sshd(folder, **variables):
    """Yields {port, user, home, options}: `options` are ssh's, as one text, and leave ~/.ssh alone.

    Sessions are those of the tests' own user, with folder/home as HOME, and `variables` set.
    """
    folder.mkdir(parents=True, exist_ok=True)
    home = folder / "home"
    home.mkdir(exist_ok=True)
    for name in ("host_key", "user_key"):
        if not (folder / name).exists():
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # sshd wants it when root starts it
    port = free_port()
    addresses = ["127.0.0.1", *(["::1"] if has_ipv6() else [])]
    values = {"HOME": str(home), **variables}
    hosts = ",".join(f"[{address}]:{port}" for address in addresses)
    (folder / "known_hosts").write_text(f"{hosts} {(folder / 'host_key.pub').read_text()}")
    (folder / "sshd_config").write_text("\n".join([
        f"Port {port}", *(f"ListenAddress {address}" for address in addresses),
        f'HostKey "{folder}/host_key"', "PidFile none", "UsePAM no",
        f'AuthorizedKeysFile "{folder}/user_key.pub"', "StrictModes no",
        "PasswordAuthentication no", "KbdInteractiveAuthentication no", "PermitRootLogin yes",
        "SetEnv " + " ".join(f'"{name}={value}"' for name, value in values.items()), ""]))
    with open(folder / "sshd.log", "a") as log:
        server = subprocess.Popen([SSHD, "-D", "-e", "-f", folder / "sshd_config"], stdout=log, stderr=log)
    try:
        wait_for_port(port, server, folder / "sshd.log")
        options = ["-F", "none", "-i", str(folder / "user_key"), "-o", "IdentitiesOnly=yes",
                   "-o", f'UserKnownHostsFile="{folder}/known_hosts"']
        yield {"port": port, "user": getpass.getuser(), "home": home, "options": shlex.join(options)}
    finally:
        server.terminate()
        server.wait()


def wait_for_port(port, server, log):
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert server.poll() is None, log.read_text()
        time.sleep(0.05)
    raise AssertionError(f"sshd does not listen: {log.read_text()}")
