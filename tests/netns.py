"""Two machines on this one: network namespaces that a pair of virtual interfaces joins.

    with two_machines() as (first, second):
        subprocess.Popen(first.command("./launch_multi_node.sh", ...))      # first.address: 10.77.0.1

Addresses, loopback and ports are their own, so that what only works at home does not work here. The host name
is the same for both, as on real machines that were made from one image. It needs root and iproute2.
"""

import contextlib
import os
import shutil
import subprocess
from dataclasses import dataclass


@dataclass
class Machine:
    name: str
    address: str

    def command(self, *tokens):
        """What runs these tokens on this machine."""
        return ["ip", "netns", "exec", self.name, *map(str, tokens)]


def ip(*tokens):
    subprocess.run(["ip", *tokens], check=True, capture_output=True, text=True)


def missing():
    """Why there are no namespaces here, in words; None where there are."""
    if os.geteuid() != 0:
        return "network namespaces are made by root only"
    if not shutil.which("ip"):
        return "ip not found: bash tests/run.sh --all installs iproute2"
    try:
        with two_machines():
            return None
    except subprocess.CalledProcessError as error:
        return f"no network namespaces here: {error.stderr.strip()}"


@contextlib.contextmanager
def two_machines():
    machines = [Machine(f"fsdp-{os.getpid()}-{index}", f"10.77.0.{index}") for index in (1, 2)]
    links = [f"fsdp{os.getpid()}-{index}" for index in (1, 2)]  # names of interfaces have 15 letters at most
    try:
        for machine in machines:
            ip("netns", "add", machine.name)
        ip("link", "add", links[0], "type", "veth", "peer", "name", links[1])
        for machine, link in zip(machines, links):
            ip("link", "set", link, "netns", machine.name)
            ip("-n", machine.name, "addr", "add", f"{machine.address}/24", "dev", link)
            ip("-n", machine.name, "link", "set", link, "up")
            ip("-n", machine.name, "link", "set", "lo", "up")
        yield machines
    finally:
        # The interfaces end with their namespaces.
        for machine in machines:
            subprocess.run(["ip", "netns", "del", machine.name], capture_output=True)
        subprocess.run(["ip", "link", "del", links[0]], capture_output=True)
