# SPDX-License-Identifier: Apache-2.0
"""OCI bundles, and the two runtimes that run them. For tests inside the machine, and for the demo.

A bundle is on /run (the only place that is writable and not an overlay), its root file system is an overlay over the
cached one. What a container prints goes to files: a container outlives `create`, and a pipe would stay open with it.
"""

from __future__ import annotations

import copy
import errno
import json
import os
import select
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent.parent
BUNDLES = Path("/run/bundles")
GUEST_HOOK = "vfio-guest-bind"
HOST_HOOK = "vfio-host-check"
PROBE_PATH = "/vfio_probe.py"
PROBE = ("/usr/bin/python3", "-I", PROBE_PATH)
# RLIM_INFINITY, as config.json has it.
UNLIMITED = 2**64 - 1
CAPABILITIES = (
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
)
NAMESPACES = ("pid", "network", "ipc", "uts", "mount")
MOUNTS: tuple[dict[str, Any], ...] = (
    {"destination": "/proc", "type": "proc", "source": "proc"},
    {
        "destination": "/dev",
        "type": "tmpfs",
        "source": "tmpfs",
        "options": ["nosuid", "strictatime", "mode=755", "size=65536k"],
    },
    {
        "destination": "/dev/pts",
        "type": "devpts",
        "source": "devpts",
        "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"],
    },
    {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["nosuid", "noexec", "nodev"]},  # noqa: S108
    {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
)
# Where the hooks look for their settings. Inside, /etc is an overlay: nothing of this machine is written.
SETTINGS = Path("/etc/oci-vfio-hooks")
# A hook has 8 s by itself, which is plenty but for an emulated machine whose host is busy.
PATIENCE = "deadline = 60\n"
# A container that does not start, or a hook that hangs, ends a test and not the whole run.
LIMIT = 180.0


def find_hook(name: str) -> str:
    """Return the path of one of the hooks: the repository's, or those of an installed package (OCI_VFIO_HOOKS_DIR)."""
    return str(Path(os.environ.get("OCI_VFIO_HOOKS_DIR") or REPOSITORY / "hooks") / name)


@dataclass(frozen=True)
class Options:
    """Variable parts of a bundle. Every field goes into config.json; None or empty: the default.

    devices: entries of linux.devices; device_rules: entries of linux.resources.devices after the one that denies all;
    hooks: phase → hooks, as in config.json; user_namespace: the first host id of a mapping of 65536; edit: merged into
    config.json at the end, deep in objects, lists replaced.
    """

    devices: Sequence[dict[str, Any]] = ()
    device_rules: Sequence[dict[str, Any]] = ()
    annotations: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    mounts: Sequence[dict[str, Any]] = ()
    hooks: dict[str, list[dict[str, Any]]] | None = None
    user: int = 0
    user_namespace: int | None = None
    readonly_root: bool = False
    edit: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Done:
    """The result of a command. stderr: the runtime's, the container's and, if the runtime hides it, the hook's."""

    code: int
    stdout: str
    stderr: str

    def read_json(self) -> Any:
        """Return the last line of the output, which is a probe's report."""
        assert self.stdout.strip(), f"nothing was printed; code {self.code}, stderr: {self.stderr}"
        return json.loads(self.stdout.strip().splitlines()[-1])


def write_settings(guest: str = "", host: str = "") -> None:
    """Write guest.toml and host.toml: these lines, after a deadline that does not depend on how busy the machine is."""
    SETTINGS.mkdir(exist_ok=True)
    (SETTINGS / "guest.toml").write_text(PATIENCE + guest)
    (SETTINGS / "host.toml").write_text(PATIENCE + host)


def install_image_hooks(directory: Path) -> None:
    """Put the guest hook below a guest_hook_path as a Kata guest image has it: regular files, by kind of hook."""
    for kind in ("prestart", "poststop"):
        (directory / kind).mkdir(parents=True)
        shutil.copy(find_hook(GUEST_HOOK), directory / kind)


def make_hook(path: str, *arguments: str, **more: Any) -> dict[str, Any]:
    """Return one entry for `hooks`."""
    return {"path": path, "args": [path, *arguments], **more}


def guest_hooks(*phases: str) -> dict[str, list[dict[str, Any]]]:
    """Return `hooks` with the guest hook in these phases; in createRuntime when none is given."""
    return {phase: [make_hook(find_hook(GUEST_HOOK))] for phase in phases or ("createRuntime",)}


def vfio_device(group: str, major: int = 511, minor: int = 7, **more: Any) -> dict[str, Any]:
    """Return an entry of linux.devices for a group, by default with numbers that no group here has: the host's."""
    return {"path": f"/dev/vfio/{group}", "type": "c", "major": major, "minor": minor, **more}


def vfio_devices(*groups: str) -> list[dict[str, Any]]:
    """Return linux.devices as a container manager on the host writes it: the control node and these groups."""
    control = {"path": "/dev/vfio/vfio", "type": "c", "major": 10, "minor": 196}
    return [control, *(vfio_device(group, minor=200 + number) for number, group in enumerate(groups))]


def make_config(command: Sequence[str], root: str, options: Options, cgroup: str) -> dict[str, Any]:
    """Return a config.json: an ordinary container that may touch no device."""
    namespaces = [{"type": name} for name in NAMESPACES]
    linux: dict[str, Any] = {
        "cgroupsPath": cgroup,
        "namespaces": namespaces,
        "devices": list(options.devices),
        "resources": {"devices": [{"allow": False, "access": "rwm"}, *options.device_rules]},
    }
    if options.user_namespace is not None:
        namespaces.append({"type": "user"})
        mapping = [{"containerID": 0, "hostID": options.user_namespace, "size": 65536}]
        linux |= {"uidMappings": mapping, "gidMappings": mapping}
    config: dict[str, Any] = {
        "ociVersion": "1.0.2",
        "root": {"path": root, "readonly": options.readonly_root},
        "hostname": "container",
        "process": {
            "terminal": False,
            "user": {"uid": options.user, "gid": options.user},
            "args": list(command),
            "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin", *(f"{k}={v}" for k, v in options.environment.items())],
            "cwd": "/",
            "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), CAPABILITIES),
            "rlimits": [{"type": "RLIMIT_MEMLOCK", "hard": UNLIMITED, "soft": UNLIMITED}],
            "noNewPrivileges": True,
        },
        "mounts": [*copy.deepcopy(MOUNTS), *options.mounts],
        "hooks": guest_hooks() if options.hooks is None else options.hooks,
        "annotations": dict(options.annotations),
        "linux": linux,
    }
    merge(config, options.edit)
    return config


def merge(target: dict[str, Any], changes: dict[str, Any]) -> None:
    """Put the changes into the target: objects are gone into, anything else is replaced, None takes a key away."""
    for key, value in changes.items():
        if value is None:
            target.pop(key, None)
        elif isinstance(value, dict) and isinstance(target.get(key), dict):
            merge(target[key], value)
        else:
            target[key] = value


class Container:
    """One container of one runtime: a bundle, and the steps of its life."""

    def __init__(self, runtime: str, name: str, command: Sequence[str], options: Options) -> None:
        self.runtime = runtime
        self.name = name
        self.bundle = BUNDLES / name
        self.hook_log = self.bundle / "hook.stderr"
        self.pid_file = self.bundle / "pid"
        self.root = mount_rootfs(self.bundle)
        if runtime == "crun":
            # crun sends a hook's output to /dev/null unless this is set; runc shows it when the hook fails.
            annotations = {"run.oci.hooks.stderr": str(self.hook_log)}
            self.write_config(make_config(command, str(self.root), options, f"/{name}"), annotations)
        else:
            self.write_config(make_config(command, str(self.root), options, f"/{name}"), {})

    def write_config(self, config: dict[str, Any], annotations: dict[str, str]) -> None:
        """Write config.json with these annotations added."""
        merge(config, {"annotations": annotations})
        self.config = config
        (self.bundle / "config.json").write_text(json.dumps(config, indent=1))

    def call(self, *arguments: str, limit: float = LIMIT) -> Done:
        """Run one command of the runtime and return what came of it, the hook's words included."""
        out, err = self.bundle / "stdout", self.bundle / "stderr"
        self.hook_log.unlink(missing_ok=True)
        with out.open("wb") as stdout, err.open("wb") as stderr:
            code = subprocess.run(
                [self.runtime, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                timeout=limit,
                check=False,
            ).returncode
        return Done(code, out.read_text(errors="replace"), err.read_text(errors="replace") + self.read_hook_log())

    def read_hook_log(self) -> str:
        """Return what crun caught of the hook's words."""
        return self.hook_log.read_text(errors="replace") if self.hook_log.exists() else ""

    def run(self) -> Done:
        """Create, start, wait for the end, delete."""
        return self.call("run", "--bundle", str(self.bundle), self.name)

    def create(self) -> Done:
        """Create the container: the hooks run, the command doesn't yet."""
        return self.call("create", "--bundle", str(self.bundle), "--pid-file", str(self.pid_file), self.name)

    def start(self) -> Done:
        """Start the command of a created container. What it prints is in `read_output`, after `wait`."""
        # Files of its own: create's are the container's.
        done = subprocess.run([self.runtime, "start", self.name], capture_output=True, text=True, check=False)
        return Done(done.returncode, done.stdout, done.stderr)

    def read_pid(self) -> int:
        """Return the pid of the container's init."""
        return int(self.pid_file.read_text())

    def wait(self, limit: float = LIMIT) -> None:
        """Wait until the container's init has ended."""
        try:
            pidfd = os.pidfd_open(self.read_pid())
        except OSError as error:
            # EINVAL: the kernel knew the number when it looked it up, and the process was gone a moment later.
            if error.errno not in (errno.ESRCH, errno.EINVAL):
                raise
            return
        with os.fdopen(pidfd) as file:
            ready, _, _ = select.select([file], [], [], limit)
        assert ready, f"container {self.name} still runs after {limit} s"

    def read_output(self) -> Done:
        """Return what a container that was created and started has printed. Its exit code is not known: 0."""
        return Done(0, (self.bundle / "stdout").read_text(), (self.bundle / "stderr").read_text())

    def execute(self, *command: str) -> Done:
        """Run another command in the running container."""
        done = subprocess.run([self.runtime, "exec", self.name, *command], capture_output=True, text=True, check=False)
        return Done(done.returncode, done.stdout, done.stderr)

    def delete(self) -> Done:
        """Delete the container, kill it first if it lives; poststop hooks run."""
        return self.call("delete", "--force", self.name)

    def read_state(self) -> dict[str, Any]:
        """Return the OCI state of a created container, as a hook gets it."""
        done = subprocess.run([self.runtime, "state", self.name], capture_output=True, text=True, check=True)
        state: dict[str, Any] = json.loads(done.stdout)
        return state

    def destroy(self) -> None:
        """Take away the container, if it is there, and its bundle."""
        # Not an error when there is none: both runtimes only complain.
        subprocess.run([self.runtime, "delete", "--force", self.name], capture_output=True, check=False)
        subprocess.run(["umount", "--lazy", str(self.root)], check=True)
        shutil.rmtree(self.bundle)


def mount_rootfs(bundle: Path) -> Path:
    """Make the bundle's directory and return its root file system: the cached one, the probe in it, writable."""
    root, upper, work = bundle / "rootfs", bundle / "upper", bundle / "work"
    for directory in (root, upper, work):
        directory.mkdir(parents=True)
    shutil.copy(REPOSITORY / "examples/vfio_probe.py", upper / PROBE_PATH.lstrip("/"))
    layers = f"lowerdir={os.environ['OCI_VFIO_ROOTFS']},upperdir={upper},workdir={work}"
    subprocess.run(["mount", "-t", "overlay", "-o", layers, "rootfs", str(root)], check=True)
    return root


class Containers:
    """Makes containers of one runtime and takes them all away in the end."""

    def __init__(self, runtime: str) -> None:
        self.runtime = runtime
        self.made: list[Container] = []

    def make(self, *command: str, **options: Any) -> Container:
        """Return a container that is not created yet. options: fields of Options."""
        container = Container(self.runtime, f"{self.runtime}-{len(self.made)}", command, Options(**options))
        self.made.append(container)
        return container

    def run(self, *command: str, **options: Any) -> Done:
        """Run a command in a container of its own, to the end."""
        return self.make(*command, **options).run()

    def probe(self, *paths: str, **options: Any) -> Done:
        """Run the VFIO probe in a container of its own; `read_json` gives its report."""
        return self.run(*PROBE, *paths, **options)

    def destroy_all(self) -> None:
        """Take away all containers and bundles."""
        while self.made:
            self.made.pop().destroy()
