"""The handshake: the whole table, and what it leads to with a frontend that behaves."""

from __future__ import annotations

import itertools

import pytest

from xen_disk_py.xenbus.states import Action, Address, State, react

UNKNOWN, INITIALISING, INIT_WAIT, INITIALISED, CONNECTED, CLOSING, CLOSED = range(7)

LETTERS = {
    ".": Action.STAY,
    "C": Action.CONNECT,
    "c": Action.CLOSE,
    "D": Action.DISCONNECT,
    "R": Action.REOPEN,
    "F": Action.FINISH,
}
# Rows: the backend's state. Columns: the frontend gone, then its states 0 to 8.
ONLINE = """
    0 F.........
    1 F.........
    2 F...CCcD..
    3 F.........
    4 F.R...cD..
    5 FDD....DDD
    6 F.R.CC....
    7 F.........
    8 F.........
"""
OFFLINE = ONLINE.replace("6 F.R.CC....", "6 FFFFFFFFFF")


def table(text, online):
    for line in text.split("\n")[1:-1]:
        backend, letters = line.split()
        for frontend, letter in zip([None, *range(9)], letters):
            yield int(backend), frontend, online, LETTERS[letter]


TABLE = [*table(ONLINE, online=True), *table(OFFLINE, online=False)]


class TestReact:
    def test_the_table_is_whole(self):
        cells = {(backend, frontend, online) for backend, frontend, online, _ in TABLE}

        assert set(itertools.product(range(9), [None, *range(9)], [True, False])) == cells
        assert 180 == len(TABLE)

    @pytest.mark.parametrize(("backend", "frontend", "online", "action"), TABLE)
    def test_a_cell_of_the_table(self, backend, frontend, online, action):
        state = None if frontend is None else State(frontend)

        assert action is react(State(backend), state, online)

    def test_it_closes_before_it_is_closed_while_connected(self):
        # Never 4 to 6 by itself (OVMF), except behind a frontend that has closed already.
        for frontend in range(6):
            for online in (True, False):
                action = react(State.CONNECTED, State(frontend), online)
                assert action is not Action.DISCONNECT


def backend_after(backend, action):
    """Say what the backend publishes for an action; None: it has gone."""
    return {
        Action.STAY: backend,
        Action.CONNECT: CONNECTED,
        Action.CLOSE: CLOSING,
        Action.DISCONNECT: CLOSED,
        Action.REOPEN: INIT_WAIT,
        Action.FINISH: None,
    }[action]


def frontend_moves(frontend, backend):
    """Where a frontend that behaves may go because of the backend's state (Linux blkfront)."""
    if backend == INIT_WAIT and frontend == INITIALISING:
        return {INITIALISED, CONNECTED}  # OVMF and mirage skip a state
    if backend == CONNECTED and frontend == INITIALISED:
        return {CONNECTED}
    if backend in (CLOSING, CLOSED) and frontend in (INIT_WAIT, INITIALISED, CONNECTED):
        return {CLOSING, CLOSED}
    if backend in (CLOSING, CLOSED, None) and frontend == CLOSING:
        return {CLOSED}
    return set()


def frontend_whims(frontend):
    """Where it may go of itself: a driver is unloaded, loaded again, or never waits."""
    if frontend == INITIALISING:
        return {INITIALISED, CONNECTED, CLOSED}
    if frontend in (INITIALISED, CONNECTED):
        return {CLOSING, INITIALISING}  # or its kernel is replaced
    if frontend == CLOSING:
        return {CLOSED}
    if frontend == CLOSED:
        return {INITIALISING}
    return set()


def reachable():
    """Find every pair of states that comes up while the toolstack wants the device."""
    found, fresh = set(), {(INIT_WAIT, INITIALISING)}
    while fresh:
        backend, frontend = fresh.pop()
        found.add((backend, frontend))
        action = react(State(backend), State(frontend), online=True)
        after = {(backend_after(backend, action), frontend)}
        for state in frontend_moves(frontend, backend) | frontend_whims(frontend):
            after.add((backend, state))
        fresh |= after - found
    return sorted(found)


class TestLife:
    def test_backend_and_frontend_come_to_be_connected(self):
        backend, frontend = INIT_WAIT, INITIALISING
        seen = []
        for _ in range(5):
            backend = backend_after(backend, react(State(backend), State(frontend), online=True))
            frontend = min(frontend_moves(frontend, backend), default=frontend)
            seen.append((backend, frontend))

        expected = [(INIT_WAIT, INITIALISED), *[(CONNECTED, CONNECTED)] * 4]
        assert expected == seen

    def test_all_pairs_that_matter_are_reached(self):
        assert {(INIT_WAIT, INITIALISING), (CONNECTED, CONNECTED), (CLOSED, CLOSED)} <= set(
            reachable()
        )
        assert {INIT_WAIT, CONNECTED, CLOSING, CLOSED} == {backend for backend, _ in reachable()}

    @pytest.mark.parametrize(("backend", "frontend"), reachable())
    def test_a_detach_ends_whatever_the_order_of_steps(self, backend, frontend):
        def follow(backend, frontend, steps):
            """Take every path; on each the backend must be gone before the steps are."""
            if backend is None:
                return
            assert steps, f"stuck at backend {backend}, frontend {frontend}"
            action = react(State(backend), State(frontend), online=False)
            moves = frontend_moves(frontend, backend)
            assert moves or action is not Action.STAY, f"stuck at {backend}, {frontend}"
            if action is not Action.STAY:
                follow(backend_after(backend, action), frontend, steps - 1)
            for state in moves:
                follow(backend, state, steps - 1)

        # libxl and disconnect write online=0 and Closing, but leave Closed as it is
        follow(CLOSED if backend == CLOSED else CLOSING, frontend, steps=6)

    @pytest.mark.parametrize("backend", range(9))
    def test_without_its_directory_the_frontend_is_gone(self, backend):
        assert react(State(backend), None, online=True) is Action.FINISH

    def test_a_device_opens_again_for_a_driver_that_was_loaded_again(self):
        for backend, frontend in reachable():
            if frontend != INITIALISING or backend == INIT_WAIT:
                continue
            states = [backend]
            while states[-1] != INIT_WAIT and len(states) < 4:
                action = react(State(states[-1]), State.INITIALISING, online=True)
                states.append(backend_after(states[-1], action))
            assert INIT_WAIT == states[-1], states


class TestState:
    @pytest.mark.parametrize("number", range(9))
    def test_its_number_is_read(self, number):
        assert State.parse(str(number)) is State(number)

    def test_no_key_is_no_state(self):
        assert State.parse(None) is None

    @pytest.mark.parametrize(
        "text", ["", "9", "10", "44", "-1", " 4", "4 ", "4\0", "04", "four", "²", "٤", "01234"]
    )
    def test_nonsense_is_unknown(self, text):
        assert State.parse(text) is State.UNKNOWN

    @pytest.mark.parametrize(
        ("state", "text"),
        [
            (State.INIT_WAIT, "2 (InitWait)"),
            (State.CONNECTED, "4 (Connected)"),
            (State.RECONFIGURED, "8 (Reconfigured)"),
        ],
    )
    def test_it_shows_as_xen_writes_it(self, state, text):
        assert text == str(state)


class TestAddress:
    def test_directories_are_where_libxl_has_them(self):
        address = Address(backend_domid=2, frontend_domid=5, devid=51728, kind="vbd3")

        assert "/local/domain/2/backend/vbd3/5/51728" == address.backend
        assert "/local/domain/5/device/vbd/51728" == address.frontend
        assert "/libxl/5/device/vbd/51728" == address.toolstack

    def test_the_frontend_goes_first_when_all_are_removed(self):
        address = Address(0, 5, 51712, "qdisk")

        assert [
            "/local/domain/5/device/vbd/51712",
            "/local/domain/0/backend/qdisk/5/51712",
            "/libxl/5/device/vbd/51712",
        ] == address.directories
