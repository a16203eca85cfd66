# SPDX-License-Identifier: Apache-2.0
"""Bind devices to vfio-pci, and restore their drivers from the undo log.

Each change is first recorded in the undo log. What to restore comes from the undo log alone, so undoing is the same
after a failure, at poststop, and in the next hook after a kill; sysfs is read only to see whether the device is the
same one and its override still the hook's. Every undo is idempotent.
"""

from __future__ import annotations

import errno
import os

from oci_hooks.findings import Finding, StepError
from oci_hooks.guest.apply.sysfs_writer import Job, Result, Write, run_jobs
from oci_hooks.guest.plan import DRIVER, Rebind
from oci_hooks.guest.undo_log import UNDOING, describe_undo, parse_instance
from oci_hooks.linux import pci
from oci_hooks.linux.instances import GONE, read_instance
from oci_hooks.system import step

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from oci_hooks.guest.undo_log import Entry, UndoLog
    from oci_hooks.linux.instances import Instance
    from oci_hooks.system import Deadline, Root

# Codes of findings on changes that a later hook can still undo: the claim stays, with its groups, for that hook.
UNFINISHED = ("unbind-blocked", "restore-unstarted", "permission-left")


# Drivers -------------------------------------------------------------------------------------------------------------


def bind_devices(
    root: Root, rebinds: Iterable[Rebind], undo_log: UndoLog, deadline: Deadline, while_waiting: Callable[[], None]
) -> None:
    """Bind PCI functions to vfio-pci, in parallel, and read back that they are bound. Raises StepError.

    while_waiting: called while the kernel binds.
    """
    rebinds = tuple(rebinds)
    for rebind in rebinds:
        identity = rebind.instance.as_dict().values()
        undo_log.add("device", rebind.address, rebind.driver, rebind.override, *identity)
    jobs = [make_job(root, rebind.address, rebind.instance, make_bind_writes(root, rebind)) for rebind in rebinds]
    for rebind, result in zip(rebinds, root.do(run_jobs, jobs, deadline, (), while_waiting)):
        check_bound(root, rebind, result, deadline)


def make_job(root: Root, address: str, instance: Instance, writes: Iterable[Write]) -> Job:
    """Return the writes to one device as a job that does not write to a device that has replaced it."""
    return Job(address, tuple(writes), root.host_path(f"{pci.PCI_DEVICES}/{address}"), instance.inode)


def is_still_at(root: Root, address: str, instance: Instance) -> bool:
    """Return whether a device is still at its address: neither unplugged nor replaced by another one."""
    return instance.inode != 0 and pci.read_inode(root, f"{pci.PCI_DEVICES}/{address}") == instance.inode


def make_bind_writes(root: Root, rebind: Rebind) -> tuple[Write, ...]:
    """Return the writes that bind a function to vfio-pci (Documentation/ABI/testing/sysfs-bus-pci)."""
    path = root.host_path(f"{pci.PCI_DEVICES}/{rebind.address}")
    override = Write(f"{path}/driver_override", f"{DRIVER}\n")
    # Even if it has no driver: a hot-plugged device gets one some milliseconds later. GONE: the driver or the device
    # may already be gone.
    unbind = Write(f"{path}/driver/unbind", rebind.address, GONE)
    return override, unbind, make_probe_write(root, rebind.address)


def make_probe_write(root: Root, address: str) -> Write:
    """Return the write that makes the kernel look for a driver for a function."""
    # Its errno is of no use: the kernel also succeeds if no driver binds, so the driver link is read back.
    path = root.host_path("/sys/bus/pci/drivers_probe")
    return Write(path, address, (errno.EBUSY, errno.EINVAL, errno.EPERM, errno.EAGAIN, 517))


def check_bound(root: Root, rebind: Rebind, result: Result, deadline: Deadline) -> None:
    """Raise StepError if a function is not bound to vfio-pci, after retrying transient failures."""
    address = rebind.address
    if result.blocked:
        driver = f" from {rebind.driver}" if rebind.driver else ""
        problem = f"unbinding{driver} did not complete within {deadline.seconds:g} s"
        hint = "see dmesg; stop what uses the device and start the container again"
        raise StepError("unbind-blocked", address, problem, hint)
    if not is_still_at(root, address, rebind.instance):
        raise StepError("device-gone", address, "was unplugged while it was being bound", "start the container again")
    if not result.started:
        problem = f"cannot start the helper process that binds the driver: {os.strerror(result.code)}"
        hint = "check the limits on processes and open files of the hook's cgroup and of the guest"
        raise StepError("bind-failed", address, problem, hint)
    if result.code:
        problem = f"cannot write to {result.path}: {os.strerror(result.code)}"
        raise StepError("bind-failed", address, problem, "see dmesg")
    driver = pci.read_driver(root, address)
    if driver != DRIVER:
        driver = probe_again(root, rebind, deadline)
    if driver != DRIVER:
        now = f"is bound to {driver}" if driver else "has no driver"
        problem = f"{DRIVER} did not bind to the device, which now {now}"
        raise StepError("bind-failed", address, problem, f"see the messages about {address} in dmesg")


@step("probe-again")
def probe_again(root: Root, rebind: Rebind, deadline: Deadline) -> str:
    """Retry the probe of a function for a short time, and return the driver that it has then."""
    from oci_hooks.schema import load_site_packages

    address = rebind.address

    def probe() -> str:
        root.do(run_jobs, [make_job(root, address, rebind.instance, (make_probe_write(root, address),))], deadline)
        return pci.read_driver(root, address)

    load_site_packages()
    try:
        import tenacity
    except ImportError:
        # One retry is enough in most cases.
        found = probe()
        if found:
            return found
        problem = (
            f"{DRIVER} did not bind to the device, and retrying needs the package tenacity, which is not installed"
        )
        raise StepError("bind-failed", address, problem, "see dmesg; apt install python3-tenacity") from None
    # A device whose old driver is still being torn down is free after some tens of milliseconds, or not at all.
    seconds = min(1.0, deadline.remaining() / 2)
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_result(lambda driver: driver == ""),
        wait=tenacity.wait_exponential(multiplier=0.02, max=0.3),
        stop=tenacity.stop_after_delay(seconds),
        # tenacity 6 passes the argument by the name of the parameter.
        retry_error_callback=lambda retry_state: retry_state.outcome.result() if retry_state.outcome else "",
    )
    driver: str = retrying(probe)
    return driver


# Undoing -------------------------------------------------------------------------------------------------------------


def undo(
    root: Root, entries: Iterable[Entry], pid: int, deadline: Deadline, close_fds: tuple[int, ...] = ()
) -> list[Finding]:
    """Undo the changes in an undo log, last change first, and return what could not be undone.

    guest/permits.py has revoked the permissions before, as these concern all claims. pid: the container's init, 0 if it
    is gone: a process left of it still sees the nodes in its mount namespace, but cannot open them; close_fds:
    descriptors that a hanging child must not keep. A finding with a code of UNFINISHED means that the undo log must
    stay.
    """
    findings: list[Finding] = []
    entries = tuple(entries)
    for entry in reversed(entries):
        try:
            undo_entry(root, entry, pid)
        except StepError as error:
            findings += error.findings
        except (OSError, ValueError) as error:
            findings.append(explain_undo(entry, error))
    return findings + restore_drivers(root, [entry for entry in entries if entry.kind == "device"], deadline, close_fds)


def explain_undo(entry: Entry, error: Exception) -> Finding:
    """Return the error for a change in the container that could not be undone."""
    action, path, where = describe_undo(entry)
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    hint = f"{action} it by hand, or end the container"
    return Finding("error", "undo-failed", path, f"cannot {action} it {where}: {reason}", hint)


@step("undo")
def undo_entry(root: Root, entry: Entry, pid: int) -> None:
    """Undo one change in the container. Raises OSError, StepError."""
    from oci_hooks.guest.apply import nodes

    if entry.kind in UNDOING:
        nodes.undo(entry, pid)


def restore_drivers(
    root: Root, entries: list[Entry], deadline: Deadline, close_fds: tuple[int, ...] = ()
) -> list[Finding]:
    """Bind functions to the drivers that they had, in parallel, and return what went wrong."""
    # A function that a later run bound again returns to the state in its first entry.
    before = {(entry.words[0], parse_instance(entry)): entry for entry in reversed(entries)}
    jobs, wanted, findings = [], {}, []
    for address in dict.fromkeys(address for address, _ in before):
        try:
            found = read_instance(root, address)
            override = pci.read_override(root, address) if found else ""
        except OSError as error:
            problem, hint = (
                f"cannot be read in sysfs: {error.strerror}",
                "the next run of the hook in this guest tries again",
            )
            findings.append(Finding("error", "restore-unstarted", address, problem, hint))
            continue
        if found is None:
            continue  # unplugged: nothing is left to restore
        known, current = before.get((address, found)), pci.read_driver(root, address)
        if known is None:
            findings.append(warn_device_replaced(address, found))
        elif is_own_override(known, override):
            jobs.append(make_job(root, address, found, make_restore_writes(root, known, current)))
            wanted[address] = known
        elif not is_untouched(known, current, override):
            findings.append(warn_override_changed(known, override))
    for result in root.do(run_jobs, jobs, deadline, close_fds):
        findings += check_restored(root, result, wanted[result.address])
    return findings


def is_untouched(entry: Entry, driver: str, override: str) -> bool:
    """Return whether nothing remains to be restored: the hook was killed before its first write, or after its last.

    driver, override: the present ones. A driver may have bound to the device meanwhile, as happens to a new device.
    """
    return override == entry.words[2] and driver != DRIVER


def is_own_override(entry: Entry, override: str) -> bool:
    """Return whether a function's override is one that the hook wrote, when it bound or restored the function."""
    return override == DRIVER or override == entry.words[1] != ""


def make_restore_writes(root: Root, entry: Entry, current: str) -> Iterator[Write]:
    """Yield the writes that return a function to its original driver. current: its present driver."""
    address, driver, override = entry.words[:3]
    path = root.host_path(f"{pci.PCI_DEVICES}/{address}")
    if current != driver:
        # An override by name restores exactly the original driver, not the first one that matches.
        if driver:
            yield Write(f"{path}/driver_override", f"{driver}\n")
        if current:
            yield Write(f"{path}/driver/unbind", address, GONE)
        if driver:
            yield make_probe_write(root, address)
    yield Write(f"{path}/driver_override", f"{override}\n")


def warn_device_replaced(address: str, found: Instance) -> Finding:
    """Return the warning for another device at the address of the one that was bound."""
    problem = "was unplugged after it was bound; the device that has this address now"
    problem += f" ({found.vendor}:{found.device}, class {found.class_code}) is left unchanged"
    return Finding("warning", "device-replaced", address, problem, "nothing is left to restore")


def warn_override_changed(entry: Entry, override: str) -> Finding:
    """Return the warning for a device whose override was changed by another program."""
    address, driver, before = entry.words[:3]
    problem = f"its driver_override is {override or 'unset'}, not what the hook wrote: the device is left unchanged"
    path = f"{pci.PCI_DEVICES}/{address}/driver_override"
    back = f"driverctl set-override {address} {driver}" if driver else f"echo '{before}' > {path}"
    return Finding("warning", "override-changed", address, problem, f"to restore its earlier state: {back}")


def make_restore_error(address: str, problem: str) -> Finding:
    """Return the error for a device that was not restored."""
    return Finding("error", "restore-failed", address, problem, f"see {pci.PCI_DEVICES}/{address}/driver_override")


def check_restored(root: Root, result: Result, entry: Entry) -> list[Finding]:
    """Return a finding if a function does not have its original driver again."""
    address, driver = entry.words[:2]
    if result.blocked:
        problem = f"unbinding from {DRIVER} is blocked in the kernel"
        hint = "see dmesg; the next run of the hook in this guest tries again"
        return [Finding("error", "unbind-blocked", address, problem, hint)]
    if not result.started:
        what = f"restores its driver {driver}" if driver else f"unbinds it from {DRIVER}"
        problem = f"cannot start the helper process that {what}: {os.strerror(result.code)}"
        hint = "check the limits on processes and open files; the next run of the hook in this guest tries again"
        return [Finding("error", "restore-unstarted", address, problem, hint)]
    path = f"{pci.PCI_DEVICES}/{address}"
    current = pci.read_driver(root, address)
    if not is_still_at(root, address, parse_instance(entry)) or (current == driver and not result.code):
        return []
    if current == driver:
        return [make_restore_error(address, f"cannot write to {result.path}: {os.strerror(result.code)}")]
    now = f"is bound to {current}" if current else "has no driver"
    problem = f"could not restore {f'driver {driver}' if driver else 'its earlier state, no driver'}; the device {now}"
    problem += f" ({os.strerror(result.code)})" if result.code else ""
    hint = f"bind it with: driverctl set-override {address} {driver}"
    if not driver:
        hint = f"unbind it with: echo {address} > {path}/driver/unbind"
    return [Finding("error", "restore-failed", address, problem, hint)]
