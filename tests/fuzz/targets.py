# SPDX-License-Identifier: Apache-2.0
"""The fuzz targets: each reader of foreign data, as a function of bytes that fails only for a defect.

A defect is an exception that is no refusal in words, a reader and a schema of different opinion, or a text that does
not come back as it was. A target with several files gets them parted by NUL.
"""

from __future__ import annotations

import errno
import json
import os
import posixpath
from functools import cache
from pathlib import Path
from typing import Any, Callable

import jsonschema

from oci_hooks import idle, json_input, oci, plain_toml, schema
from oci_hooks.findings import Finding, HookError, InputError
from oci_hooks.guest import claims, request, undo_log
from oci_hooks.guest.apply import bpf_program, cgroup, device_list
from oci_hooks.guest.apply.permission import parse_grant
from oci_hooks.guest.settings import GuestSettings
from oci_hooks.guest.survey_picture import look_around
from oci_hooks.guest.survey_text import describe_picture, format_picture
from oci_hooks.guest.undo_log import parse_instance
from oci_hooks.host.hypervisor import read_clh, read_qemu
from oci_hooks.host.kata import config as kata_config
from oci_hooks.json_input import parse_json
from oci_hooks.linux import mounts, netlink, open_files, openers, pci, processes, usage
from oci_hooks.linux.processes import Process
from oci_hooks.program import Arguments, Run
from oci_hooks.record import encoding, hidehost, privacy
from oci_hooks.record import reader as record_reader
from oci_hooks.record.bounds import RecordError
from oci_hooks.replay.kinds import KINDS
from oci_hooks.system import Deadline, Root, name_tag

ADDRESS = "0000:01:00.0"
DEVICE = f"{pci.PCI_DEVICES}/{ADDRESS}"
REPOSITORY = Path(__file__).resolve().parents[2]
# Deeper than this no two JSON readers agree on whether they can read it.
DEEPEST = 100


class MemoryRoot(Root):
    """A machine whose files are bytes in memory. links: path → target of symbolic links."""

    def __init__(self, files: dict[str, bytes], links: dict[str, str] | None = None) -> None:
        super().__init__()
        self.files = files
        self.links = links or {}

    def ask(self, question: Callable[..., Any], path: str, *more: object) -> Any:
        """Answer what the hooks ask of a path. Raises OSError."""
        answers: dict[str, Callable[[str], Any]] = {
            "read": self.read,
            "listdir": self.list,
            "readlink": self.link,
            "stat": self.status,
            "realpath": posixpath.normpath,
            # Fuzzed by themselves, or of real processes only.
            "list-nodes": lambda _: {},
            "list-empty-networks": lambda _: [],
            "network": lambda _: [],
            "list-openers": lambda _: {"open": [], "looked": 1, "total": 1, "hidden": 0},
        }
        if name_tag(question) in answers:
            return answers[name_tag(question)](posixpath.normpath(path))
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), path)

    def read(self, path: str) -> bytes:
        """Return a file's content."""
        if path not in self.files:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return self.files[path]

    def list(self, path: str) -> list[str]:
        """Return the names below a directory."""
        inside = [p[len(path) + 1 :].split("/")[0] for p in (*self.files, *self.links) if p.startswith(path + "/")]
        if not inside:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return sorted(set(inside))

    def link(self, path: str) -> str:
        """Return a link's target."""
        if path not in self.links:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return self.links[path]

    def status(self, path: str) -> os.stat_result:
        """Return a stat of whatever is there."""
        if path not in self.files and path not in self.links and not any(p.startswith(path + "/") for p in self.files):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return os.stat_result((0o100644, 1, 1, 1, 0, 0, 0, 0, 0, 0))


@cache
def load_validator(name: str) -> Any:
    """Return the validator of one of the package's schemas."""
    return jsonschema.Draft7Validator(schema.load_schema(name))


def part(data: bytes, count: int) -> list[bytes]:
    """Return this many pieces of the data, parted by NUL; what is lacking is empty."""
    pieces = data.split(b"\0", count - 1)
    return pieces + [b""] * (count - len(pieces))


def is_deep(value: Any, depth: int = 0) -> bool:
    """Return whether a JSON value is nested deeper than is compared."""
    if depth > DEEPEST:
        return True
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(is_deep(item, depth + 1) for item in inner)


def check_verdict(data: bytes, name: str, read: Callable[[Any], object]) -> object:
    """Check that a hand-written reader and its schema have the same opinion of a document, and return what it read."""
    try:
        document = parse_json(data, name)
    except InputError:
        return None
    if is_deep(document):
        return None
    try:
        result, taken = read(document), True
    except json_input.Mismatch:
        result, taken = None, False
    assert taken == load_validator(name).is_valid(document), (name, document)
    return result


# Targets -------------------------------------------------------------------------------------------------------------


def fuzz_json(data: bytes) -> None:
    """The fast scanner and the json package read the same."""
    try:
        expected = json.loads(data.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError):
        expected = None
    try:
        found = parse_json(data, "x")
    except InputError:
        found = None
    assert repr(found) == repr(expected)


def fuzz_state(data: bytes) -> None:
    """The state on stdin; the first look takes no state that its reader refuses."""
    check_verdict(data, "state", oci.make_state)
    try:
        faultless = idle.is_faultless(idle.scan_text(data.decode()))
    except Exception:  # noqa: BLE001 - as idle.look does
        faultless = False
    try:
        oci.read_state(data)
    except InputError:
        assert not faultless


def fuzz_config(data: bytes) -> None:
    """config.json, and the request that is made of it; the first look misses none."""
    spec = check_verdict(data, "config", lambda document: oci.make_spec(document, "config.json"))
    if isinstance(spec, oci.Spec):
        assert not (idle.lacks_vfio(data) and oci.asks_for_vfio(oci.State("c1", "/b", 1, "", {}), spec))
        try:
            request.read_request(oci.State("c1", "/b", 1, "", {}), spec)
        except InputError:
            return


def fuzz_annotation(data: bytes) -> None:
    """The annotation that names devices: what was read is written as it would be read again."""
    text = data.decode("utf-8", "replace")
    state = oci.State("c1", "/b", 1, "", {oci.DEVICES_ANNOTATION: text})
    try:
        found = request.read_request(state, oci.make_spec({}, "config.json"))
    except InputError:
        return
    assert found is not None
    for selector in found.selectors:
        assert request.parse_selector(str(selector), "x") == selector


def fuzz_map(data: bytes) -> None:
    """The predecessor's map."""
    state = oci.State("c1", "/b", 1, "", {oci.MAP_ANNOTATION: data.decode("utf-8", "replace")})
    try:
        request.read_request(state, oci.make_spec({}, "config.json"))
    except InputError:
        return


def fuzz_settings(data: bytes) -> None:
    """guest.toml and host.toml: what is taken is what the schema takes; a plain text is to tomllib what it is here."""
    from oci_hooks.guest.settings import GUEST_SETTINGS, read_guest_settings
    from oci_hooks.host.settings import HOST_SETTINGS, read_host_settings
    from oci_hooks.plain_toml import read_plain

    plain, values = None, None
    try:
        text = data.decode()
        plain = read_plain(text)
        values = plain_toml.load_toml(text)
    except (ValueError, RecursionError):
        # Whatever was plain would have been read.
        values = None
    assert plain is None or repr(plain) == repr(values)
    if is_deep(values):
        return
    root = MemoryRoot({GUEST_SETTINGS: data, HOST_SETTINGS: data})
    readers: list[tuple[Callable[..., object], str]] = [
        (read_guest_settings, "guest-settings"),
        (read_host_settings, "host-settings"),
    ]
    for read, name in readers:
        try:
            taken = bool(read(root, ""))
        except InputError:
            taken = False
        assert taken == (values is not None and load_validator(name).is_valid(values)), (name, values)


def fuzz_kata(data: bytes) -> None:
    """Kata's configuration.toml with two drop-ins and annotations: whatever can't be read is a finding."""
    main, one, two, annotation = part(data, 4)
    top = "/etc/kata-containers"
    files = {
        f"{top}/configuration.toml": main,
        f"{top}/config.d/10-one.toml": one,
        f"{top}/config.d/20-two.toml": two,
    }
    text = annotation.decode("utf-8", "replace")
    annotations = {f"io.katacontainers.config.hypervisor.{key}": text for key in ("enable_iommu", "kernel_params")}
    root = MemoryRoot(files)
    for flavour in ("go", "rs"):
        location = kata_config.make_config_file(root, f"{top}/configuration.toml", "test")
        assert location is not None
        config = kata_config.load_config(root, location, flavour, annotations)
        for setting in (
            config.hypervisor_setting("enable_iommu", False),
            config.runtime_setting("vfio_mode"),
            config.hypervisor_setting("kernel_params", ""),
        ):
            config.describe(setting)


def fuzz_sysfs(data: bytes) -> None:
    """The attributes of a PCI function and its VFIO group."""
    uevent, override, group, numvfs, vga = part(data, 5)
    files = {
        f"{DEVICE}/uevent": uevent,
        f"{DEVICE}/driver_override": override,
        f"{pci.VFIO_CLASS}/4/dev": group,
        f"{DEVICE}/sriov_numvfs": numvfs,
        f"{DEVICE}/boot_vga": vga,
        "/proc/self/mountinfo": b"",
    }
    links = {f"{DEVICE}/iommu_group": "../../../kernel/iommu_groups/4", DEVICE: "../../../devices/pci0000:01/x"}
    root = MemoryRoot(files, links)
    inventory = pci.scan(root)
    pci.list_live_groups(root)
    pci.read_override(root, ADDRESS)
    uses = usage.UsageFinder(root, Deadline(1))
    for device in inventory.devices.values():
        uses.find(device)


def fuzz_survey(data: bytes) -> None:
    """What `vfio-guest-bind --all` reads: devices, a group, the kernel; its table has no control character."""
    uevent, group, driver, config, modules, release = part(data, 6)
    name = group.decode("utf-8", "surrogateescape").replace("/", "") or "4"
    files = {
        f"{DEVICE}/uevent": uevent,
        f"{pci.IOMMU_GROUPS}/{name}/devices/{driver.decode('utf-8', 'surrogateescape').replace('/', '')}/x": b"",
        "/proc/config.gz": config,
        "/boot/config-6.1": config,
        "/lib/modules/6.1/modules.dep": modules,
        "/proc/sys/kernel/osrelease": release,
        "/proc/self/mountinfo": b"",
    }
    links = {f"{DEVICE}/iommu_group": f"../../../kernel/iommu_groups/{name}"}
    root = MemoryRoot(files, links)
    # Claims are read by path: there are none.
    root.top = "/nonexistent"
    run = Run("vfio-guest-bind", Arguments(all=True), Deadline(1), root)
    picture = look_around(run, GuestSettings())
    json.dumps(describe_picture(picture))
    assert all(line.isprintable() for line in format_picture(picture).split("\n"))


def fuzz_proc(data: bytes) -> None:
    """mountinfo, cgroup, swaps, consoles, stat, maps: of this process, of the container's, of any."""
    mountinfo, groups, swaps, consoles, maps, active, stat = part(data, 7)
    files = {
        "/proc/self/mountinfo": mountinfo,
        "/proc/self/cgroup": groups,
        "/proc/7/cgroup": groups,
        "/proc/7/stat": stat,
        "/proc/swaps": swaps,
        "/proc/consoles": consoles,
        "/sys/class/tty/console/active": active,
    }
    root = MemoryRoot(files)
    mounts.read_mounts(root)
    usage.scan_usage(root)
    openers.find_consoles(root, {"char 4:68": "/sys/devices/x/tty/ttyS4"})
    for name in open_files.list_mapped("/nonexistent", maps, {}):
        assert open_files.RESOURCE in name
    processes.read_start_time(root, 7)
    try:
        cgroup.find_cgroup(root, 7)
    except HookError:
        return


def fuzz_netlink(data: bytes) -> None:
    """Dumps of rtnetlink: an invalid one ends in EBADMSG, or in the error that it contains."""
    try:
        netlink.read_dump(iter([data[:2048], data[2048:]]), netlink.NetworkUse())
    except OSError:
        return


def fuzz_devices_list(data: bytes) -> None:
    """devices.list of version 1."""
    root = MemoryRoot({"/g/devices.list": data})
    device_list.find_missing(device_list.read_rules(root, "/g"), cgroup.MadeNode("12", 511, 7))


def fuzz_journal(data: bytes) -> None:
    """A claim: any content is read as some entries, and a hook undoes what it can."""
    entries = undo_log.parse_undo_log(data)
    claim = claims.make_claim("/run/claims/c%20", entries, False)
    claims.ClaimDirectory("/run").find_problem(claim, data)
    for entry in entries:
        if entry.kind == "device":
            parse_instance(entry)
        line = undo_log.format_entry(entry.kind, *entry.words)
        assert undo_log.parse_undo_log(line) == [entry]
        if entry.kind == "permit":
            try:
                parse_grant(entry)
            except ValueError:
                continue


def fuzz_record(data: bytes) -> None:
    """A record, unpacked: its members, its JSON, the values of its events."""
    try:
        members = record_reader.read_members(data)
        about = record_reader.parse(members, "record.json")
        record_reader.check_version(about)
        record_reader.check_schema(about)
        record_reader.read_events(members.get("events.jsonl", b""))
    except RecordError:
        return


def fuzz_packed(data: bytes) -> None:
    """A record as the file that it is."""
    try:
        record_reader.unpack(data)
    except RecordError:
        return


def fuzz_notation(data: bytes) -> None:
    """A value of a record, which may be an object."""
    try:
        encoding.decode(record_reader.load(data, "x"), KINDS)
    except (encoding.NotationError, RecordError, RecursionError):
        return


def read_like_the_hooks(data: bytes, name: str) -> object:
    """Return what the hooks make of a document, as far as they go by it: its values, or what is wrong with it."""
    try:
        document = parse_json(data, name)
    except InputError as error:
        return error.findings[0].problem
    if is_deep(document):
        return None
    try:
        found = oci.make_state(document) if name == "state.json" else oci.make_spec(document, name)
    except json_input.Mismatch as mismatch:
        finding = Finding("error", "bad-config", f"{name}: {mismatch.path}", mismatch.problem)
        return privacy.hide_finding(finding)
    if isinstance(found, oci.State):
        return (found.id, found.bundle, found.pid, oci.is_sandbox(found, oci.make_spec({}, "")))
    state = oci.State("c", "/b", 1, "", {})
    kept = (found.root_path, found.vfio_devices, found.uid, found.gid, found.uid_mappings, found.gid_mappings)
    return (*kept, request.read_hints(found), oci.asks_for_vfio(state, found), oci.is_sandbox(state, found))


def fuzz_kept(data: bytes) -> None:
    """The kept part of config.json and state in a recording: the hooks read the same from it, even if it is invalid."""
    for name in ("config.json", "state.json"):
        hidden = privacy.hide_document(data, name)
        assert read_like_the_hooks(hidden, name) == read_like_the_hooks(data, name), hidden
        assert read_like_the_hooks(privacy.hide_document(hidden, name), name) == read_like_the_hooks(data, name)


def fuzz_teller(data: bytes) -> None:
    """The kept part of a machine's files in a recording, with any content."""
    number, _, text = data.partition(b"\0")
    own = "/etc/oci-vfio-hooks/guest.toml"
    teller = hidehost.Redactor("x", ("c",), {own: schema.load_schema("guest-settings")})
    paths = (*(f"/proc/7/{name}" for name in teller.proc_files()), "/proc/cmdline", own, "/etc/x.toml")
    path = paths[sum(number) % len(paths)]
    hidden = teller.hide_file(path, text.decode("utf-8", "surrogateescape"))
    assert isinstance(teller.hide_file(path, hidden), str)


def fuzz_program(data: bytes) -> None:
    """A dumped device program: with the prefix taken away and put before, it is what it was."""
    # The kernel's dump is one of whole instructions.
    data = data[: len(data) // bpf_program.SIZE * bpf_program.SIZE]
    plain = bpf_program.strip_prefix(data)
    nodes = [(511, 7), (10, 196)]
    prefixed = bpf_program.make_prefix(nodes) + plain
    assert sorted(bpf_program.read_prefix(prefixed)) == sorted(nodes)
    assert bpf_program.strip_prefix(prefixed) == plain
    try:
        bpf_program.make_loadable(data)
    except bpf_program.ProgramError:
        return


def fuzz_command_line(data: bytes) -> None:
    """The command line of a hypervisor, which a sandbox's annotations have a part in."""
    arguments = tuple(data.decode("utf-8", "replace").split("\0"))
    process = Process(7, "qemu-system-x86", arguments)
    read_qemu(process)
    read_clh(process)


TARGETS: dict[str, Callable[[bytes], None]] = {
    name[len("fuzz_") :]: value for name, value in sorted(globals().items()) if name.startswith("fuzz_")
}

# What the fuzzer begins with: one good example each, so that it need not find out what TOML is.
SEEDS: dict[str, list[bytes]] = {
    "annotation": [b"0000:02:00.0,id:8086:10d3,class:0200,path:02/00,cdev", b"auto", b"path:0001:80:02.1/00"],
    "command_line": [
        b"qemu\0-machine\0q35,kernel_irqchip=split\0-device\0intel-iommu,intremap=on\0-device\0vfio-pci,host=01:00.0",
        b"cloud-hypervisor\0--api-socket\0/run/x/clh.sock\0--platform\0iommu_segments=1",
    ],
    "config": [
        b'{"annotations":{"io.katacontainers.x.vfio.devices":"auto"},"root":{"path":"r"},"process":{"user":{"uid":1},'
        b'"env":["PCIDEVICE_A=0000:01:00.0"]},"linux":{"devices":[{"path":"/dev/vfio/1","type":"c","major":1,"minor":2,'
        b'"fileMode":438}],"namespaces":[{"type":"user"}],"uidMappings":[{"containerID":0,"hostID":1,"size":2}]}}'
    ],
    "devices_list": [b"a *:* rwm\n", b"c 10:196 rw\nb *:* m\n"],
    "journal": [
        b"oci-vfio-hooks 2\ncontainer\tc%20\nbundle\t%2fb\ninit\t7\t70\ncgroup\t%2fc\t5\t\t0\ngroup\t4\n"
        b"device\t0000:01:00.0\te1000e\t\t9\t8086\t10d3\t020000\n"
        b"permit\t511:7,10:196\t/sys/fs/cgroup/c\t\ndone\n"
    ],
    "json": [b'{"a": [1, -2.5e3, "\\u00e9\\n", true, null]}', b" [] ", b"NaN"],
    "kata": [
        b'[hypervisor.qemu]\npath="/q"\nenable_iommu=true\nkernel_params="a=b"\nenable_annotations=["kernel_.*"]\n'
        b'[runtime]\nvfio_mode="vfio"\n\0[hypervisor.qemu]\nenable_iommu=false\n\0[runtime]\n\0true'
    ],
    "kept": [
        b'{"annotations":{"io.katacontainers.x.vfio.devices":"auto","a":"b"},"root":{"path":"r"},"process":{"user":{"uid":1},'
        b'"env":["PCIDEVICE_A=0000:01:00.0","A=b"],"args":["a"]},"linux":{"devices":[{"path":"/dev/vfio/1","type":"c",'
        b'"major":1,"minor":2},{"path":"/dev/x","type":"b"}],"namespaces":[{"type":"user"}]},"hooks":{"x":[]}}',
        b'{"ociVersion":"1","id":"c","status":"created","pid":7,"bundle":"/b","root":"/r","annotations":{"a":"b"}}',
        b'{"a": "b\\u0041\\"", tru}',
    ],
    "map": [b'[{"host-group":12,"devices":[{"host-address":"0000:3b:00.0","guest-path":{"Path":["02.0","00.0"]}}]}]'],
    "netlink": [
        b"\x20\0\0\0\x14\0\x02\0\0\0\0\0\0\0\0\0\x02\x18\x80\0\x07\0\0\0\x08\0\x02\0\xc0\0\x02\x0f"
        + b"\x24\0\0\0\x18\0\x02\0\0\0\0\0\0\0\0\0\x02\x18\0\0\xfe\x03\0\x01\0\0\0\0\x08\0\x04\0\x07\0\0\0",
    ],
    "notation": [
        b'{"!":"job-result","address":"a","code":0,"path":"","started":true}',
        b'{"!":"stat","st_mode":33188}',
        b'[{"!":"bytes","text":"x"},{"!":"claim"},{"!":"undo-log"}]',
    ],
    "packed": [b"\x1f\x8b\x08\0\0\0\0\0\x02\x03\x03\0\0\0\0\0\0\0\0\0"],
    "proc": [
        b"22 1 0:21 / / rw shared:1 - cgroup2 cgroup rw\\040,x\n\x000::/c\n\0"
        b"Filename Type\n/dev/vda partition 1 2 3\n\0"
        b"tty0 -WU (EC p  ) 4:1\nttyS4 -W- (EC   a) 4:68\n\0"
        b"00400000-00452000 r-xp 00000000 08:02 9 /usr/bin/x\n7f00-7f04 rw-s 0 00:05 7 /sys/devices/x/resource0\n\0"
        b"tty0 ttyS0\n\x007 (a) R 1 1 1 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 70 0\n"
    ],
    "program": [bpf_program.make_prefix([(511, 7)]) + bpf_program.make_instruction(0x95)],
    "record": [],
    "settings": [
        b'deadline=8.0\non_failure="kill"\nforce=["0000:01:00.0"]\n[auto]\nids=["8086"]\nnever=["id:1af4"]\n[node]\nmode=438\n',
        b'deadline=8\n[kata]\nmode="auto"\n',
    ],
    "state": [
        b'{"ociVersion":"1","id":"c","status":"created","pid":7,"bundle":"/b","root":"/r","annotations":{"a":"b"}}'
    ],
    "teller": [
        b"\0qemu\0-device\0vfio-pci,host=0000:01:00.0\0-append\0iommu=off x",
        b"\x07\x00" + b"22 1 0:21 /a /b rw shared:1 - cgroup2 cgroup rw,x",
        b"\x11\0[a]\nb = 1\n",
    ],
    "survey": [
        b"DRIVER=e1000e\nPCI_CLASS=20000\nPCI_ID=8086:10D3\n\x004\x000000:01:00.0\0"
        b"CONFIG_VFIO=y\n# CONFIG_VFIO_GROUP is not set\n\0kernel/drivers/vfio/pci/vfio-pci.ko.xz: a.ko\n\x006.1"
    ],
    "sysfs": [b"DRIVER=e1000e\nPCI_CLASS=20000\nPCI_ID=8086:10D3\n\0(null)\n\x00511:7\n\x000\n\x001\n"],
}


def list_seeds(name: str) -> list[bytes]:
    """Return what to begin a target with; a record's examples are the kept ones."""
    if name != "record":
        return SEEDS[name]
    kept = sorted((REPOSITORY / "tests/data/records").glob("*.tar.gz"))[:4]
    return [record_reader.unpack(path.read_bytes()) for path in kept]
