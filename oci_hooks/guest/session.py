# SPDX-License-Identifier: Apache-2.0
"""Bind and release: the steps that need the claims, in their order.

The machine-wide lock is held while it is decided who gets what, and while stale claims are put back; not while devices
are bound. From then on the container's own journal is locked, until the hook ends in whatever way.
"""

from __future__ import annotations

import os

from oci_hooks.findings import Finding, HookError, InputError, Refusal, make_one_line
from oci_hooks.frozen import Record
from oci_hooks.guest import ownership, plan, selection
from oci_hooks.guest.apply import drivers
from oci_hooks.guest.apply.modprobe import load_drivers
from oci_hooks.guest.claims import Claim, ClaimDirectory, Owner, read_start_time, take_lock
from oci_hooks.guest.homes import find_home
from oci_hooks.guest.id_mapping import find_mappings
from oci_hooks.guest.signals import interruptible, reset_signals
from oci_hooks.guest.undo_log import HEADS
from oci_hooks.linux import pci
from oci_hooks.linux.instances import name_instance, parse_instance
from oci_hooks.linux.usage import Uses
from oci_hooks.system import Deadline, tagged

TYPE_CHECKING = False
if TYPE_CHECKING:
    from oci_hooks.guest.request import Request
    from oci_hooks.guest.selection import Choice
    from oci_hooks.guest.settings import GuestSettings
    from oci_hooks.guest.undo_log import Entry, Journal
    from oci_hooks.linux.uevents import Listener
    from oci_hooks.oci import Spec, State
    from oci_hooks.program import Run
    from oci_hooks.system import Root

# Putting back has to be possible when all of the deadline was used up on the way there.
# Kata's agent kills a hook after 10 s, and a deadline of 8 s and an interpreter's start come before.
UNDO_SECONDS = 1.5
# What binding takes once the device is there; waiting for it must leave so much.
BIND_SECONDS = 1.0


class Work(Record):
    """What one run of the hook works with. owner: the container, as its claim notes it, but for its cgroups."""

    run: Run
    state: State
    spec: Spec
    request: Request
    settings: GuestSettings
    directory: ClaimDirectory
    owner: Owner

    @property
    def root(self) -> Root:
        """The door to the system."""
        return self.run.root


def bind(run: Run, state: State, spec: Spec, request: Request, settings: GuestSettings) -> None:
    """Give a container the groups that it asks for. Raises HookError with everything put back."""
    reset_signals()
    root = run.root
    start = read_start_time(root, state.pid) if state.pid else 0
    if not start:
        hint = "the hook belongs under createRuntime (or prestart), while the container is being created"
        raise Refusal("no-process", f"process {state.pid}", "the container's init is not running", hint)
    owner = Owner(state.id, state.pid, start, state.bundle)
    directory = ClaimDirectory(root=root)
    directory.prepare()
    work = Work(run, state, find_mappings(root, state, spec), request, settings, directory, owner)
    journal, wanted = wait_for_claim(work)
    try:
        with interruptible():
            carry_out(work, wanted, journal)
    except BaseException as error:
        findings = take_back(work, journal)
        if isinstance(error, HookError):
            # What could not be done often can't be undone either, for the same reason: said once.
            error.findings += tuple(finding for finding in findings if finding not in error.findings)
        else:
            work.run.findings.extend(findings)
        raise
    finally:
        journal.close()


def carry_out(work: Work, wanted: plan.Plan, journal: Journal) -> None:
    """Do what the plan says, each step noted in the journal before it is done. Raises HookError."""
    root, deadline = work.root, work.run.deadline
    rootfs = root.do(find_rootfs, work.state, work.spec)
    load_drivers(root, deadline)
    drivers.bind_devices(root, wanted.rebinds, journal, deadline)
    from oci_hooks.guest.apply import nodes

    target = nodes.Target(work.state.pid, rootfs)
    made = nodes.expose_nodes(root, wanted, target, journal)
    permission = drivers.Permission(work.settings.widen_parent_cgroups, expects_user=journal.kept > 0)
    drivers.grant_nodes(root, made, target, permission, work.directory, journal, deadline)
    journal.note("done")


@tagged("find-rootfs")
def find_rootfs(state: State, spec: Spec) -> str:
    """Return the real path of the container's root file system, as the runtime sees it.

    The path to it is the runtime's, so its links are followed here, once; none may be left when it is descended.
    """
    path = spec.root_path or state.root or "rootfs"
    return os.path.realpath(os.path.join(state.bundle, path))


def release(root: Root, state: State, deadline: Deadline, settings: str = "") -> list[Finding]:
    """Put back what a container's claim notes and return what went wrong; nothing to do without a claim.

    settings: path of the file, if named on the command line.
    """
    directory = ClaimDirectory(root=root)
    path = directory.journal_path(state.id)
    reset_signals()
    extend_deadline(root, deadline, settings)
    directory.prepare()
    while True:
        lock = directory.lock(deadline)
        try:
            claim = directory.read_claim(path)
            if claim is None:
                return []
            ownership.check_release(root, state, claim)
            if not claim.at_work:
                findings = put_back(root, claim, max(deadline.remaining(), UNDO_SECONDS), lock)
                if findings is not None:
                    return findings
        finally:
            os.close(lock)
        root.do(wait_for_hook, claim, deadline)


def extend_deadline(root: Root, deadline: Deadline, settings: str) -> None:
    """Give a release the time that the settings give to the hook."""
    from oci_hooks.guest.settings import read_guest_settings

    try:
        deadline.extend(read_guest_settings(root, settings).deadline)
    except InputError:
        # Told to who starts a container. What has to be put back is the same without it.
        return


# Deciding ------------------------------------------------------------------------------------------------------------


def wait_for_claim(work: Work) -> tuple[Journal, plan.Plan]:
    """Decide what the container gets, waiting for devices that are not there yet. Raises Refusal."""
    listener = None
    root, deadline = work.root, work.run.deadline
    while True:
        try:
            claimed = claim_groups(work)
        except selection.NotYet as missing:
            if listener is None:
                from oci_hooks.linux.uevents import Listener

                try:
                    # Nothing is missed: it listens now, and the next look comes after.
                    listener = root.do(Listener)
                    # Nobody waits for it now; when the device is there, its driver keeps it for a while anyway.
                    drivers.load_what_follows()
                except HookError as error:
                    # What is missing is the news; that it can't be waited for comes after.
                    error.findings = missing.findings + error.findings
                    raise
            elif not root.do(wait, listener, deadline):
                raise missing.after(root.do(deadline.elapsed)) from None
        else:
            if claimed:
                return claimed


@tagged("wait-for-event")
def wait(listener: Listener, deadline: Deadline) -> str:
    """Return what happened to a device or a group; "" when too little time is left to bind one."""
    seconds = deadline.remaining() - BIND_SECONDS
    # Where events come faster than they are looked after there always is one: only the clock ends that.
    return listener.wait(seconds) if seconds > 0 else ""


def claim_groups(work: Work) -> tuple[Journal, plan.Plan] | None:
    """Decide once, and write the claim; None where another hook of the same container had to be waited for."""
    deadline = work.run.deadline
    lock = work.directory.lock(deadline)
    try:
        work.directory.remove_drafts()
        claims = repair(work, work.directory.read_claims(), lock)
        own = next((claim for claim in claims if claim.path == own_path(work)), None)
        if not own or not own.at_work:
            ownership.check_own(own, work.owner)
            if len(claims) > bool(own):
                from oci_hooks.guest import permits

                permits.revoke_dead(work.directory, claims, but=own_path(work))
            wanted = plan.make_plan(work.root, choose(work, claims), work.spec, make_options(work))
            work.root.note("plan", wanted)
            journal = open_claim(work, own, wanted.groups)
            if journal is not None:
                return journal, wanted
    finally:
        os.close(lock)
    work.root.do(wait_for_hook, own, deadline)
    return None


def make_options(work: Work) -> plan.PlanOptions:
    """Return what settings and request say about nodes."""
    return plan.PlanOptions(work.settings.owner, work.request.wants_cdev, work.settings.map)


def choose(work: Work, claims: list[Claim]) -> tuple[Choice, ...]:
    """Return the groups for the container, from what the machine has now. Raises NotYet, Refusal."""
    settings = work.settings
    # Both have to say so: guest.toml for this hook, the kernel's switch for the whole guest.
    noiommu = settings.allow_noiommu and work.root.read_text_or(pci.NOIOMMU_SWITCH, "N") == "Y"
    picture, live = pci.look(work.root, noiommu, instances=True), pci.list_live_groups(work.root)
    picture, live = pci.name_bare_groups(picture, live, noiommu)
    pool = selection.Pool(
        picture,
        ownership.find_owners(claims, picture, own_path(work)),
        live,
        Uses(work.root, work.run.deadline).find,
        settings.never,
        settings.auto_ids,
        settings.auto_classes,
        settings.force,
    )
    choices = selection.choose_groups(work.request, pool)
    own = [entry for claim in claims if claim.path == own_path(work) for entry in claim.entries]
    noted = [entry for entry in reversed(own) if entry.kind == "device" and is_there(picture, entry)]
    before = {entry.words[0]: entry.words[1] for entry in noted}
    return tuple(choice.replace(drivers_before=before) for choice in choices)


def is_there(picture: pci.Picture, entry: Entry) -> bool:
    """Check whether the device that an entry notes is at its address, not another one."""
    device = picture.devices.get(entry.words[0])
    return device is not None and name_instance(device) == parse_instance(entry)


def own_path(work: Work) -> str:
    """Return where this container's claim is, or would be."""
    return work.directory.journal_path(work.owner.container)


def open_claim(work: Work, own: Claim | None, groups: tuple[str, ...]) -> Journal | None:
    """Return the container's journal with its groups noted: a new one, or that of an earlier run of the hook.

    None where somebody has that one meanwhile: it is not replaced, it knows which drivers the devices had.
    """
    if own is None:
        home = find_home(work.root, work.owner.pid)
        return work.directory.open_journal(work.owner.replace(home=home), groups)
    journal = work.directory.reopen_journal(own)
    if journal is not None:
        for name in groups:
            if name not in own.groups:
                journal.note("group", name)
    return journal


@tagged("wait-for-hook")
def wait_for_hook(claim: Claim, deadline: Deadline) -> None:
    """Wait until the hook that is at work on a claim has ended. Raises Refusal [lock-timeout]."""
    try:
        fd = os.open(claim.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return
    try:
        take_lock(fd, deadline, claim.path)
    finally:
        os.close(fd)


# Putting back --------------------------------------------------------------------------------------------------------


def repair(work: Work, claims: list[Claim], lock: int) -> list[Claim]:
    """Put back what killed hooks and ended containers left, and return the claims that hold.

    One that could not be put back holds too: its devices are not to be had.
    """
    held = []
    for claim in claims:
        if claim.problem and claim.path != own_path(work):
            warning = ownership.warn_unreadable(claim)
            # Once, however often it is looked again.
            work.run.findings.extend([warning] if warning not in work.run.findings else [])
        if not ownership.is_over(work.root, claim, own_path(work), work.owner.pid):
            held.append(claim)
            continue
        # It is not this container's fault, and may not be in its way: nor may it take all of the time.
        findings = put_back(work.root, claim, work.run.deadline.remaining() / 2, lock)
        for finding in findings or ():
            work.run.report(finding.replace(level="warning"))
        if findings is None or is_unfinished(findings):
            held.append(claim)
    return held


def put_back(root: Root, claim: Claim, seconds: float, lock: int) -> list[Finding] | None:
    """Undo a claim that no hook is at work on, and remove it. Call it with the machine-wide lock held.

    seconds: how long that may take. None where somebody has the journal, or it is gone.
    """
    from oci_hooks.guest import permits

    directory = ClaimDirectory(root=root)
    journal = directory.reopen_journal(claim)
    if journal is None:
        return None
    try:
        # A child that hangs must keep the journal's lock, and let go of the machine's.
        pid = claim.pid if claim.is_alive(root) else 0
        findings = permits.revoke_claim(directory, claim)
        # What keeps its permission keeps its device, whose numbers nobody else gets then.
        if not is_unfinished(findings):
            findings += drivers.undo(root, claim.entries, pid, Deadline(seconds), (lock,))
        return root.do(end_claim, claim.path, findings)
    finally:
        journal.close()


def take_back(work: Work, journal: Journal) -> list[Finding]:
    """Undo what this run of the hook has done, and remove the claim."""
    from oci_hooks.guest import permits

    entries = work.directory.read_entries(journal)
    deadline = Deadline(max(work.run.deadline.remaining(), UNDO_SECONDS))
    findings = permits.take_back(work.directory, journal, entries, deadline)
    if not is_unfinished(findings):
        findings += drivers.undo(work.root, entries, work.state.pid, deadline)
    if not journal.kept:
        return work.root.do(end_claim, journal.path, findings)
    if not is_unfinished(findings):
        # The container has what an earlier run gave it, and may be using it.
        work.root.do(os.ftruncate, journal.fd, journal.kept)
    return findings


@tagged("end-claim")
def end_claim(path: str, findings: list[Finding]) -> list[Finding]:
    """Remove a claim that was undone. One with a device that the kernel still holds stays, for the next hook."""
    if not is_unfinished(findings) and os.path.lexists(path):
        os.unlink(path)
    return findings


def is_unfinished(findings: list[Finding]) -> bool:
    """Tell whether something is left to put back that can be put back later."""
    return any(finding.code in drivers.UNFINISHED for finding in findings)


def end_container(root: Root, state: State) -> None:
    """Kill a container's init, so that nothing runs without the devices it was promised (on_failure = "kill")."""
    # Never this machine's init, nor a process group.
    if state.pid > 1 and read_start_time(root, state.pid):
        root.do(os.kill, state.pid, 9)


# Showing -------------------------------------------------------------------------------------------------------------


def print_plan(run: Run, state: State, spec: Spec, request: Request, settings: GuestSettings) -> None:
    """Print what would be done, and do nothing. Raises HookError as the real run would, without waiting."""
    root = run.root
    directory = ClaimDirectory(root=root)
    owner = Owner(state.id, state.pid, 0, state.bundle)
    work = Work(run, state, find_mappings(root, state, spec), request, settings, directory, owner)
    claims = [claim for claim in directory.read_claims() if not claim.is_stale(root)]
    for claim in claims:
        if claim.path == own_path(work):
            ownership.check_readable(claim)
    wanted = plan.make_plan(root, choose(work, claims), work.spec, make_options(work))
    root.note("plan", wanted)
    print_actions(run, plan.list_actions(wanted))


def print_release(run: Run, state: State) -> None:
    """Print what a release would put back, and do nothing."""
    directory = ClaimDirectory(root=run.root)
    claim = directory.read_claim(directory.journal_path(state.id))
    if claim:
        ownership.check_readable(claim)
    entries = [entry for entry in reversed(claim.entries) if entry.kind not in HEADS] if claim else []
    # Of a device, three words are for a reader; the others tell it from the next one at its address.
    actions = [(entry.kind, entry.words[:3] if entry.kind == "device" else entry.words) for entry in entries]
    print_actions(run, [("undo", kind, " ".join(words)) for kind, words in actions])


def print_actions(run: Run, actions: list[tuple[str, str, str]]) -> None:
    """Print a plan, or keep it for --json. actions: (what, on what, how), in order."""
    from oci_hooks.log import write_stdout

    if run.arguments.json:
        run.plan.extend({"action": what, "subject": subject, "detail": how} for what, subject, how in actions)
        return
    # Some of the words are a tenant's, and a person's terminal reads them.
    write_stdout("".join(f"{make_one_line(f'{what} {subject}: {how}')}\n" for what, subject, how in actions))
