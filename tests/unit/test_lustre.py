"""Images on Lustre are made spread over its servers, before they are written.

No Lustre can be had on a test machine. The file system's kind is injected, and ``lfs`` is a
stand-in that knows the two commands that are used, makes the file as the real one does, and
remembers it by its inode: a layout belongs to that, wherever the file is renamed to. What these
tests cannot tell is whether a real ``lfs`` takes the same arguments (lfs-setstripe(1),
lfs-getstripe(1)).
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import tiny
from stager import cli, fsutil
from stager.environments import Request
from stager.packing import lustre, pack

pytestmark = pytest.mark.unit

_LFS = """\
#!/bin/sh
echo "$*" >>{root}/calls
case $1 in
    setstripe)
        [ -z "$LFS_FAILS" ] || {{ echo "error on ioctl: $LFS_FAILS" >&2; exit 1; }}
        [ ! -e "$4" ] || exit 17
        : >"$4"
        stat -c "%i $3" "$4" >>{root}/layouts
        ;;
    getstripe)
        for path; do :; done
        count=$(sed -n "s/^$(stat -c %i "$path") //p" {root}/layouts)
        echo "${{count:-1}}"
        ;;
esac
"""


class Lustre:
    """A repository that is on Lustre, as far as stager can tell."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.bin = root / "bin"
        self.bin.mkdir()
        (root / "layouts").touch()
        (root / "calls").touch()
        (self.bin / "lfs").write_text(_LFS.format(root=root))
        (self.bin / "lfs").chmod(0o755)
        self.on = "lustre"
        monkeypatch.setenv("PATH", f"{self.bin}:{os.environ['PATH']}")
        monkeypatch.setattr(fsutil, "file_system", lambda path: self.on)
        monkeypatch.setattr(lustre, "SMALL", 1)
        self.prefix = tiny.environment(root / "environment")
        self.notes: list[str] = []

    # what a pack tells

    def start(self, what: str, files: int, size: int) -> None: ...
    def advance(self, files: int, size: int) -> None: ...
    def finish(self) -> None: ...

    def note(self, message: str) -> None:
        self.notes.append(message)

    def pack(self, format: str = "squashfs", **values: object) -> Path:
        """Pack, and return the image."""
        config = tiny.configured(self.root, pack_format=format, **values)
        done = pack.pack(Request((str(self.prefix),)), config, name="tiny", progress=self)
        assert done.published is not None
        return Path(done.published.repository.image(done.published.manifest.top))

    @property
    def made(self) -> list[str]:
        """The calls that make a file."""
        calls = (self.root / "calls").read_text().splitlines()
        return [line for line in calls if line.startswith("setstripe")]

    def layout(self, path: Path) -> int | None:
        """The stripe count that a file was made with."""
        return lustre.count_of(str(path))


@pytest.fixture
def site(public_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lustre:
    return Lustre(public_path, monkeypatch)


@pytest.mark.parametrize("format", ["squashfs", "tar.zst"])
def test_an_image_is_made_spread_and_stays_so_where_it_is_published(
    site: Lustre, format: str
) -> None:
    image = site.pack(format)
    (call,) = site.made
    words = call.split()
    assert words[:3] == ["setstripe", "-c", "-1"]
    assert words[3].startswith(f"{site.root}/repository/tmp/")
    assert site.layout(image) == -1  # the same file that was made, not one that has its name
    assert image.stat().st_size > 0
    assert site.notes == []


def test_as_many_as_the_site_says(site: Lustre) -> None:
    assert site.layout(site.pack(stripe_count=32)) == 32


def test_what_is_small_or_elsewhere_or_not_wanted_is_left_alone(
    site: Lustre, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.pack(stripe_count=0)
    (site.prefix / tiny.SITE / "second.py").touch()
    with monkeypatch.context() as patch:
        patch.setattr(lustre, "SMALL", 32 << 20)
        site.pack()
    (site.prefix / tiny.SITE / "third.py").touch()
    site.on = "ext4"
    site.pack()
    assert site.made == []


def test_where_it_cannot_be_done_the_image_is_packed_and_one_line_says_so(
    site: Lustre, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LFS_FAILS", "Operation not supported")
    assert site.pack().stat().st_size > 0
    (note,) = site.notes
    assert "slowly" in note
    assert "lfs setstripe: error on ioctl: Operation not supported" in note


def test_without_lfs_it_is_packed_and_one_line_says_so(site: Lustre) -> None:
    (site.bin / "lfs").unlink()
    assert site.pack().stat().st_size > 0
    (note,) = site.notes
    assert "lfs is not installed" in note


def test_a_tool_that_hangs_is_not_waited_for(site: Lustre, monkeypatch: pytest.MonkeyPatch) -> None:
    (site.bin / "lfs").write_text("#!/bin/sh\nexec sleep 600\n")
    monkeypatch.setattr(lustre, "_TIMEOUT", 0.1)
    site.pack()
    (note,) = site.notes
    assert "timed out" in note


# The doctor


def doctor(
    site: Lustre,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    **values: str,
) -> list[str]:
    """The lines about Lustre, with the advice behind each."""
    monkeypatch.setenv("STAGER_STORE", f"{site.root}/store")
    for name, value in values.items():
        monkeypatch.setenv(f"STAGER_{name}", value)
    capsys.readouterr()
    arguments = ["doctor", f"--repository={site.root}/repository"]
    assert cli.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    found = []
    for number, line in enumerate(lines):
        if "Lustre" in line or "storage target" in line:
            advice = lines[number + 1] if lines[number + 1 :] else ""
            found.append(line + (advice if advice.startswith("       ") else ""))
    return found


def test_the_doctor_tells_how_images_are_spread(
    site: Lustre, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    site.pack()
    (line,) = doctor(site, capsys, monkeypatch)
    assert line.startswith("ok ")
    assert "all storage targets" in line
    assert "(its directory has stripe count 1)" in line


def test_the_doctor_says_what_one_target_costs(
    site: Lustre, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    image = site.pack(stripe_count=0)
    default, images = doctor(site, capsys, monkeypatch, STRIPE_COUNT="0")
    for line in (default, images):
        assert line.startswith("warning ")
        assert "128 nodes wait 280 s" in line
    assert "set the key `stripe_count` to -1" in default
    assert f"lfs migrate -c -1 {image}" in images


def test_the_doctor_misses_lfs(
    site: Lustre, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (site.bin / "lfs").unlink()
    (line,) = doctor(site, capsys, monkeypatch)
    assert line.startswith("warning ")
    assert "lfs is not installed" in line


def test_the_doctor_says_nothing_elsewhere(
    site: Lustre, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    site.on = "ext4"
    assert doctor(site, capsys, monkeypatch) == []


# The mount table


def test_the_kind_of_a_file_system(tmp_path: Path) -> None:
    assert fsutil.file_system("/proc/self") == "proc"
    (tmp_path / "link").symlink_to("/proc")
    assert fsutil.file_system(str(tmp_path / "link")) == "proc"
    assert fsutil.file_system("/sys/") == "sysfs"
    assert fsutil.file_system("/process") != "proc"
    assert not lustre.is_on(str(tmp_path / "not" / "there"))
