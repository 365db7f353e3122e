import contextlib
import ctypes
import errno
import os
import re
import shutil
import subprocess
import sys

import pytest
import xen_stub

from xen_disk_py import libxen
from xen_disk_py.errors import BackendError, HypervisorError, XenUnavailable
from xen_disk_py.host import atomic
from xen_disk_py.host.clibrary import Library, Signature, not_negative, not_null
from xen_disk_py.host.mapping import MappedPages, close_all
from xen_disk_py.hypervisor import PAGE_SIZE, Piece
from xen_disk_py.libxen import CopyEnd, CopySegment, Device, Xen

ABSENT = Library("libabsent-xyz.so.9", "libabsent9 (Debian)", {"f": Signature(ctypes.c_int, ())})


def libc(**functions):
    return Library(None, "glibc", functions)


class TestLibrary:
    def test_a_missing_library_is_named_with_its_package(self):
        with pytest.raises(XenUnavailable) as caught:
            ABSENT.load()
        assert "libabsent-xyz.so.9 not found: install libabsent9 (Debian)" == str(caught.value)

    def test_the_same_in_the_words_of_musl(self):
        def musl(name, **options):
            raise OSError(f"Error loading shared library {name}: No such file or directory")

        with pytest.raises(XenUnavailable) as caught:
            ABSENT._replace(loader=musl).load()
        assert "libabsent-xyz.so.9 not found: install libabsent9 (Debian)" == str(caught.value)

    def test_a_library_that_cannot_be_loaded_says_why(self, tmp_path):
        path = tmp_path / "libbroken.so.1"
        path.write_text("this is no library, whatever its name is")
        with pytest.raises(XenUnavailable, match=r"cannot be loaded \(.*\): reinstall libbroken1"):
            Library(str(path), "libbroken1", {}).load()

    def test_a_missing_function_is_named_with_the_package(self):
        library = libc(no_such_function=Signature(ctypes.c_int, ()))
        with pytest.raises(XenUnavailable) as caught:
            library.load()
        assert "the C library has no no_such_function: upgrade glibc" == str(caught.value)

    def test_a_missing_optional_function_is_none(self):
        library = libc(no_such_function=Signature(ctypes.c_int, (), optional=True))
        assert library.load().no_such_function is None

    def test_a_negative_result_is_an_error_with_its_errno(self):
        check = not_negative("close a thing")
        close = libc(close=Signature(ctypes.c_int, (ctypes.c_int,), check)).load().close
        with pytest.raises(HypervisorError) as caught:
            close(-1)
        assert errno.EBADF == caught.value.errno
        assert "cannot close a thing (close): Bad file descriptor" == str(caught.value)

    def test_a_null_result_is_an_error_with_its_errno(self):
        check = not_null("open a directory")
        opendir = libc(opendir=Signature(ctypes.c_void_p, (ctypes.c_char_p,), check)).load().opendir
        with pytest.raises(HypervisorError) as caught:
            opendir(b"/no/such/directory")
        assert errno.ENOENT == caught.value.errno

    def test_a_failure_without_errno_is_still_a_failure(self):
        ctypes.set_errno(0)
        library = libc(abs=Signature(ctypes.c_int, (ctypes.c_int,), not_null("do nothing")))
        with pytest.raises(HypervisorError) as caught:
            library.load().abs(0)
        assert errno.EIO == caught.value.errno

    def test_a_good_result_is_returned(self):
        library = libc(abs=Signature(ctypes.c_int, (ctypes.c_int,), not_negative("count")))
        assert 7 == library.load().abs(-7)


class TestSurvey:
    def test_every_function_is_listed_whatever_is_here(self):
        findings = libxen.survey()
        names = {finding.symbol for finding in findings if finding.symbol}
        assert {name for library in libxen.LIBRARIES for name in library.functions} == names
        assert 3 == len([finding for finding in findings if finding.symbol is None])

    def test_what_is_missing_has_a_remedy(self):
        findings = list(ABSENT.survey())
        assert [(None, False), ("f", False)] == [(f.symbol, f.found) for f in findings]
        assert {"libabsent-xyz.so.9 not found: install libabsent9 (Debian)"} == {
            finding.remedy for finding in findings
        }

    def test_what_is_here_needs_none(self):
        findings = list(libc(abs=Signature(ctypes.c_int, ())).survey())
        assert [(True, True, ""), (True, True, "")] == [
            (f.found, f.required, f.remedy) for f in findings
        ]

    def test_an_optional_function_is_not_required(self):
        (_, finding) = libc(nope=Signature(ctypes.c_int, (), optional=True)).survey()
        assert (False, False) == (finding.found, finding.required)


def test_nothing_is_loaded_by_importing():
    code = (
        "import xen_disk_py.libxen, xen_disk_py.simulated.hypervisor\n"
        "maps = open('/proc/self/maps').read()\n"
        "assert 'libatomic' not in maps and 'libxen' not in maps\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


class TestFence:
    def test_it_says_where_it_comes_from(self):
        fence = atomic.load_fence()
        assert fence.barrier() is None
        assert "libatomic" in fence.source

    def test_a_lock_does_on_x86_without_libatomic(self, monkeypatch):
        monkeypatch.setattr(atomic, "ATOMIC", ABSENT)
        monkeypatch.setattr(atomic, "_ON_X86", True)
        fence = atomic.load_fence()
        assert fence.barrier() is None
        assert "lock" in fence.source

    def test_other_processors_need_libatomic(self, monkeypatch):
        monkeypatch.setattr(atomic, "ATOMIC", atomic.ATOMIC._replace(soname="libabsent.so.1"))
        monkeypatch.setattr(atomic, "_ON_X86", False)
        with pytest.raises(XenUnavailable, match="install libatomic1"):
            atomic.load_fence()


class TestLayout:
    def test_a_copy_segment_is_what_xen_expects(self):
        assert 24 == ctypes.sizeof(CopySegment)
        assert (0, 8, 16, 18, 20) == tuple(
            getattr(CopySegment, name).offset for name, _ in CopySegment._fields_
        )
        foreign = dict(CopyEnd._fields_)["foreign"]
        assert (0, 4, 6) == tuple(getattr(foreign, name).offset for name, _ in foreign._fields_)
        assert (1, 2) == (libxen.COPY_SOURCE_IS_GRANT, libxen.COPY_DESTINATION_IS_GRANT)

    def test_the_compiler_agrees(self, tmp_path):
        compiler = shutil.which("gcc") or shutil.which("cc")
        if compiler is None:
            pytest.skip("no C compiler")
        source = tmp_path / "layout.c"
        source.write_text("#include <xengnttab.h>\n")
        if subprocess.run([compiler, "-E", source], capture_output=True, check=False).returncode:
            pytest.skip("no xengnttab.h (libxen-dev)")
        segment = "struct xengnttab_grant_copy_segment"
        ours = {f"sizeof({segment})": ctypes.sizeof(CopySegment)}
        for name, _ in CopySegment._fields_:
            ours[f"offsetof({segment}, {name})"] = getattr(CopySegment, name).offset
        foreign = dict(CopyEnd._fields_)["foreign"]
        for name, _ in foreign._fields_:
            offset = CopySegment.dest.offset + getattr(foreign, name).offset
            ours[f"offsetof({segment}, dest.foreign.{name})"] = offset
        prints = "".join(f'printf("%zu\\n", (size_t){expression});' for expression in ours)
        source.write_text(
            "#include <stdio.h>\n#include <stddef.h>\n#include <stdint.h>\n"
            f"#include <xengnttab.h>\nint main(void) {{ {prints} return 0; }}\n"
        )
        program = tmp_path / "layout"
        subprocess.run([compiler, "-o", program, source], check=True)
        theirs = subprocess.run([program], capture_output=True, check=True).stdout.split()
        assert ours == dict(zip(ours, map(int, theirs)))


class TestMappedPages:
    @pytest.fixture
    def unmapped(self):
        return []

    @pytest.fixture
    def make(self, unmapped):
        memory = ctypes.create_string_buffer(2 * PAGE_SIZE)

        def make(writable=True, unmap=unmapped.append):
            address = ctypes.addressof(memory)
            return MappedPages(address, 2, writable=writable, unmap=unmap)

        return make

    def test_the_view_is_the_memory(self, make):
        with make() as pages:
            assert (2 * PAGE_SIZE, "B", False) == (
                len(pages.view),
                pages.view.format,
                pages.view.readonly,
            )

    def test_closing_unmaps_once(self, make, unmapped):
        pages = make()
        pages.close()
        pages.close()
        assert [pages] == unmapped

    @pytest.mark.parametrize("writable", [True, False])
    @pytest.mark.parametrize(
        "keep",
        [
            pytest.param(lambda view: view[5:9], id="slice"),
            pytest.param(lambda view: view[5:9][1:2], id="slice-of-a-slice"),
            pytest.param(lambda view: view.cast("I"), id="cast"),
            pytest.param(memoryview, id="memoryview"),
            pytest.param(lambda view: view.toreadonly(), id="read-only-view"),
            pytest.param(lambda view: [view[0:1], view[1:2]], id="list-of-slices"),
            pytest.param(lambda view: view.obj, id="the-array-itself"),
        ],
    )
    def test_what_is_held_keeps_the_pages(self, make, unmapped, keep, writable):
        pages = make(writable)
        kept = keep(pages.view)
        for _ in range(2):
            with pytest.raises(BackendError):
                pages.close()
        assert [] == unmapped
        del kept
        pages.close()
        assert [pages] == unmapped

    def test_a_buffer_of_another_kind_keeps_the_pages(self, make, unmapped):
        pages = make()
        kept = ctypes.c_uint32.from_buffer(pages.view)
        with pytest.raises(BackendError):
            pages.close()
        assert [] == unmapped
        assert 0 == kept.value
        del kept
        pages.close()
        assert [pages] == unmapped

    def test_released_and_temporary_views_do_not(self, make, unmapped):
        pages = make()
        with pages.view[1:2] as part:
            bytes(part)
        bytes(pages.view[7:8])
        pages.close()
        assert [pages] == unmapped

    def test_a_failed_unmapping_can_be_tried_again(self, make):
        failures = [HypervisorError(errno.EINVAL, "not now")]

        def unmap(_pages):
            if failures:
                raise failures.pop()

        pages = make(unmap=unmap)
        with pytest.raises(HypervisorError):
            pages.close()
        pages.close()

    def test_closing_many_closes_all_and_raises_the_first_error(self, make, unmapped):
        first, second, third = make(), make(), make()
        kept = first.view[0:1]
        with pytest.raises(BackendError):
            close_all([first, second, third])
        assert [second, third] == unmapped
        kept.release()


class TestOpening:
    def test_without_xen_the_demo_is_offered(self, monkeypatch):
        monkeypatch.setattr(libxen, "runs_under_xen", lambda: False)
        with pytest.raises(XenUnavailable, match=r"does not run under Xen.*demo"):
            Xen()

    def test_a_missing_device_names_the_module(self, tmp_path):
        device = Device(str(tmp_path / "gntdev"), "xen-gntdev")
        assert f"{device.path} does not exist: modprobe xen-gntdev" == device.problem()

    def test_a_device_without_permission_asks_for_root(self, monkeypatch, tmp_path):
        device = Device(str(tmp_path), "xen-gntdev")
        monkeypatch.setattr(os, "access", lambda path, mode: False)
        assert f"no permission to use {device.path}: run as root" == device.problem()

    def test_a_usable_device_has_no_problem(self, tmp_path):
        assert Device(str(tmp_path), "xen-gntdev").problem() is None

    @pytest.mark.parametrize(
        ("code", "remedy"),
        [
            (errno.ENODEV, "modprobe xen-gntdev"),
            (errno.EACCES, "run as root"),
            (errno.EMFILE, os.strerror(errno.EMFILE)),
        ],
    )
    def test_a_device_that_does_not_open_has_a_remedy(self, tmp_path, code, remedy):
        def refuse(_logger, _flags):
            raise HypervisorError(code, "cannot open")

        with pytest.raises(XenUnavailable, match=remedy):
            libxen._open(refuse, Device(str(tmp_path), "xen-gntdev"))


@pytest.fixture(scope="module")
def stub_library(tmp_path_factory):
    return xen_stub.build(tmp_path_factory.mktemp("stub"))


class TestAgainstTheStub:
    """What the contract does not show: the calls themselves."""

    @pytest.fixture
    def stub(self, monkeypatch, stub_library):
        xen_stub.install(monkeypatch, stub_library)
        stub = ctypes.CDLL(str(stub_library))

        def read(name):
            return ctypes.c_int.in_dll(stub, f"stub_{name}").value

        ctypes.c_int.in_dll(stub, "stub_restricted_to").value = -1
        before = read("open_handles")
        yield read
        assert before == read("open_handles")
        assert 0 == read("bad_unmaps")

    def test_every_function_is_found(self, stub):
        for library in (libxen.GNTTAB, libxen.EVTCHN):
            assert [] == [finding for finding in library.survey() if not finding.found]

    def test_a_missing_device_is_told_before_anything_is_opened(self, stub, monkeypatch):
        for name in ("GNTDEV", "EVTCHN_DEVICE"):
            with monkeypatch.context() as patch:
                patch.setattr(libxen, name, Device("/no/such/device", "xen-thing"))
                with pytest.raises(XenUnavailable, match="modprobe xen-thing"):
                    Xen()

    def test_the_grant_allocator_is_opened_when_first_used(self, stub, monkeypatch):
        monkeypatch.setattr(libxen, "GNTALLOC", Device("/no/such/device", "xen-gntalloc"))
        with Xen() as xen, pytest.raises(XenUnavailable, match="modprobe xen-gntalloc"):
            xen.share_pages(0, 1, writable=True)

    def test_a_channel_is_restricted_to_its_domain(self, stub):
        with Xen() as xen, xen.bind_unbound(3):
            assert 3 == stub("restricted_to")

    def test_a_channel_to_domain_0_cannot_be_restricted(self, stub):
        with Xen() as xen, xen.bind_unbound(0):
            assert -1 == stub("restricted_to")

    def test_a_library_without_restrict_does_as_well(self, stub):
        with Xen() as xen:
            xen._evtchn.xenevtchn_restrict = None
            xen.bind_unbound(3).close()

    @pytest.mark.parametrize("code", [errno.ENOTTY, errno.ENOSYS])
    def test_a_kernel_without_restrict_does_as_well(self, stub, code):
        def refuse(_handle, _domid):
            raise HypervisorError(code, "cannot restrict")

        with Xen() as xen:
            xen._evtchn.xenevtchn_restrict = refuse
            xen.bind_unbound(3).close()

    def test_reserved_channels_are_bound_without_opening_anything(self, stub, monkeypatch):
        with Xen() as xen:
            xen.reserve(3, 2)
            assert 3 == stub("restricted_to")
            reserved = stub("open_handles")
            nothing = Device("/no/such/device", "xen-evtchn")
            monkeypatch.setattr(libxen, "EVTCHN_DEVICE", nothing)
            for _ in range(5):
                one, two = xen.bind_unbound(3), xen.bind_unbound(3)
                for bind in (lambda: xen.bind_unbound(3), lambda: xen.bind_unbound(4)):
                    with pytest.raises(XenUnavailable, match="modprobe xen-evtchn"):
                        bind()
                one.close()
                with pytest.raises(HypervisorError):
                    xen.bind_interdomain(3, 12345)
                two.close()
            assert reserved == stub("open_handles")

    def test_a_reserved_channel_that_is_in_use_is_closed_with_all(self, stub):
        with Xen() as xen:
            xen.reserve(3, 2)
            xen.bind_unbound(3)

    def test_a_handle_that_cannot_be_restricted_is_not_kept(self, stub):
        def refuse(_handle, _domid):
            raise HypervisorError(errno.EACCES, "cannot restrict")

        with Xen() as xen:
            xen._evtchn.xenevtchn_restrict = refuse
            before = stub("open_handles")
            with pytest.raises(HypervisorError, match="cannot restrict"):
                xen.reserve(3, 1)
            assert before == stub("open_handles")

    def test_a_channel_that_does_not_bind_leaves_no_handle(self, stub):
        with Xen() as xen:
            before = stub("open_handles")
            with pytest.raises(HypervisorError) as caught:
                xen.bind_interdomain(3, 12345)
            assert errno.EINVAL == caught.value.errno
            assert before == stub("open_handles")

    def test_a_kept_buffer_keeps_the_handle_open_until_it_is_gone(self, stub):
        xen = Xen()
        shared = xen.share_pages(0, 1, writable=True)
        mapping = xen.map_grants(0, shared.refs, writable=True)
        channel = xen.bind_unbound(0)
        kept = mapping.view[0:1]
        with pytest.raises(BackendError):
            xen.close()
        with pytest.raises(HypervisorError):  # the rest is closed
            channel.notify()
        assert 0 == kept[0]
        kept.release()
        xen.close()
        xen.close()

    def test_a_closed_hypervisor_refuses_everything(self, stub):
        xen = Xen()
        xen.close()
        for use in (
            lambda: xen.map_grants(0, [8], writable=True),
            lambda: xen.share_pages(0, 1, writable=True),
            lambda: xen.bind_unbound(0),
            lambda: xen.bind_interdomain(0, 1),
            lambda: xen.copy_from_grants(0, [Piece(8, 0, 1)], memoryview(bytearray(1))),
            lambda: xen.copy_to_grants(0, [Piece(8, 0, 1)], memoryview(bytearray(1))),
        ):
            with pytest.raises(HypervisorError) as caught:
                use()
            assert errno.EBADF == caught.value.errno

    @pytest.mark.parametrize("copy", ["copy_from_grants", "copy_to_grants"])
    def test_a_copy_tells_which_segment_failed_and_why(self, stub, copy):
        with Xen() as xen, xen.share_pages(0, 2, writable=True) as shared:
            one, two = (Piece(ref, 0, 8) for ref in shared.refs)
            for pieces, reason in [
                ([Piece(1023, 0, 8)], "segment 0 (bad grant reference)"),
                ([one, Piece(2**32 - 1, 0, 8)], "segment 1 (bad grant reference)"),
                ([one, two, one._replace(offset=4090)], "segment 2 (crosses the end of a page)"),
            ]:
                with pytest.raises(HypervisorError, match=re.escape(f"cannot copy {reason}")):
                    getattr(xen, copy)(0, pieces, memoryview(bytearray(8 * len(pieces))))

    def test_a_status_that_is_new_to_us_is_an_error(self, stub, monkeypatch, stub_library):
        status = ctypes.c_int.in_dll(ctypes.CDLL(str(stub_library)), "stub_copy_status")
        monkeypatch.setattr(status, "value", -99)
        with Xen() as xen, xen.share_pages(0, 1, writable=True) as shared:
            with pytest.raises(HypervisorError, match="unknown error") as caught:
                xen.copy_from_grants(0, [Piece(shared.refs[0], 0, 8)], memoryview(bytearray(8)))
            assert errno.EIO == caught.value.errno

    def test_copying_may_be_missing(self, stub):
        with Xen() as xen:
            assert xen.can_copy
            xen._gnttab.xengnttab_grant_copy = None
            assert not xen.can_copy
            with pytest.raises(HypervisorError) as caught:
                xen.copy_to_grants(0, [Piece(8, 0, 8)], memoryview(bytearray(8)))
            assert errno.ENOSYS == caught.value.errno

    def test_memory_is_released_after_a_copy(self, stub):
        memory = bytearray(8)
        with Xen() as xen, xen.share_pages(0, 1, writable=True) as shared:
            for ref in (shared.refs[0], 1023):
                with contextlib.suppress(HypervisorError), memoryview(memory) as view:
                    xen.copy_from_grants(0, [Piece(ref, 0, 8)], view)
            memory.append(0)  # impossible while something points at it
