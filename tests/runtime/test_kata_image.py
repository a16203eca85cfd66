# SPDX-License-Identifier: Apache-2.0
"""vfio-kata-image on real images, made in osbuilder's layout by the file systems' own programs.

Each prints its transcript (pytest -s), which is where the documents' figures are from.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import kata_images
from tests.support.kata_images import FILES, HOME, MIB, SBIN, make_addon, make_ext4, make_image, make_initrd, make_root

REPOSITORY = Path(__file__).resolve().parents[2]
TOOL = REPOSITORY / "hooks/vfio-kata-image"
SETTINGS = 'on_failure = "kill"\n'
# A file that makes an image of 16 MiB too small.
LARGE = {**FILES, f"{HOME}/lib/large": (0o644, b"x" * (9 * MIB))}


def run(*arguments: str | Path, code: int = 0) -> str:
    """Run the tool, print a transcript, and return what it printed. code: its exit code."""
    command = [str(TOOL), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(f"$ {' '.join(Path(each).name if '/' in each else each for each in command)}\n{done.stdout}{done.stderr}")
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def digest(place: Path) -> str:
    """Return a file's SHA-256."""
    return hashlib.sha256(place.read_bytes()).hexdigest()


def make_erofs(place: Path, root: Path) -> Path:
    """Make EROFS as osbuilder does."""
    kata_images.run("mkfs.erofs", "-zlz4hc", "-Enoinline_data", "--all-root", place, root)
    os.truncate(place, -(-place.stat().st_size // MIB) * MIB)
    return place


@pytest.fixture(name="root", scope="module")
def give_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a guest's tree."""
    return make_root(tmp_path_factory.mktemp("guest") / "root")


@pytest.fixture(name="addon", scope="module")
def give_addon(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an add-on."""
    return make_addon(tmp_path_factory.mktemp("addon"))


def make(kind: str, place: Path, root: Path) -> Path:
    """Make an image or an initrd of a kind."""
    if kind.startswith("initrd "):
        return make_initrd(place, root, kind.partition(" ")[2])
    filesystem = place.with_suffix(".fs")
    if "erofs" in kind:
        make_erofs(filesystem, root)
    else:
        make_ext4(filesystem, root, 12 * MIB)
    make_image(place, filesystem, dax="plain" not in kind, label="gpt" if "GPT" in kind else "dos")
    filesystem.unlink()
    return place


def read_partition(image: Path, work: Path) -> Path:
    """Copy an image's first partition, found by sfdisk where a virtio disk of the image has it."""
    table = json.loads(kata_images.run("sfdisk", "-J", image))["partitiontable"]
    first = table["partitions"][0]
    place = work / "partition"
    with image.open("rb") as file:
        file.seek(first["start"] * 512)
        place.write_bytes(file.read(first["size"] * 512))
    return place


def check_files(image: Path, work: Path) -> None:
    """Look at an image with the file system's own programs: in order, and the add-on's files root's."""
    partition = read_partition(image, work)
    if "erofs" in image.name:
        kata_images.run("fsck.erofs", f"--extract={work}/out", "--preserve", partition)
        for path, (mode, data) in FILES.items():
            found = (work / "out" / path).stat()
            assert (found.st_mode & 0o7777, found.st_uid, found.st_gid) == (mode, 0, 0)
            assert (work / "out" / path).read_bytes() == data
        return
    print(kata_images.run("e2fsck", "-fn", partition).decode())
    for path, (mode, data) in FILES.items():
        about = kata_images.run("debugfs", "-R", f"stat /{path}", partition).decode()
        assert re.search(rf"Type: regular +Mode: +{mode:04o} ", about) and re.search(r"User: +0 +Group: +0 ", about)
        assert kata_images.run("debugfs", "-R", f"cat /{path}", partition) == data


KINDS = ["ext4", "ext4 plain", "ext4 GPT plain", "erofs", "erofs plain"]
INITRDS = ["initrd gzip", "initrd zstd", "initrd xz", "initrd cpio"]


@pytest.mark.parametrize("kind", [*KINDS, *INITRDS])
def test_added_shown_removed(tmp_path: Path, root: Path, addon: Path, kind: str) -> None:
    image = make(kind, tmp_path / f"{kind}.img", root)
    before = digest(image)
    (tmp_path / "guest.toml").write_text(SETTINGS)
    new, again, back = (tmp_path / f"{name} {image.name}" for name in ("new", "again", "back"))
    assert re.search(r"^add-on +no$", run("show", image), re.MULTILINE)
    text = run("add", image, "--output", new, "--addon", addon, "--settings", tmp_path / "guest.toml")
    assert 'guest_hook_path = "/usr/share/oci/hooks"' in text and 'kernel_modules = ["vfio-pci"]' in text
    shown = json.loads(run("show", new, "--json"))
    assert (shown["addon"], shown["hook"], shown["settings"]) == ("1.2.3", True, True)
    assert [each["name"] for each in shown["modules"]] == ["iommufd", "vfio-pci"]
    if not kind.startswith("initrd"):
        (tmp_path / "work").mkdir()
        check_files(new, tmp_path / "work")
    # The same input, the same bytes.
    run("add", image, "--output", again, "--addon", addon, "--settings", tmp_path / "guest.toml")
    assert digest(again) == digest(new)
    run("remove", new, "--output", back)
    assert (digest(image), digest(back)) == (before, before)
    assert "[already-added]" in run("add", new, "--output", tmp_path / "twice", "--addon", addon, code=1)
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


@pytest.mark.parametrize("kind", ["ext4", "ext4 plain"])
def test_too_small_an_image_is_grown(tmp_path: Path, root: Path, kind: str) -> None:
    image = make(kind, tmp_path / f"{kind}.img", root)
    new, back = tmp_path / "new.img", tmp_path / "back.img"
    run("add", image, "--output", new, "--addon", make_addon(tmp_path, LARGE))
    (tmp_path / "work").mkdir()
    check_files(new, tmp_path / "work")
    old_size, size = image.stat().st_size, new.stat().st_size
    assert 5 * MIB < size - old_size < 16 * MIB and size % (2 * MIB if old_size % (2 * MIB) == 0 else MIB) == 0
    # Both tables name the same place, from where each begins.
    partition = json.loads(run("show", new, "--json"))
    tables = [json.loads(kata_images.run("sfdisk", "-J", new))["partitiontable"]["partitions"][0]]
    if kind == "ext4":
        with new.open("rb") as file, (tmp_path / "inner").open("wb") as inner:
            file.seek(2 * MIB)
            inner.write(file.read())
        tables.append(
            json.loads(kata_images.run("sfdisk", "-J", tmp_path / "inner"))["partitiontable"]["partitions"][0]
        )
    places = [(each["start"] * 512 + number * 2 * MIB, each["size"] * 512) for number, each in enumerate(tables)]
    assert set(places) == {(partition["offset"], partition["room"])}
    run("remove", new, "--output", back)
    assert digest(back) == digest(image)


def test_gpt_is_not_grown(tmp_path: Path, root: Path) -> None:
    image = make("ext4 GPT plain", tmp_path / "image.img", root)
    text = run("add", image, "--output", tmp_path / "new", "--addon", make_addon(tmp_path, LARGE), code=1)
    assert re.search(r"\[image-full\] \S+: lacks [0-9]+ bytes and 0 inodes", text)
    assert not (tmp_path / "new").exists()


def test_free_blocks_with_old_data_come_back(tmp_path: Path, root: Path, addon: Path) -> None:
    """An image that had files before: what is left of them in free blocks is part of its bytes."""
    more = tmp_path / "root"
    shutil.copytree(root, more, symlinks=True)
    (more / "deleted").write_bytes(os.urandom(7 * MIB))
    filesystem = make_ext4(tmp_path / "fs", more, 14 * MIB)
    kata_images.run("debugfs", "-w", "-R", "rm /deleted", filesystem)
    assert kata_images.run("e2fsck", "-fy", filesystem)
    image = make_image(tmp_path / "image.img", filesystem)
    large = make_addon(tmp_path, {**FILES, f"{HOME}/lib/large": (0o644, b"x" * (4 * MIB))})
    run("add", image, "--output", tmp_path / "new", "--addon", large)
    # More than fits between table and partition.
    assert (tmp_path / "new").stat().st_size > image.stat().st_size + 2 * MIB
    run("remove", tmp_path / "new", "--output", tmp_path / "back")
    assert digest(tmp_path / "back") == digest(image)


def test_no_undo(tmp_path: Path, root: Path, addon: Path) -> None:
    for kind in ("ext4", "erofs"):
        image = make(kind, tmp_path / f"{kind}.img", root)
        run("add", image, "--output", tmp_path / f"new {kind}.img", "--addon", addon, "--no-undo")
        assert json.loads(run("show", tmp_path / f"new {kind}.img", "--json"))["addon"] == "1.2.3"
        assert "[not-added]" in run("remove", tmp_path / f"new {kind}.img", "--output", tmp_path / "back", code=2)


def test_erofs_with_a_device_node(tmp_path: Path, addon: Path) -> None:
    """A guest's tree may have them. Where they cannot be made, the copy would lack them: refused."""
    root = make_root(tmp_path / "root")
    os.mknod(root / "dev/null", 0o20666, os.makedev(1, 3))
    image = make("erofs", tmp_path / "erofs.img", root)
    about = subprocess.run(["fsck.erofs", "--help"], capture_output=True, text=True, check=False)
    text = run("add", image, "--output", tmp_path / "new", "--addon", addon)
    assert ("warning: [attributes-lost]" in text) == ("xattrs" not in about.stdout + about.stderr)
    (tmp_path / "work").mkdir()
    partition = read_partition(tmp_path / "new", tmp_path / "work")
    kata_images.run("fsck.erofs", f"--extract={tmp_path}/out", "--preserve", partition)
    assert (tmp_path / "out/dev/null").stat().st_rdev == os.makedev(1, 3)
    command = ["setpriv", "--bounding-set=-mknod", str(TOOL), "add", str(image), "--addon", str(addon)]
    command += ["--output", str(tmp_path / "other")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, "[tool-failed] fsck.erofs" in done.stderr, "dev/null" in done.stderr) == (1, True, True)
    assert not (tmp_path / "other").exists()


def change(place: Path, offset: int, data: bytes) -> None:
    """Write into a file."""
    with place.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def test_image_that_was_changed_since(tmp_path: Path, root: Path, addon: Path) -> None:
    image = make("ext4", tmp_path / "image.img", root)
    run("add", image, "--output", tmp_path / "new", "--addon", addon)
    whole = (tmp_path / "new").read_bytes()
    partition = 3 * MIB
    for offset in (partition + 9 * MIB, 2 * MIB + (32 << 10) + 40, 2 * MIB + (32 << 10) + 500, 100):
        (tmp_path / "new").write_bytes(whole)
        change(tmp_path / "new", offset, bytes([whole[offset] ^ 1]))
        assert "[image-changed]" in run("remove", tmp_path / "new", "--output", tmp_path / "back", code=2)
        assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("damage", ["inode table", "block bitmap", "journal to replay", "cut"])
def test_damaged_file_system_is_refused(tmp_path: Path, root: Path, addon: Path, damage: str) -> None:
    filesystem = make_ext4(tmp_path / "fs", root, 12 * MIB)
    if damage == "journal to replay":
        kata_images.run("debugfs", "-w", "-R", "feature needs_recovery", filesystem)
    elif damage != "cut":
        about = kata_images.run("dumpe2fs", filesystem).decode()
        (block,) = re.findall(rf"{damage.capitalize()} at (\d+)", about)[:1]
        change(filesystem, int(block) * 4096, b"\xff" * 4096)
    image = make_image(tmp_path / "image.img", filesystem)
    if damage == "cut":
        os.truncate(image, image.stat().st_size - 4 * MIB)
    before = digest(image)
    assert "[image-damaged]" in run("add", image, "--output", tmp_path / "new", "--addon", addon, code=2)
    assert digest(image) == before and not (tmp_path / "new").exists()


@pytest.mark.parametrize("kind", ["ext4", "erofs"])
def test_verity_is_refused(tmp_path: Path, root: Path, addon: Path, kind: str) -> None:
    place = tmp_path / "fs"
    filesystem = make_erofs(place, root) if kind == "erofs" else make_ext4(place, root, 12 * MIB)
    image = make_image(tmp_path / "image.img", filesystem, second=4 * MIB)
    text = run("add", image, "--output", tmp_path / "new", "--addon", addon, code=1)
    assert "[image-verity]" in text and "kernel_verity_params" in text
    assert json.loads(run("show", image, "--json"))["verity"] is True


@pytest.mark.parametrize("kind", KINDS)
def test_hook_of_a_package_is_not_replaced(tmp_path: Path, addon: Path, kind: str) -> None:
    root = make_root(tmp_path / "root", "usr/share/oci/hooks/prestart/vfio-guest-bind")
    image = make(kind, tmp_path / f"{kind}.img", root)
    assert "[foreign-file]" in run("add", image, "--output", tmp_path / "new", "--addon", addon, code=1)


def test_links_in_the_guest_lead_to_the_place(tmp_path: Path, addon: Path) -> None:
    """/opt is a link in some guests; an absolute one means the guest's own root, not this machine's."""
    root = make_root(tmp_path / "root")
    (root / "opt").rmdir()
    (root / "var/opt").mkdir(parents=True)
    (root / "opt").symlink_to("/var/opt")
    for kind in ("ext4", "erofs", "initrd gzip"):
        image = make(kind, tmp_path / f"{kind}.img", root)
        run("add", image, "--output", tmp_path / f"new {kind}", "--addon", addon)
        assert json.loads(run("show", tmp_path / f"new {kind}", "--json"))["addon"] == "1.2.3"
    assert not Path("/var/opt/oci-vfio-hooks").exists()


@pytest.fixture(name="open_place")
def make_open_place() -> Iterator[Path]:
    """Return a directory that everybody may enter, with the tool in it."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:  # where other users come in
        place = Path(name)
        place.chmod(0o755)
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPOSITORY / "oci_hooks", place / "oci_hooks", ignore=ignore)
        shutil.copytree(REPOSITORY / "hooks", place / "hooks", ignore=ignore)
        (place / "work").mkdir()
        os.chown(place / "work", 65534, 65534)
        yield place


ADD_EROFS = ("add", "../image.img", "--output", "erofs new", "--addon")


def test_without_root(open_place: Path, root: Path, addon: Path) -> None:
    shutil.copy(addon, open_place / addon.name)

    def run_as_nobody(*arguments: str, program: str = "env") -> subprocess.CompletedProcess[str]:
        tool = str(open_place / "hooks/vfio-kata-image")
        command = [program, "/usr/bin/python3", "-IB", tool, *arguments]
        return subprocess.run(
            command,
            cwd=open_place / "work",
            env=SBIN,
            capture_output=True,
            text=True,
            check=False,
            user=65534,
            group=65534,
            extra_groups=[],
        )

    for kind, code in (("ext4", 0), ("initrd gzip", 0), ("erofs", 1)):
        image = make(kind, open_place / "image.img", root)
        done = run_as_nobody("add", str(image), "--output", f"new {kind}", "--addon", str(open_place / addon.name))
        assert done.returncode == code, done.stderr
        assert ("[needs-root]" in done.stderr) == bool(code)
        if not code:
            shown = run_as_nobody("show", f"new {kind}", "--json")
            assert json.loads(shown.stdout)["addon"] == "1.2.3", shown.stderr
            assert run_as_nobody("remove", f"new {kind}", "--output", f"back {kind}").returncode == 0
            assert digest(open_place / "work" / f"back {kind}") == digest(image)
            assert (open_place / "work" / f"new {kind}").stat().st_uid == 65534
    # EROFS in fakeroot: all that is root's in the image is root's in the copy.
    image = make("erofs", open_place / "image.img", root)
    done = run_as_nobody(*ADD_EROFS, str(open_place / addon.name), program="fakeroot")
    assert done.returncode == 0, done.stderr
    partition = read_partition(open_place / "work/erofs new", open_place)
    kata_images.run("fsck.erofs", f"--extract={open_place}/out", "--preserve", partition)
    owners = {(path.lstat().st_uid, path.lstat().st_gid) for path in (open_place / "out").rglob("*")}
    assert owners == {(0, 0)} and (open_place / "out" / HOME / "image.json").exists()
    (open_place / "work").chmod(0o555)
    image = make("initrd gzip", open_place / "image.img", root)
    done = run_as_nobody("add", str(image), "--output", "closed", "--addon", str(open_place / addon.name))
    assert (done.returncode, "[output] closed: cannot be written: Permission denied" in done.stderr) == (1, True)


def test_documented_lines(tmp_path: Path, root: Path, addon: Path) -> None:
    """The lines of docs/howto/kata.md, with an image and an add-on of this test's."""
    image = make("ext4", tmp_path / "kata-containers.img", root)
    (tmp_path / "guest.toml").write_text(SETTINGS)
    page = (REPOSITORY / "docs/howto/kata.md").read_text()
    lines = re.findall(r"^    vfio-kata-image (.*)$", page, re.MULTILINE)
    assert [line.partition(" ")[0] for line in lines] == ["show", "add", "remove"]
    for line in lines:
        words = line.replace("/opt/kata/share/kata-containers/", "").split()
        more = ["--addon", str(addon)] if words[0] == "add" else []
        done = subprocess.run([TOOL, *words, *more], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert digest(tmp_path / "kata-original.img") == digest(image)
