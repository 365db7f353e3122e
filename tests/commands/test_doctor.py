"""``doctor``: what is missing has a remedy, and the status says whether ``connect`` can work."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import storage

from xen_disk_py import libxen
from xen_disk_py.cli import main
from xen_disk_py.commands import doctor as doctor_module
from xen_disk_py.errors import XenUnavailable
from xen_disk_py.exit_status import ExitStatus


@pytest.fixture
def healthy(monkeypatch, tmp_path):
    """A machine that has everything; parts of it can be taken away."""
    machine = SimpleNamespace(
        xen=True,
        uid=0,
        problem={},
        missing=set(),
        fence=lambda: SimpleNamespace(source="libatomic.so.1"),
    )
    monkeypatch.setattr(libxen, "runs_under_xen", lambda: machine.xen)
    monkeypatch.setattr(doctor_module.os, "geteuid", lambda: machine.uid)
    for name in ("GNTDEV", "EVTCHN_DEVICE", "GNTALLOC"):
        device = getattr(doctor_module, name)
        device_of_the_machine = SimpleNamespace(
            module=device.module,
            path=device.path,
            problem=lambda name=name: machine.problem.get(name),
        )
        monkeypatch.setattr(doctor_module, name, device_of_the_machine)
    survey = libxen.survey()

    def found():
        return [
            finding._replace(found=False, remedy="apt install it")
            if machine.missing & {finding.library, finding.symbol}
            else finding._replace(found=True, remedy="")
            for finding in survey
        ]

    def fence():
        return machine.fence()  # as it is by then

    for file in doctor_module.ours(str(tmp_path), "")[:2]:
        path = Path(file.path)
        path.parent.mkdir(parents=True)
        path.write_bytes(file.content)
    monkeypatch.setattr(doctor_module, "_ROOT", str(tmp_path))
    machine.root = tmp_path
    monkeypatch.setattr(libxen, "survey", found)
    monkeypatch.setattr(doctor_module, "load_fence", fence)
    return machine


@pytest.fixture
def doctor(host):
    def doctor(*argv):
        env = host.environment()
        return main(["doctor", *argv], env), env.stdout.getvalue()

    return doctor


def test_all_is_well(doctor, healthy):
    status, out = doctor()
    assert status is ExitStatus.OK
    lines = out.splitlines()
    assert ["serve can work here", "connect can work here"] == lines[-2:]
    assert {"ok"} == {line.split()[0] for line in lines[:-2]}
    assert "xenstore: answers; domain 0 is Domain-0" in out


def take_xen(machine):
    machine.xen = False


def take_root(machine):
    machine.uid = 1000


def take_device(machine):
    machine.problem["GNTDEV"] = "/dev/xen/gntdev does not exist: modprobe xen-gntdev"


def take_allocator(machine):
    machine.problem["GNTALLOC"] = "cannot open it: modprobe it"


def take_library(machine):
    machine.missing.add(libxen.survey()[0].library)


def take_function(machine):
    machine.missing.add("xengnttab_map_domain_grant_refs")


def take_optional_function(machine):
    machine.missing.add("xenevtchn_restrict")


def take_fence(machine):
    def missing():
        raise XenUnavailable("libatomic.so.1 not found: install libatomic1")

    machine.fence = missing


@pytest.mark.parametrize(
    ("take", "status", "said"),
    [
        (take_xen, 1, "xen-disk demo"),
        (take_root, 1, "sudo, or run as root"),
        (take_device, 1, "modprobe xen-gntdev"),
        (take_allocator, 0, "absent   kernel module xen-gntalloc"),
        (take_library, 1, "apt install"),
        (take_function, 1, "xengnttab_map_domain_grant_refs"),
        (take_optional_function, 0, "xenevtchn_restrict"),
        (take_fence, 1, "install libatomic1"),
    ],
)
def test_something_is_missing(doctor, healthy, take, status, said):
    take(healthy)
    found, out = doctor()
    assert status == found
    assert said in out
    last = out.splitlines()[-1]
    if status:
        assert last.startswith("connect cannot work here; missing: ")
        assert out.count("MISSING") == 1
    else:
        assert last == "connect can work here"


def test_xenstore_does_not_answer(healthy, host):
    env = host.environment()

    def away():
        raise XenUnavailable("cannot connect to xenstore (/run: gone): start xenstored")

    env.open_store = away
    assert main(["doctor"], env) is ExitStatus.ERROR
    assert "systemctl start xenstored" in env.stdout.getvalue()


@pytest.mark.parametrize("is_well", [True, False])
def test_json(doctor, healthy, is_well):
    healthy.xen = is_well
    status, out = doctor("--json")
    checks = json.loads(out)
    assert (status is ExitStatus.OK) is is_well
    assert checks[0]["name"] == "Xen"
    assert checks[0]["ok"] is is_well
    assert {"name", "ok", "needed", "detail", "remedy", "for_serve"} == set(checks[0])


def test_on_this_very_machine(doctor):
    """Whatever it is: every line is one thing or its remedy, and nothing breaks."""
    status, out = doctor("--json")
    assert (status is ExitStatus.OK) is all(c["ok"] or not c["needed"] for c in json.loads(out))


@pytest.mark.parametrize(
    ("version", "said"), [((4, 17), "version of Xen: 4.17"), (None, "version of Xen: unknown")]
)
def test_a_xen_that_serve_does_not_work_on(healthy, host, version, said):
    env = host.environment()
    env.xen_version = lambda: version
    assert main(["doctor"], env) is ExitStatus.OK
    out = env.stdout.getvalue()
    assert said in out
    assert "upgrade to Xen 4.19" in out
    assert ["serve cannot work here; missing: version of Xen", "connect can work here"] == (
        out.splitlines()[-2:]
    )


def test_what_serve_needs_is_not_installed(doctor, healthy):
    (healthy.root / "etc/xen/scripts/block-xen-disk").unlink()
    unit = healthy.root / "etc/systemd/system/xen-disk-serve.service"
    unit.write_text("another version's")
    status, out = doctor()
    assert status is ExitStatus.OK
    assert "block-xen-disk: No such file or directory\n         xen-disk install\n" in out
    assert f"{unit} is not this version's\n         xen-disk install --force" in out


def test_no_remedy_that_does_not_help(doctor, healthy):
    """Nobody loads a module of Xen's without Xen, nor where only root may use it."""
    healthy.problem["GNTDEV"] = "no permission to use /dev/xen/gntdev: run as root"
    out = doctor()[1]
    assert "no permission to use /dev/xen/gntdev\n         run as root\n" in out
    assert "modprobe" not in out
    healthy.xen = False
    assert "modprobe" not in doctor()[1]


def test_a_guest_is_no_domain_0(doctor, healthy, host):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doctor_module.toolstack, "own_domid", lambda store: 3)
        status, out = doctor()
    assert status is ExitStatus.ERROR
    assert "xenstore: answers, but this is domain 3, a guest" in out
    assert "run it in domain 0" in out


def test_no_room_for_a_record(doctor, healthy, host, tmp_path):
    with contextlib.ExitStack() as stack:
        host.records = str(storage.small_file_system(tmp_path, stack, "16k") / "records")
        status, out = doctor()
        assert status is ExitStatus.ERROR
        assert "is full\n         make room there (df -h " in out
        assert not os.path.exists(host.records)
