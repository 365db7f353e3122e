"""libxengnttab and libxenevtchn in a page of C, for one process that is its own guest.

With it the ctypes layer is tried on machines without Xen: pointers that must not lose their
upper half, errno, counts that must match. What Xen itself does is tried on Xen.
"""

import shutil
import subprocess

import pytest

from xen_disk_py import libxen

SOURCE = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE 4096
#define PAGES 1024
#define PORTS 64

static int memory = -1, next_page;
static struct { int granted, writable; uint32_t domid; } table[PAGES];
static struct { void *at; uint32_t count; } areas[256];
static struct { int used, event, peer; uint32_t domid; } ports[PORTS];

int stub_open_handles, stub_restricted_to = -1, stub_bad_unmaps, stub_copy_status;

static void *fail(int error) { errno = error; return NULL; }
static int refuse(int error) { errno = error; return -1; }

/* The handle is far above 4 GiB: an int in its place would lose half of it. */
static void *handle(void) {
    stub_open_handles++;
    return mmap((void *)0x7000deadb000, PAGE, PROT_READ | PROT_WRITE,
                MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
}
static int end(void *h) {
    if (!h) abort();
    stub_open_handles--;
    return munmap(h, PAGE);
}

static void *lay(uint32_t count, const uint32_t *refs, int prot) {
    char *at = mmap(NULL, (size_t)count * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) return NULL;
    for (uint32_t i = 0; i < count; i++)
        mmap(at + (size_t)i * PAGE, PAGE, prot, MAP_SHARED | MAP_FIXED, memory,
             (off_t)refs[i] * PAGE);
    for (int i = 0; i < 256; i++)
        if (!areas[i].at) { areas[i].at = at; areas[i].count = count; return at; }
    abort();
}
static int lift(void *at, uint32_t count) {
    for (int i = 0; i < 256; i++)
        if (areas[i].at == at && areas[i].count == count) {
            areas[i].at = NULL;
            return munmap(at, (size_t)count * PAGE);
        }
    stub_bad_unmaps++;
    return refuse(EINVAL);
}

void *xengnttab_open(void *logger, unsigned flags) { (void)logger; (void)flags; return handle(); }
int xengnttab_close(void *h) { return end(h); }
void *xengnttab_map_domain_grant_refs(void *h, uint32_t count, uint32_t domid, uint32_t *refs,
                                      int prot) {
    if (!h) abort();
    if (!count) return fail(EINVAL);
    for (uint32_t i = 0; i < count; i++)
        if (refs[i] >= PAGES || !table[refs[i]].granted || table[refs[i]].domid != domid
            || ((prot & PROT_WRITE) && !table[refs[i]].writable))
            return fail(EINVAL);
    return lay(count, refs, prot);
}
void *xengnttab_map_grant_ref(void *h, uint32_t domid, uint32_t ref, int prot) {
    return xengnttab_map_domain_grant_refs(h, 1, domid, &ref, prot);
}
int xengnttab_unmap(void *h, void *at, uint32_t count) {
    if (!h) abort();
    return lift(at, count);
}

struct segment {
    union { void *virt; struct { uint32_t ref; uint16_t offset, domid; } foreign; } source, dest;
    uint16_t len, flags;
    int16_t status;
};
int xengnttab_grant_copy(void *h, uint32_t count, struct segment *s) {
    if (!h) abort();
    for (uint32_t i = 0; i < count; i++, s++) {
        uint32_t ref = s->flags == 1 ? s->source.foreign.ref : s->dest.foreign.ref;
        uint16_t at = s->flags == 1 ? s->source.foreign.offset : s->dest.foreign.offset;
        uint16_t domid = s->flags == 1 ? s->source.foreign.domid : s->dest.foreign.domid;
        off_t where = (off_t)ref * PAGE + at;
        if (s->flags != 1 && s->flags != 2) s->status = -1;
        else if (stub_copy_status) s->status = stub_copy_status;
        else if (ref >= PAGES || !table[ref].granted || table[ref].domid != domid) s->status = -3;
        else if (at + s->len > PAGE) s->status = -10;
        else if (s->flags == 1)
            s->status = pread(memory, s->dest.virt, s->len, where) == s->len ? 0 : -1;
        else if (!table[ref].writable) s->status = -8;
        else s->status = pwrite(memory, s->source.virt, s->len, where) == s->len ? 0 : -1;
    }
    return 0;
}

void *xengntshr_open(void *logger, unsigned flags) { (void)logger; (void)flags; return handle(); }
int xengntshr_close(void *h) { return end(h); }
void *xengntshr_share_pages(void *h, uint32_t domid, int count, uint32_t *refs, int writable) {
    if (!h) abort();
    if (memory < 0) {
        memory = memfd_create("stub", MFD_CLOEXEC);
        if (ftruncate(memory, PAGES * PAGE)) abort();
    }
    if (next_page == 0) next_page = 8;
    if (next_page + count > PAGES) return fail(ENOSPC);
    for (int i = 0; i < count; i++) {
        refs[i] = next_page++;
        table[refs[i]].granted = 1;
        table[refs[i]].writable = writable;
        table[refs[i]].domid = domid;
    }
    return lay(count, refs, PROT_READ | PROT_WRITE);
}
int xengntshr_unshare(void *h, void *at, uint32_t count) {
    if (!h) abort();
    return lift(at, count);
}

static int *own_port(void *h) { if (!h) abort(); return h; }
void *xenevtchn_open(void *logger, unsigned flags) {
    (void)logger; (void)flags;
    int *h = handle();
    for (int i = 1; i < PORTS; i++)
        if (!ports[i].used) {
            ports[i].used = 1; ports[i].peer = 0; ports[i].domid = -1;
            ports[i].event = eventfd(0, EFD_CLOEXEC);  /* blocking, on purpose */
            *h = i;
            return h;
        }
    abort();
}
int xenevtchn_fd(void *h) { return ports[*own_port(h)].event; }
int xenevtchn_close(void *h) {
    int port = *own_port(h);
    close(ports[port].event);
    ports[ports[port].peer].peer = 0;
    ports[port].used = 0;
    return end(h);
}
int xenevtchn_restrict(void *h, uint16_t domid) {
    own_port(h);
    if (domid == 0) return refuse(EINVAL);
    stub_restricted_to = domid;
    return 0;
}
int xenevtchn_bind_unbound_port(void *h, uint32_t domid) {
    ports[*own_port(h)].domid = domid;
    return *own_port(h);
}
int xenevtchn_bind_interdomain(void *h, uint32_t domid, uint32_t remote) {
    int port = *own_port(h);
    if (remote >= PORTS || !ports[remote].used || ports[remote].peer
        || ports[remote].domid != domid)
        return refuse(EINVAL);
    ports[port].peer = remote;
    ports[remote].peer = port;
    eventfd_write(ports[port].event, 1);
    return port;
}
int xenevtchn_unbind(void *h, uint32_t port) {
    if (*own_port(h) != (int)port) return refuse(EINVAL);
    ports[ports[port].peer].peer = 0;
    ports[port].peer = 0;
    return 0;
}
int xenevtchn_notify(void *h, uint32_t port) {
    if (*own_port(h) != (int)port) return refuse(EINVAL);
    if (ports[port].peer) eventfd_write(ports[ports[port].peer].event, 1);
    return 0;
}
int xenevtchn_pending(void *h) {
    eventfd_t value;
    return eventfd_read(ports[*own_port(h)].event, &value) ? -1 : *own_port(h);
}
int xenevtchn_unmask(void *h, uint32_t port) {
    return *own_port(h) == (int)port ? 0 : refuse(EINVAL);
}
"""


def build(directory):
    """Compile the stub; its path."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler for the stub of the Xen libraries")
    library = directory / "libxenstub.so"
    source = directory / "stub.c"
    source.write_text(SOURCE)
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-w", "-o", library, source], check=True)
    return library


def install(monkeypatch, library):
    """Make ``libxen.Xen()`` use it."""
    monkeypatch.setattr(libxen, "runs_under_xen", lambda: True)
    monkeypatch.setattr(libxen, "GNTTAB", libxen.GNTTAB._replace(soname=str(library)))
    monkeypatch.setattr(libxen, "EVTCHN", libxen.EVTCHN._replace(soname=str(library)))
    for device in ("GNTDEV", "EVTCHN_DEVICE", "GNTALLOC"):
        monkeypatch.setattr(libxen, device, libxen.Device("/dev/null", f"no-{device}"))
