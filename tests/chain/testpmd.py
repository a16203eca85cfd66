# SPDX-License-Identifier: Apache-2.0
"""DPDK's testpmd in a container: run until it has forwarded packets, and what it counted, in its own words."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

from tests.chain.innervm import Done
from tests.chain.vmruntime import GuestContainer

# testpmd shows its counters each second until it is interrupted: when what it was started for has happened, or when it
# reports that it has no ports. Everything it prints goes through.
READER = """\
/NIC statistics for port/ {{ port = $6 }}
/RX-packets:/ && port != "" {{ rx[port] = $2 }}
/TX-packets:/ && port != "" {{ tx[port] = $2; if ({condition}) stop() }}
/No probed ethernet devices/ {{ stop() }}
{{ print }}
function stop() {{ if (!stopped++) system("{kill} INT") }}
function count_busy(  port, busy) {{ for (port in rx) busy += rx[port] > 0 && tx[port] > 0; return busy }}
function read_number(file,  number) {{ getline number <file; close(file); return number + 0 }}
"""
# Two ports have each received and sent.
BOTH_BUSY = "count_busy() == 2"
# Its summary at the end.
COUNTERS = re.compile(
    r"Forward statistics for port (\d+) .*\n\s*RX-packets: (\d+).*\n\s*TX-packets: (\d+)", re.MULTILINE
)


@dataclass(frozen=True)
class Counters:
    """Packets that one port has received and sent."""

    received: int
    sent: int


def run_testpmd(container: GuestContainer, condition: str = BOTH_BUSY) -> Done:
    """Run a container with testpmd until a condition holds, in the words of READER."""
    script = READER.format(condition=condition, kill=container.command("kill"))
    return container.vm.execute(container.run_script(f"awk {shlex.quote(script)}"))


def read_counters(output: str) -> dict[str, Counters]:
    """Return testpmd's forward statistics, by port; none where it forwarded nothing."""
    return {port: Counters(int(received), int(sent)) for port, received, sent in COUNTERS.findall(output)}


def is_forwarding(counters: dict[str, Counters]) -> bool:
    """Return whether two ports have both received and sent packets."""
    return len(counters) == 2 and all(port.received > 0 and port.sent > 0 for port in counters.values())
