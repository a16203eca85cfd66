# SPDX-License-Identifier: Apache-2.0
"""vfio-kata-image: what is refused at the command line, and that a refused or killed run leaves nothing behind."""

from __future__ import annotations

import gzip
import json
import os
import resource
import signal
import stat
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from oci_hooks.findings import Refusal
from oci_hooks.kata_image.apply.output import publish
from oci_hooks.kata_image.cli import main
from oci_hooks.kata_image.cpio import Member, write_archive
from tests.support.kata_images import make_addon

REPOSITORY = Path(__file__).resolve().parents[3]
TOOL = REPOSITORY / "hooks/vfio-kata-image"
INITRD = gzip.compress(write_archive([Member("init", stat.S_IFREG | 0o755, 0, os.urandom(200_000))]))


@pytest.fixture(name="place")
def make_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a directory with an initrd and an add-on, which is the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "initrd").write_bytes(INITRD)
    make_addon(tmp_path).rename(tmp_path / "addon")
    return tmp_path


def add(place: Path, *more: str, image: str = "initrd", output: str = "new") -> tuple[int, str]:
    """Run `add` in this process and return its exit code and standard error."""
    saved = os.dup(2)
    with (place / ".errors").open("w+b") as errors:
        os.dup2(errors.fileno(), 2)
        try:
            code = main(["add", image, "--output", output, "--addon", "addon", *more])
        finally:
            os.dup2(saved, 2)
            os.close(saved)
    text = (place / ".errors").read_text()
    (place / ".errors").unlink()
    return code, text


def make_node(place: Path, kind: str) -> None:
    """Make what must not be written to."""
    if kind == "directory":
        place.mkdir()
    elif kind == "dangling link":
        place.symlink_to("nowhere")
    elif kind == "link":
        place.symlink_to("initrd")
    elif kind == "hard link":
        os.link(place.parent / "initrd", place)
    elif kind == "FIFO":
        os.mkfifo(place)
    elif kind == "device":
        os.mknod(place, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    else:
        place.write_text("mine")


@pytest.mark.parametrize("kind", ["directory", "dangling link", "link", "hard link", "FIFO", "device"])
def test_output_is_never_written_through(place: Path, kind: str) -> None:
    make_node(place / "new", kind)
    before = os.lstat(place / "new")
    code, errors = add(place, "--force")
    assert (code, "[output]" in errors) == (1, True)
    assert os.lstat(place / "new") == before and (place / "initrd").read_bytes() == INITRD


def test_output_that_exists_needs_force(place: Path) -> None:
    make_node(place / "new", "file")
    code, errors = add(place)
    assert (code, "[output] new: exists" in errors, (place / "new").read_text()) == (1, True, "mine")
    assert add(place, "--force")[0] == 0
    assert (place / "new").read_bytes().startswith(INITRD)


def test_output_that_appears_while_at_work(place: Path) -> None:
    (place / "draft").write_text("ours")
    make_node(place / "new", "file")
    with pytest.raises(Refusal, match=r"\[output\] .*new: exists by now"):
        publish(str(place / "draft"), str(place / "new"), 0o644, force=False)
    assert (place / "new").read_text() == "mine"


@pytest.mark.parametrize("output", ["initrd", "./initrd", "../{}/initrd"])
def test_output_is_not_the_input(place: Path, output: str) -> None:
    code, errors = add(place, "--force", output=output.format(place.name))
    assert (code, "is the image itself" in errors) == (1, True)
    assert (place / "initrd").read_bytes() == INITRD


@pytest.mark.parametrize("output", ["no/such/new", "initrd/new", "/proc/new", "/proc/self/new"])
def test_output_directory_must_be_writable(place: Path, output: str) -> None:
    code, errors = add(place, output=output)
    assert (code, f"[output] {output}: " in errors) == (1, True)


@pytest.mark.parametrize("kind", ["directory", "FIFO", "device", "dangling link"])
def test_image_must_be_a_file(place: Path, kind: str) -> None:
    make_node(place / "odd", kind)
    code, errors = add(place, image="odd")
    assert (code, "[image-unreadable]" in errors) == (2, True)


def test_image_may_be_a_link(place: Path) -> None:
    """As in Kata's release: kata-containers.img is a link to the image of a version."""
    make_node(place / "link", "link")
    assert add(place, image="link")[0] == 0


@pytest.mark.parametrize("data", [b"", b"\0", b"text\n", bytes(5000), b"\x1f\x8b", b"070701"])
def test_image_that_is_none(place: Path, data: bytes) -> None:
    (place / "odd").write_bytes(data)
    code, errors = add(place, image="odd")
    assert code == 2 and errors.count("\n") == 1 and "[image-" in errors
    assert sorted(os.listdir(place)) == ["addon", "initrd", "odd"]


def test_added_twice(place: Path) -> None:
    assert add(place)[0] == 0
    code, errors = add(place, image="new", output="newer")
    assert (code, "[already-added]" in errors, (place / "newer").exists()) == (1, True, False)


def test_damaged_addon(place: Path) -> None:
    (place / "addon").write_bytes((place / "addon").read_bytes()[:-50])
    code, errors = add(place)
    assert (code, "[addon-damaged]" in errors) == (2, True)


def test_names_of_any_kind(place: Path) -> None:
    name = 'a?b "c\n\x1b[2J'
    (place / "initrd").rename(place / name)
    assert add(place, image=name, output=f"{name}2")[0] == 0
    done = subprocess.run([TOOL, "show", f"{name}2"], cwd=place, capture_output=True, text=True, check=True)
    assert "\x1b" not in done.stdout


def test_disk_that_is_full(place: Path) -> None:
    """Every write above a size fails: half a file must not get the name, nor stay behind under another one."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (220_000, 220_000))

    command = [sys.executable, "-IB", str(TOOL), "add", "initrd", "--output", "new", "--addon", "addon"]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False, preexec_fn=limit)
    assert (done.returncode, "[output] new: cannot be written: File too large" in done.stderr) == (1, True)
    assert sorted(os.listdir(place)) == ["addon", "initrd"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_at_any_time(place: Path, number: signal.Signals) -> None:
    assert add(place, output="whole")[0] == 0
    command = [sys.executable, "-IB", str(TOOL), "add", "initrd", "--output", "new", "--addon", "addon"]
    seen = set()
    # A hook that failed in this process ignores SIGTERM from then on, and a child inherits that.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for step in range(12):
        process = subprocess.Popen(command, cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(0.03 * step)
        process.send_signal(number)
        process.wait()
        seen.add((place / "new").exists())
        if (place / "new").exists():
            assert (place / "new").read_bytes() == (place / "whole").read_bytes()
            (place / "new").unlink()
    assert False in seen
    # SIGKILL leaves a directory with a name that says what it is; nothing else leaves anything.
    left = [name for name in os.listdir(place) if name not in ("addon", "initrd", "whole")]
    assert all(name.startswith(".new.") for name in left) and (number == signal.SIGKILL or not left)


def test_settings_are_checked_and_stored(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    settings = place / "guest.toml"
    settings.write_text('on_failure = "kil"\n')
    code, errors = add(place, "--settings", "guest.toml")
    assert (code, "[bad-settings]" in errors, (place / "new").exists()) == (2, True, False)
    settings.write_text('on_failure = "kill"\n')
    assert add(place, "--settings", "guest.toml")[0] == 0
    capfd.readouterr()
    assert main(["show", str(place / "new"), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["settings"] is True
    assert add(place, "--settings", "nothing", output="other")[0] == 2


def test_settings_that_are_there_are_not_replaced(place: Path) -> None:
    names = [("etc", stat.S_IFDIR | 0o755), ("etc/oci-vfio-hooks", stat.S_IFDIR | 0o755)]
    members = [Member(name, mode) for name, mode in names]
    text = Member("etc/oci-vfio-hooks/guest.toml", stat.S_IFREG | 0o644, 0, b"")
    (place / "initrd").write_bytes(write_archive([*members, text]))
    (place / "guest.toml").touch()
    code, errors = add(place, "--settings", "guest.toml")
    assert (code, "[foreign-file]" in errors) == (1, True)
    assert add(place)[0] == 0


@pytest.mark.parametrize(
    "arguments", [[], ["add"], ["add", "x"], ["show"], ["nothing"], ["show", "x", "--output", "y"]]
)
def test_bad_arguments(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert "[bad-arguments]" in capfd.readouterr().err


# --kernel -------------------------------------------------------------------------------------------------------------

OPTIONS = ("VFIO", "VFIO_PCI", "VFIO_IOMMU_TYPE1", "INTEL_IOMMU", "CGROUP_BPF", "BPF_SYSCALL", "DEVTMPFS")
CONFIG = "".join(["CONFIG_64BIT=y\n", *(f"CONFIG_{name}=y\n" for name in OPTIONS)])


def make_bzimage(vmlinux: bytes) -> bytes:
    """Return what is needed of a bzImage with a kernel."""
    packed = gzip.compress(vmlinux)
    head = bytearray(1024)
    head[0x1F1], head[0x202:0x206] = 1, b"HdrS"
    struct.pack_into("<II", head, 0x248, 100, len(packed))
    return bytes(head) + bytes(100) + packed


def make_kernel(kind: str, config: str) -> bytes:
    """Return a kernel that has a configuration, or the configuration itself."""
    carried = b"\x7fELF" + bytes(100) + b"IKCFG_ST" + gzip.compress(config.encode()) + b"IKCFG_ED" + bytes(9)
    plain = config.encode()
    return {"config": plain, "config.gz": gzip.compress(plain), "vmlinux": carried, "bzImage": make_bzimage(carried)}[
        kind
    ]


@pytest.mark.parametrize("kind", ["config", "config.gz", "vmlinux", "bzImage"])
def test_options_of_a_kernel(place: Path, capfd: pytest.CaptureFixture[str], kind: str) -> None:
    for config, missing in (
        (CONFIG, []),
        (CONFIG.replace("CONFIG_VFIO_PCI=y", "# CONFIG_VFIO_PCI is not set"), ["CONFIG_VFIO_PCI"]),
        (f"{CONFIG}# CONFIG_VFIO_GROUP is not set\n", ["CONFIG_VFIO_GROUP or CONFIG_VFIO_DEVICE_CDEV"]),
        (CONFIG.replace("CONFIG_INTEL", "CONFIG_VIRTIO"), []),
    ):
        (place / "kernel").write_bytes(make_kernel(kind, config))
        assert main(["show", str(place / "initrd"), "--kernel", str(place / "kernel"), "--json"]) == 0
        assert json.loads(capfd.readouterr().out)["kernel"]["missing"] == missing


@pytest.mark.parametrize("data", [b"x", b"\x7fELF" + bytes(2000), make_bzimage(b"none"), make_bzimage(b"n")[:1150]])
def test_kernel_without_configuration(place: Path, capfd: pytest.CaptureFixture[str], data: bytes) -> None:
    (place / "kernel").write_bytes(data)
    assert main(["show", str(place / "initrd"), "--kernel", str(place / "kernel")]) == 2
    assert "[kernel-unreadable]" in capfd.readouterr().err
