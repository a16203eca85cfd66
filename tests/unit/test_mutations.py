# SPDX-License-Identifier: Apache-2.0
"""The tests bite: each safeguard is taken out of a copy of the hooks, one at a time, and some test fails for it.

A mutation whose line is no longer there is an error. OCI_VFIO_FULL=1 tries all of them, a usual run every third.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

REPOSITORY = Path(__file__).resolve().parents[2]
MOUNT_BY_STAT = 'number = f"{os.major(os.fstat(dev).st_dev)}:{os.minor(os.fstat(dev).st_dev)}"'
# What is taken out, module, line, what stands there instead, and the tests that have to see it.
MUTATIONS = [
    (
        "a CDI file that is right is not touched",
        "host/files",
        "if not renew and old == text and stat.S_IMODE(found) == MODE:",
        "if False:",
        "host/test_cdi.py -k only_when",
    ),
    (
        "a file of another program",
        "host/files",
        "if not (force or is_own(old)):",
        "if False:",
        "host/test_cdi.py -k somebody_else",
    ),
    (
        "a write that breaks off",
        "host/files",
        "        os.unlink(draft)",
        "        pass",
        "host/test_cdi.py -k breaks_off",
    ),
    (
        "a group that can't be passed",
        "host/cdi",
        "passable = tuple(offer for offer in chosen if not offer.obstacles)",
        "passable = chosen",
        "host/test_cdi.py -k costs_only_itself",
    ),
    (
        "a device's own node",
        "host/cdi_document",
        "alone = offer.replace(nodes={member: node}) if form.cdev else offer",
        "alone = offer",
        "host/test_cdi.py -k own_node_only",
    ),
    (
        "rollback",
        "guest/binding",
        "findings = take_back(session, undo_log)",
        "findings: list[Finding] = []",
        "guest/test_session.py",
    ),
    (
        "rollback of drivers",
        "guest/apply/drivers",
        'return findings + restore_drivers(root, [entry for entry in entries if entry.kind == "device"], deadline',
        'return findings + restore_drivers(root, [entry for entry in entries if entry.kind == "x"], deadline',
        "guest/test_session.py",
    ),
    (
        "last first",
        "guest/apply/drivers",
        "for entry in reversed(entries):",
        "for entry in entries:",
        "guest/test_faults.py -k release_killed_at_every_step",
    ),
    (
        "noted before it is done",
        "guest/apply/drivers",
        '        undo_log.add("device", rebind.address, rebind.driver, rebind.override, *identity)',
        "        pass",
        "guest/test_drivers.py",
    ),
    (
        "machine-wide lock",
        "guest/claims",
        'take_lock(fd, deadline, f"{self.path}/lock")',
        "pass",
        "guest/test_claims.py",
    ),
    (
        "lock of a journal",
        "guest/claims",
        "fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)\n            undo_log",
        "j",
        "guest/test_claims.py",
    ),
    (
        "O_NOFOLLOW",
        "guest/apply/container_dev",
        "os.O_DIRECTORY | os.O_NOFOLLOW |",
        "os.O_DIRECTORY |",
        "guest/test_nodes.py",
    ),
    (
        "O_NOFOLLOW in a race",
        "guest/apply/container_dev",
        "os.O_DIRECTORY | os.O_NOFOLLOW |",
        "os.O_DIRECTORY |",
        "guest/test_container_dev.py -k container_dev_race_with_symlink",
    ),
    (
        "owner of the claims' directory",
        "guest/claims",
        "or found.st_uid != os.geteuid()",
        "",
        "guest/test_claims.py",
    ),
    (
        "owner of a group",
        "guest/selection",
        "    if group.name in candidates.claims:",
        "    if False:",
        "guest/test_selection.py",
    ),
    (
        "cdev entries by their numbers",
        "guest/selection",
        'if entry.is_cdev else ""',
        'if False else ""',
        "guest/test_selection.py -k cdev",
    ),
    (
        "a listed cdev is no stale node",
        "guest/plan",
        " and entry not in right",
        "",
        "guest/test_plan.py -k cdev",
    ),
    (
        "no nodes of groups on a kernel without them",
        "guest/apply/nodes",
        "or root.exists(pci.VFIO_CLASS)",
        "or True",
        "guest/test_nodes.py -k cdev",
    ),
    (
        "owner of an id",
        "guest/ownership",
        "(claim.pid, claim.start) != (owner.pid, owner.start)",
        "False",
        "guest/test_session.py",
    ),
    (
        "a pid is not a process",
        "guest/claims",
        "read_start_time(root, self.pid) == self.start",
        "read_start_time(root, self.pid) > 0",
        "guest/test_claims.py",
    ),
    (
        "only the hook's own nodes",
        "guest/apply/container_dev",
        'found.kind != "char" or (found.major, found.minor) != numbers',
        'found.kind != "char"',
        "guest/test_nodes.py",
    ),
    (
        "mounts",
        "guest/apply/nodes",
        "    if container_dev.crosses_mount(dev, directory) and not",
        "    if False and not",
        "guest/test_container_dev.py -k mounted",
    ),
    (
        "unknown keys of settings",
        "settings",
        "for key in self.values if key not in self.known\n",
        "for key in self.values if False\n",
        "test_settings.py -k every_mistake",
    ),
    (
        "settings without jsonschema",
        "settings",
        "    table = Table(parse_toml(text, path))",
        "    import oci_hooks.schema as schema\n\n"
        '    schema.find_mistakes(parse_toml(text, path), "guest-settings", path, "bad-settings", "")\n'
        "    table = Table(parse_toml(text, path))",
        "test_settings.py -k read_settings_loads_no_library",
    ),
    (
        "plain settings without tomllib",
        "plain_toml",
        "    values = read_plain(text)",
        "    values = read_plain(text) and None",
        "test_settings.py -k read_settings_loads_no_library",
    ),
    (
        "owner of settings",
        "settings",
        "    if found.st_uid and found.st_uid != root.do(os.geteuid) and not",
        "    if False and not",
        "test_settings.py -k check_file_writable_by",
    ),
    (
        "settings of others",
        "settings",
        "found.st_mode & stat.S_IWOTH",
        "False",
        "test_settings.py -k check_file_writable_by",
    ),
    (
        "a FIFO for settings",
        "settings",
        "if not stat.S_ISREG(found.st_mode)",
        "if False",
        "test_bad_settings.py -k fifo",
    ),
    (
        "a library that is not there",
        "program",
        'isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("oci_hooks")',
        "False",
        "test_newcomer.py -k missing_library_hint_not_internal_error",
    ),
    (
        "the device that was bound",
        "guest/apply/drivers",
        "before.get((address, found))",
        "next(known for (at, _), known in before.items() if at == address)",
        "guest/test_ownership.py -k another_device",
    ),
    (
        "an override of the hook's",
        "guest/apply/drivers",
        "elif is_own_override(known, override):",
        "elif True:",
        "guest/test_ownership.py -k override_of",
    ),
    (
        "the device that was looked at",
        "guest/apply/sysfs_writer",
        "if os.fstat(fd).st_ino != job.inode:",
        "if False:",
        "guest/test_ownership.py -k before_the_first_write",
    ),
    (
        "writes by a descriptor",
        "guest/apply/sysfs_writer",
        'return path[len(job.directory) + 1 :] if job.directory and path.startswith(f"{job.directory}/") else path',
        "return path",
        "guest/test_ownership.py -k between_two_writes",
    ),
    (
        "the device at the address",
        "guest/apply/sysfs_writer",
        "if job.directory and os.stat(job.directory).st_ino != job.inode:",
        "if False:",
        "guest/test_ownership.py -k between_two_writes",
    ),
    (
        "a living container's claim",
        "guest/ownership",
        "if claim.done and claim.is_alive(root):",
        "if False:",
        "guest/test_ownership.py -k living",
    ),
    (
        "what is left of a container",
        "guest/claims",
        "(self.is_alive(root) or is_occupied(root, self.home))",
        "self.is_alive(root)",
        "guest/test_ownership.py -k claim_held_by_remaining_processes",
    ),
    (
        "a path is not a cgroup",
        "guest/homes",
        "if inode not in (0, found):",
        "if False:",
        "guest/test_ownership.py -k is_occupied_v2_uses_kernel_count",
    ),
    (
        "no more than is read",
        "guest/undo_log",
        "if self.size + len(line) > UNDO_LOG_LIMIT:",
        "if False:",
        "guest/test_ownership.py -k undo_log_size_limit_enforced",
    ),
    (
        "a claim that can't be read",
        "guest/claims",
        "if self.at_work or self.problem:",
        "if self.at_work:",
        "guest/test_ownership.py -k unreadable_claim_blocks_own_container_only",
    ),
    (
        "what it may have",
        "guest/ownership",
        "if device.address in named or (device.owned_by_vfio and device.group not in known):",
        "if False:",
        "guest/test_ownership.py -k not_given_to_others",
    ),
    (
        "the id in a claim",
        "guest/claims",
        "if self.undo_log_path(claim.container) != claim.path:",
        "if False:",
        "guest/test_ownership.py -k names_another",
    ),
    (
        "a file for each id",
        "guest/claims",
        'if name.startswith((".", HASH_PREFIX)):',
        'if name.startswith("."):',
        "guest/test_ownership.py -k long_id",
    ),
    (
        "permission ends with the claim",
        "guest/recovery",
        "findings = permits.revoke_claim(directory, claim)",
        "findings: list[Finding] = []",
        "guest/test_permits.py",
    ),
    (
        "who keeps permission keeps the device",
        "guest/recovery",
        "if not is_unfinished(findings):\n            findings += drivers.undo(root, claim",
        "if True:\n            findings += drivers.undo(root, claim",
        "guest/test_permits.py",
    ),
    (
        "what another claim needs",
        "guest/apply/permission",
        "if access and not any(other.find_given(widening.path, numbers) for other in others):",
        "if access:",
        "guest/test_permits.py",
    ),
    (
        "what another claim was given",
        "guest/apply/permission",
        'given.append(max(shared, default="") or missing)',
        "given.append(missing)",
        "guest/test_permits.py",
    ),
    (
        "what a device list had",
        "guest/apply/device_list",
        'return remove_letters(ACCESS, "".join(own))',
        "return ACCESS",
        "guest/test_permits.py",
    ),
    (
        "the cgroup that was widened",
        "guest/permits",
        "gone = pci.read_inode(root, home.devices) not in (0, home.devices_inode)",
        "gone = False",
        "guest/test_permits.py",
    ),
    (
        "dead numbers, before",
        "guest/decision",
        "permits.revoke_stale_numbers(session.directory, claims, excluding=session.claim_path)",
        "pass",
        "guest/test_permits.py",
    ),
    (
        "numbers given out anew",
        "guest/permits",
        "revoke_from(claims, claim, numbers, others)",
        "pass",
        "guest/test_permits.py",
    ),
    (
        "a number that was lost",
        "guest/permits",
        "        check_not_revoked(claims, undo_log, denied)",
        "",
        "guest/test_permits.py",
    ),
    (
        "a device that was lost",
        "guest/permits",
        "check_own_devices(claims.root, claims.read_entries(undo_log), taken.values())",
        "pass",
        "guest/test_permits.py",
    ),
    (
        "a node that opens twice",
        "guest/permits",
        "if taken[pair].name.startswith(CDEV_DIRECTORY):",
        "if False:",
        "guest/test_permits.py",
    ),
    (
        "ready before it is noted",
        "guest/apply/permission",
        "            swaps.prepare(path, grant.nodes)\n        note()",
        "            note()\n            swaps.prepare(path, grant.nodes)",
        "guest/test_permits.py",
    ),
    (
        "any open node is a use",
        "linux/usage",
        "openers.find(device, list_roots(device, usage)) or ",
        "",
        "linux/test_openers.py",
    ),
    (
        "a node goes by its number",
        "linux/openers",
        "        status = os.stat(path)",
        '        return ""',
        "linux/test_openers.py",
    ),
    ("mappings", "linux/openers", "    if depth >= RESOURCES:\n", "    if False:\n", "linux/test_openers.py"),
    (
        "resources of sysfs",
        "linux/openers",
        "raw = device.driver in RAW_DRIVERS",
        "raw = False",
        "linux/test_openers.py",
    ),
    ("consoles", "linux/openers", "            return consoles\n", "            pass\n", "linux/test_openers.py"),
    ("a scan cut short", "linux/openers", "    if looked < total:\n", "    if False:\n", "linux/test_openers.py"),
    ("processes that can't be seen", "linux/openers", "    if hidden:\n", "    if False:\n", "linux/test_openers.py"),
    (
        "files that can't be seen",
        "linux/openers",
        "        os.readlink(path)\n        return",
        "        return",
        "linux/test_openers.py -k may_not",
    ),
    (
        "the first thread has ended",
        "linux/openers",
        "    if not names:\n",
        "    if False:\n",
        "linux/test_openers.py -k thread",
    ),
    ("loop devices", "linux/usage", "read_loops(root, usage.blocks) if names else {}", "{}", "linux/test_usage.py"),
    (
        "what is below a loop device",
        "linux/block_devices",
        'root.ask(read_backing_device, f"/dev/{loop}")',
        "int(root.read_text_or(path, str(1 << 8)))",
        "linux/test_usage.py",
    ),
    ("CAN", "linux/usage", "    if kind not in UNCONFIGURED_TYPES:\n", "    if False:\n", "linux/test_usage.py"),
    (
        "every table",
        "linux/netlink",
        'found.routed.add(unpack_head("=I", attributes[RTA_OIF])[0])',
        "pass",
        "linux/test_netlink.py",
    ),
    (
        "addresses of any label",
        "linux/netlink",
        "found.addresses.setdefault(",
        "dict[int, str]().setdefault(",
        "linux/test_netlink.py",
    ),
    (
        "too many routes",
        "linux/netlink",
        "            found.routed.add(0)",
        "            pass",
        "linux/test_netlink.py",
    ),
    (
        "no link on the way to the proof",
        "guest/apply/proof",
        "location = open_path(directory, above)",
        "location = os.open(above or '.', os.O_RDONLY, dir_fd=directory)",
        "guest/test_cgroup.py -k verify_nodes_refuses_symlink_in_path",
    ),
    (
        "mounts by their ids",
        "guest/apply/container_dev",
        "number = find_file_system(dev, pid)",
        MOUNT_BY_STAT,
        "guest/test_container_dev.py -k btrfs",
    ),
    (
        "a map is whole",
        "guest/apply/container_dev",
        "        while data:\n",
        "        if data:\n",
        "guest/test_nodes.py -k map",
    ),
    (
        "a line by bytes",
        "log",
        '", "backslashreplace")[:KMSG_LIMIT].decode("utf-8", "ignore").encode()',
        '", "backslashreplace")',
        "test_log.py",
    ),
    (
        "own hypervisor first",
        "host/runtime",
        "(*list_family(root, state.pid), *list_family(root, shim))",
        "()",
        "host/test_checks.py",
    ),
    ("a search cut short", "host/checks", "        if looked < total:\n", "        if False:\n", "host/test_checks.py"),
    (
        "what can't be read is looked at",
        "oci",
        "if is_sandbox(state, nothing) or (asks is False and not asks_for_vfio(state, nothing)):",
        "if not asks_for_vfio(state, nothing):",
        "test_oci.py -k could_ask",
    ),
    (
        "a container that asks for nothing is let through",
        "oci",
        "if is_sandbox(state, nothing) or (asks is False and not asks_for_vfio(state, nothing)):",
        "if False:",
        "test_oci.py -k could_ask",
    ),
    (
        "the state's annotation counts",
        "oci",
        "(asks is False and not asks_for_vfio(state, nothing))",
        "asks is False",
        "test_oci.py -k could_ask",
    ),
    ("escaped letters", "traces", "not any(escape in data for escape in ESCAPES)", "True", "test_traces.py"),
    ("one more escape", "traces", ', b"\\\\u006F")', ")", "test_traces.py -k free"),
    ("words across pieces", "traces", "OVERLAP = 5", "OVERLAP = 4", "test_traces.py -k pieces"),
    ("an escaped quote", "traces", "if (end - before) % 2 == 0:", "if True:", "test_traces.py"),
    (
        "what can't be followed",
        "traces",
        "    if traces is None:\n        return None",
        "    if traces is None:\n        return False",
        "test_traces.py",
    ),
    (
        "a bound for what is followed",
        "traces",
        "read_file(path, MAX_TEXT_BYTES)",
        "read_file(path, 1 << 40)",
        "test_traces.py -k large",
    ),
    (
        "bytes that are not UTF-8",
        "json_input",
        'data.decode("utf-8", "surrogateescape")',
        'data.decode("utf-8", "replace")',
        "test_json_input.py -k utf_8",
    ),
    (
        "bytes of a name",
        "json_input",
        'text.encode("utf-8", "surrogateescape")',
        "text.encode()",
        "test_oci.py -k read_state_cases or read_spec_cases",
    ),
    (
        "annotations of others",
        "oci",
        "return make_state(drop_foreign_annotations(document))",
        "raise",
        "test_oci.py -k annotations",
    ),
    (
        "annotations of ours",
        "oci",
        "isinstance(v, str) or k.startswith(MAP_ANNOTATION)",
        "isinstance(v, str)",
        "test_oci.py -k read_state_own_annotation_must_be_string",
    ),
    (
        "a byte that runc lost",
        "oci",
        'if state.bundle != "/" and REPLACEMENT_CHARACTER not in state.bundle:',
        'if state.bundle != "/":',
        "test_runtime_command.py",
    ),
    (
        "whose option it is",
        "runtime_command",
        ' if words[0].rpartition("/")[2] == "crun" else ""',
        "",
        "test_runtime_command.py",
    ),
    (
        "no sitecustomize",
        "schema",
        "        # A virtual environment's",
        "        site.main()\n        # A virtual environment's",
        "test_executables.py -k load_site_packages_runs_no_sitecustomize_or_pth",
    ),
    (
        "names in any locale",
        "../hooks/vfio-guest-bind",
        "#!/usr/bin/python3 -ISXutf8",
        "#!/usr/bin/python3 -IS",
        "test_executables.py -k bundle_path_in_any_locale",
    ),
    (
        "Python's warnings",
        "../hooks/vfio-guest-bind",
        "_warnings.filters[:] =",
        "_ =",
        "test_executables.py -k executables_suppress_warnings",
    ),
    (
        "names of members are left out",
        "record/privacy",
        'kept[name if known else f"{LEFT_OUT} {index}"]',
        "kept[name]",
        "record/test_privacy.py -k no_string_of",
    ),
    (
        "members without a rule are left out",
        "record/privacy",
        "rules.get(name, shape)(item)",
        "rules.get(name, whole)(item)",
        "record/test_privacy.py -k no_string_of",
    ),
    (
        "annotations are left out",
        "record/privacy",
        'kept[f"{prefix}{LEFT_OUT} {index}"] = shape(item)',
        "kept[name] = item",
        "record/test_privacy.py -k no_string_of",
    ),
    (
        "variables are left out",
        "record/privacy",
        'return f"{shape(name)}{equals}{shape(value)}"',
        "return word",
        "record/test_privacy.py",
    ),
    (
        "quotes of a document",
        "record/privacy",
        'problem=f"{head}{found}{LEFT_OUT}"',
        "problem=finding.problem",
        "record/test_privacy.py",
    ),
    (
        "a defect's values",
        "record/privacy",
        "finding.replace(problem=hide_quoted(finding.problem))",
        "finding",
        "record/test_privacy.py -k quotes",
    ),
    (
        "a defect's values in its traceback",
        "record/writer",
        "error if full else privacy.",
        "str(error) or privacy.",
        "record/test_privacy.py",
    ),
    (
        "the hook's environment",
        "record/writer",
        "sorted(os.environ) if run.full else name_variables()",
        "sorted(os.environ)",
        "record/test_privacy.py",
    ),
    (
        "files that nobody knows",
        "record/hidehost",
        "text and LEFT_OUT\n        if path in",
        "text\n        if path in",
        "record/test_privacy.py",
    ),
    (
        "answers that nobody knows",
        "record/hidehost",
        "answer if question in QUESTIONS else LEFT_OUT",
        "answer",
        "record/test_privacy.py",
    ),
    (
        "properties of a device",
        "record/hidehost",
        "key in OPTIONS.get(option, ()) and (equals or not index)",
        "True",
        "record/test_privacy.py -k hide_kata_host_keeps_no_secret",
    ),
    (
        "options of a hypervisor",
        "record/hidehost",
        "option = name if name in OPTIONS else",
        "option = name if True else",
        "record/test_privacy.py",
    ),
    ("options of a mount", "record/hidehost", "if word in MOUNT_OPTIONS", "if word", "record/test_privacy.py -k form"),
    (
        "sources of mounts",
        "record/hidehost",
        "source = types[1] if of_device else NOWHERE",
        "source = types[1]",
        "record/test_privacy.py -k form",
    ),
    ("kernel parameters", "record/hidetext", "if KERNEL_WORD.fullmatch(word)", "if word", "record/test_privacy.py"),
    (
        "settings of Kata",
        "record/hidetext",
        "if () in rests:",
        "if () in rests or isinstance(value, str):",
        "record/test_privacy.py -k hide_kata_host_keeps_no_secret",
    ),
    (
        "what Kata refuses",
        "record/hidewords",
        "match[0] if match[0] in words else LEFT_OUT",
        "match[0]",
        "record/test_privacy.py -k quotes_nothing",
    ),
    (
        "what Kata makes of its files",
        "record/hidehost",
        """{**event, "answer": hide_reading(answer)}""",
        "event",
        "record/test_privacy.py -k quotes_nothing",
    ),
    (
        "files that Kata's configuration names",
        "record/writer",
        "and not full and note.name not in READS",
        "and False",
        "record/test_privacy.py -k hide_kata_host_keeps_no_secret",
    ),
    (
        "a text that is no JSON",
        "record/hidetext",
        'return piece if piece == "vfio" else mask(piece)',
        "return piece",
        "record/test_privacy.py",
    ),
    ("escapes in it", "record/hidetext", 'return "\\\\u0078"', "return piece", "record/test_privacy.py"),
    (
        "in linear time",
        "record/hidetext",
        """([^"\\\\]*(?:\\\\.[^"\\\\]*)*)("|\\\\?\\Z)""",
        """((?:[^"\\\\]|\\\\.)*)("|$)""",
        "record/test_privacy.py -k mebibyte",
    ),
    (
        "proxies in a finding",
        "host/kata/checks",
        "kernel.replace(value=refusal, written=refusal) if",
        "kernel if",
        "record/test_privacy.py -k hide_kata_host_without_running_hypervisor",
    ),
    (
        "bound of bytes unpacked",
        "record/reader",
        'check_bound(len(data), "BYTES")',
        "",
        "replay/test_odd_recordings.py -k bomb",
    ),
    (
        "bound of bytes packed",
        "record/reader",
        'check_bound(len(packed), "PACKED_BYTES")',
        "",
        "replay/test_odd_recordings.py -k packed",
    ),
    (
        "bound of a member",
        "record/reader",
        "        check_bound(size, MEMBERS[name], name)",
        "",
        "replay/test_odd_recordings.py -k recording_costs_bounded_time_and_memory or bytes",
    ),
    (
        "bound of members",
        "record/reader",
        'check_bound(len(members) + 1, "MEMBERS")',
        "",
        "replay/test_odd_recordings.py -k members",
    ),
    (
        "bound of events",
        "record/reader",
        'check_bound(data.count(b"\\n"), "EVENTS", "events.jsonl")',
        "",
        "replay/test_odd_recordings.py -k events",
    ),
    (
        "bound of a line",
        "record/reader",
        'check_bound(len(line), "LINE_BYTES", where)',
        "",
        "replay/test_odd_recordings.py -k line",
    ),
    (
        "bound of values",
        "record/reader",
        'check_bound(values, "VALUES", where)',
        "",
        "replay/test_odd_recordings.py -k values",
    ),
    (
        "bound of values of a document",
        "record/reader",
        'check_bound(bounds.estimate_values(data), "VALUES", name)',
        "pass",
        "replay/test_odd_recordings.py -k values",
    ),
    (
        "bound of values of the summary",
        "record/reader",
        'check_bound(check_value(about, "record.json"), "SUMMARY_VALUES", "record.json")',
        "",
        "replay/test_odd_recordings.py -k findings",
    ),
    (
        "bound of depth",
        "record/bounds",
        'check_bound(depth, "DEPTH", where)',
        "",
        "replay/test_odd_recordings.py -k depth",
    ),
    (
        "bound of numbers",
        "record/bounds",
        'check_bound(abs(item), "NUMBER", where)',
        "pass",
        "replay/test_odd_recordings.py -k unknown_errno_described or number",
    ),
    (
        "numbers of many digits",
        "record/reader",
        "> MAX_DIGITS:",
        "> 1 << 40:",
        "replay/test_odd_recordings.py -k digits",
    ),
    (
        "numbers that are none",
        "record/reader",
        "if value - value != 0:",
        "if False:",
        "replay/test_odd_recordings.py -k no_hook",
    ),
    (
        "bound of errno",
        "record/reader",
        '0 <= event.get("errno", 0) <= bounds.MAX_ERRNO',
        "True",
        "replay/test_odd_recordings.py -k no_hook",
    ),
    (
        "bound of seconds",
        "record/bounds",
        "signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS)",
        "",
        "replay/test_odd_recordings.py -k replay_seconds_bounded_inside_hook",
    ),
    (
        "out of time is no Exception",
        "record/bounds",
        "class OutOfTime(BaseException)",
        "class OutOfTime(Exception)",
        "replay/test_odd_recordings.py -k replay_seconds_bounded_inside_hook",
    ),
    (
        "bound of memory",
        "record/bounds",
        "resource.setrlimit(resource.RLIMIT_AS, (maximum, self.limits[1]))",
        "pass",
        "replay/test_odd_recordings.py -k replay_memory_bounded_and_released",
    ),
    (
        "a hook keeps to the bounds",
        "record/writer",
        "len(lines) == bounds.MAX_EVENTS or",
        "",
        "replay/test_odd_recordings.py -k written_recording_within_reader_bounds",
    ),
    (
        "mistakes that are collected",
        "schema",
        "islice(validator.iter_errors(document), MAX_ERRORS)",
        "validator.iter_errors(document)",
        "replay/test_odd_recordings.py -k mistakes",
    ),
    (
        "plain files in a tar",
        "record/reader",
        "header[TYPE] not in PLAIN_FILES or size < 0",
        "size < 0",
        "replay/test_replay.py -k hostile",
    ),
    (
        "names in a tar",
        "record/reader",
        "if name not in MEMBERS or header",
        "if header",
        "replay/test_replay.py -k hostile",
    ),
    (
        "regular files",
        "record/reader",
        "if not stat.S_ISREG(os.fstat(fd).st_mode):",
        "if False:",
        "replay/test_odd_recordings.py -k read_record_regular_file_only",
    ),
    (
        "regular files on this machine",
        "replay/rerun",
        "not stat.S_ISREG(os.stat(path).st_mode)",
        "False",
        "replay/test_odd_recordings.py -k run_live_reads_only_regular_files",
    ),
    (
        "a replay opens only code",
        "replay/rerun",
        "or not self.is_code(path)",
        "",
        "replay/test_odd_recordings.py -k nothing_but_code",
    ),
    (
        "only code is code",
        "replay/rerun",
        "name.endswith(CODE) and name",
        "name",
        "replay/test_odd_recordings.py -k nothing_but_code",
    ),
    (
        "names in the list",
        "replay/cli",
        '(make_one_line(os.path.basename(path)), "-", "-", "-", f"unusable: {error.strerror}")',
        '(os.path.basename(path), "-", "-", "-", "")',
        "replay/test_odd_recordings.py -k among",
    ),
    (
        "names of bad records in the list",
        "replay/cli",
        "            name = make_one_line(os.path.basename(path))",
        "            name = os.path.basename(path)",
        "replay/test_odd_recordings.py -k file_name",
    ),
    (
        "names in the list of good ones",
        "record/timeline",
        "name, when = make_one_line(os.path.basename(record.path)),",
        "name, when = os.path.basename(record.path),",
        "replay/test_odd_recordings.py -k recording_strings_escaped_for_terminal",
    ),
    (
        "lines of a timeline",
        "record/timeline",
        'return "".join(f"{make_one_line(line)}\\n" for line in lines)\n\n\ndef format_head',
        'return "".join(f"{line}\\n" for line in lines)\n\n\ndef format_head',
        "replay/test_odd_recordings.py -k recording_strings_escaped_for_terminal",
    ),
    (
        "lines of a traceback",
        "record/timeline",
        '*(f"| {line}" for',
        '*(f"{line}" for',
        "replay/test_odd_recordings.py -k forges",
    ),
    (
        "words that argparse quotes",
        "replay/cli",
        'sys.exit(fail(f"{message}; see {PROGRAM} --help"))',
        "super().error(message)",
        "replay/test_odd_recordings.py -k argparse",
    ),
    (
        "damage is a line",
        "replay/cli",
        "(ArithmeticError, AttributeError, LookupError, NotationError, RecursionError, TypeError, ValueError)",
        "(NotationError,)",
        "replay/test_odd_recordings.py -k odd_record",
    ),
    (
        "numbers of errors",
        "record/timeline",
        "if type(number) is int and 0 <= number <= MAX_ERRNO else",
        "if number else",
        "replay/test_odd_recordings.py -k unknown_errno_described",
    ),
]


@pytest.fixture(name="copy", scope="module")
def make_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the hooks and their tests."""
    copy = tmp_path_factory.mktemp("copy")
    leave = shutil.ignore_patterns("__pycache__")
    for name in ("oci_hooks", "hooks", "tests", "docs", "examples"):
        shutil.copytree(REPOSITORY / name, copy / name, ignore=leave, symlinks=True)
    shutil.copy(REPOSITORY / "pyproject.toml", copy)
    return copy


# All of them take a quarter of an hour: OCI_VFIO_FULL=1 has each run, a usual run every third.
TRIED = MUTATIONS if "OCI_VFIO_FULL" in os.environ else MUTATIONS[::3]


def find_module(top: Path, module: str) -> Path:
    """Return the file of a module; "../hooks/NAME" is one of the executables."""
    name = module if module.startswith("../") else f"{module}.py"
    return top / "oci_hooks" / name


@pytest.mark.parametrize(
    ("module", "line"), [(module, line) for _, module, line, *_ in MUTATIONS], ids=[name for name, *_ in MUTATIONS]
)
def test_mutation_line_exists(module: str, line: str) -> None:
    """Once: a mutation whose line is no longer there has to be written anew with the code."""
    assert find_module(REPOSITORY, module).read_text().count(line) == 1


@pytest.mark.parametrize(
    ("module", "line", "instead", "tests"), [rest for _, *rest in TRIED], ids=[name for name, *_ in TRIED]
)
def test_mutation_makes_a_test_fail(copy: Path, module: str, line: str, instead: str, tests: str) -> None:
    file, *options = tests.split(" ", 1)
    path = find_module(copy, module)
    whole = path.read_text()
    path.write_text(whole.replace(line, instead))
    try:
        words = options[0].split(" ", 1) if options else []
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"tests/unit/{file}", *words]
        done = subprocess.run(
            command, cwd=copy, capture_output=True, text=True, errors="replace", timeout=300, check=False
        )
    finally:
        path.write_text(whole)
    # 1: a test failed. Anything else is no verdict.
    assert done.returncode == 1, done.stdout[-2000:] + done.stderr[-2000:]
    assert "1 failed" in done.stdout
