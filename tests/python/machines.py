"""Several machines in one: network namespaces, joined by a network of limited bandwidth and given delay.

Linux's own means of delay (netem) is not in every kernel. Here each machine has a TUN device, whose packets come to
this process; a thread hands them to their machine when their time has come. What a machine sends is limited by the
kernel (tbf).

As a program it runs one rank on each machine, for example to hold a cost model against a network that one knows:

    python tests/python/machines.py --machines 3 --delay 0.005 --rate 100mbit -- \\
        python -m benchmarks.distributed.collectives
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import fcntl
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

_DEVICE = "link0"
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


class CannotMakeMachinesError(Exception):
    """What is missing here."""


class Machines:
    """Use it in a ``with`` block.

    Args:
        count: how many.
        delay: seconds that a packet takes from one machine to the other.
        rate: bandwidth of what each machine sends, as tc writes it, for example ``100mbit``.

    Attributes:
        addresses: IP addresses of the machines.

    Raises:
        CannotMakeMachinesError: no root, no iproute2, or a kernel without namespaces, TUN or tbf.
    """

    def __init__(self, count: int, delay: float, rate: str) -> None:
        self.addresses = [f"10.77.0.{1 + number}" for number in range(count)]
        self._delay, self._rate = delay, rate
        self._names = [f"momentum-bn-{os.getpid()}-{number}" for number in range(count)]
        self._devices: list[int] = []
        self._processes: list[subprocess.Popen[str]] = []
        self._stop_reader, self._stop_writer = os.pipe()
        self._relay = threading.Thread(target=self._pass_packets_on, daemon=True)

    def __enter__(self) -> Machines:
        try:
            for name, address in zip(self._names, self.addresses, strict=True):
                _ip("netns", "add", name)
                _ip("-n", name, "link", "set", "lo", "up")
                _ip("-n", name, "tuntap", "add", "dev", _DEVICE, "mode", "tun")
                _ip("-n", name, "addr", "add", f"{address}/24", "dev", _DEVICE)
                _ip("-n", name, "link", "set", _DEVICE, "up")
                shape = f"root tbf rate {self._rate} burst 64kb latency 500ms".split()
                _run("tc", "-n", name, "qdisc", "add", "dev", _DEVICE, *shape)
            self._devices = [_open_device(name) for name in self._names]
        except CannotMakeMachinesError:
            self._remove()
            raise
        self._relay.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        os.write(self._stop_writer, b".")
        self._relay.join()
        self._remove()

    def start(
        self, machine: int, command: Sequence[str], output: Path, environment: Mapping[str, str]
    ) -> subprocess.Popen[str]:
        """Starts a command on one of the machines, from 0 on, both of its outputs going to a file."""
        with output.open("w") as file:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self._names[machine], *command],
                stdout=file,
                stderr=subprocess.STDOUT,
                text=True,
                env={**os.environ, "GLOO_SOCKET_IFNAME": _DEVICE, "TP_SOCKET_IFNAME": _DEVICE, **environment},
                start_new_session=True,
            )
        self._processes.append(process)
        return process

    def _pass_packets_on(self) -> None:
        device_of = {
            socket.inet_aton(address): device for address, device in zip(self.addresses, self._devices, strict=True)
        }
        waiting: collections.deque[tuple[float, int, bytes]] = collections.deque()  # in the order of their time
        while True:
            now = time.monotonic()
            while waiting and waiting[0][0] <= now:
                _, to, packet = waiting.popleft()
                os.write(to, packet)
            timeout = waiting[0][0] - now if waiting else None
            ready, _, _ = select.select([*self._devices, self._stop_reader], [], [], timeout)
            if self._stop_reader in ready:
                return
            for device in ready:
                packet = os.read(device, 65536)
                to = device_of.get(packet[16:20])  # of IPv4; nobody waits for the kernel's IPv6 announcements
                if to is not None:
                    waiting.append((time.monotonic() + self._delay, to, packet))

    def _remove(self) -> None:
        for device in (*self._devices, self._stop_reader, self._stop_writer):
            os.close(device)
        for name in self._names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise CannotMakeMachinesError(f"{command[0]} is missing (Debian's iproute2)") from None
    if done.returncode != 0:
        raise CannotMakeMachinesError(f"{' '.join(command)}: {done.stderr.strip()}")


def _ip(*arguments: str) -> None:
    _run("ip", *arguments)


def _open_device(namespace: str) -> int:
    """The file by which the packets of a namespace's device are read and written."""
    opened: list[int | OSError] = []

    def open_there() -> None:  # a thread of its own: it moves to the namespace and ends
        try:
            with open(f"/run/netns/{namespace}") as file:
                if _libc.setns(file.fileno(), _CLONE_NEWNET) != 0:
                    raise OSError(ctypes.get_errno(), "setns")
            device = os.open("/dev/net/tun", os.O_RDWR)
            fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH", _DEVICE.encode(), _IFF_TUN | _IFF_NO_PI))
            opened.append(device)
        except OSError as error:
            opened.append(error)

    thread = threading.Thread(target=open_there)
    thread.start()
    thread.join()
    if isinstance(opened[0], OSError):
        raise CannotMakeMachinesError(f"/dev/net/tun: {opened[0]}")
    return opened[0]


def main() -> int:
    """Runs one rank of torch.distributed on each machine; prints what the first one wrote."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machines", type=int, default=2)
    parser.add_argument("--delay", type=float, default=0.005, help="seconds, in each direction")
    parser.add_argument("--rate", default="100mbit", help="bandwidth of what each machine sends")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, Machines(options.machines, options.delay, options.rate) as machines:
        outputs = [Path(folder) / str(number) for number in range(options.machines)]
        meeting = {"MASTER_ADDR": machines.addresses[0], "MASTER_PORT": "29500", "WORLD_SIZE": str(options.machines)}
        ranks = [
            machines.start(
                number, options.command, outputs[number], {**meeting, "RANK": str(number), "LOCAL_RANK": "0"}
            )
            for number in range(options.machines)
        ]
        codes = [rank.wait() for rank in ranks]
        failed = next((number for number, code in enumerate(codes) if code), 0)
        print(outputs[failed].read_text(), end="")
    return codes[failed]


if __name__ == "__main__":
    sys.exit(main())
