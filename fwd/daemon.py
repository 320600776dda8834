"""fwd, the daemon: it wires the core to the edges and keeps them all served from one event loop.

Each turn handles a bounded number of packets, then lets the loop serve timers, the control socket and what
the VICI threads and the interface watcher handed over. What there is to decide, the core decides.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import logging
import os
import platform
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

import click

from . import __version__
from .api import Api
from .config import DEFAULT_PATH, Config, ConfigError, load
from .core import records
from .core.events import (
    ABOUT_NO_SESSION,
    Event,
    SessionCreated,
    SessionEnded,
    SessionRekeyed,
    TunnelTrouble,
)
from .core.fast_path import Found
from .core.firewall import Firewall
from .core.histogram import Histogram
from .core.interfaces import InterfaceEvent
from .core.sa import SaEvent, SaSnapshot, SaSourceLost
from .core.session import Session
from .core.succession import Succession
from .edge import ipfix, systemd
from .edge.clients import Access, ListenError
from .edge.control import ControlServer
from .edge.endpoint import Endpoint
from .edge.interfaces import InterfaceError, InterfaceWatcher
from .edge.kernel_path import KernelPath
from .edge.metrics import MetricsServer
from .edge.nfqueue import PacketQueue, QueueError
from .edge.queue_stats import UNREADABLE, is_readable, kernel_queue_stats
from .edge.ruleset import Backend, Ruleset, RulesetError
from .edge.state_file import StateError, StateFile
from .edge.vici import ViciListener
from .log_keeper import LogKeeper
from .metrics import Figures, HostFigures, Metrics, expose
from .reference import default_config
from .rpc import CONFIGURATION_REFUSED, RpcError

log = logging.getLogger("fwd")

#: Packets handled before the loop serves everything else: some 2 ms' worth, 10 if each is the first of a session.
PACKETS_PER_TURN = 256
#: And at most so many more, where the kernel was told something: those that came meanwhile.
PACKETS_AFTER_INSTALL = 64

#: Garbage is looked for after so many new objects, some 8,000 sessions' worth: that takes about 5 ms.
GARBAGE_THRESHOLDS = (50_000, 50, 100)

#: Events of SAs that are taken in one go, some 3 ms' worth, and that may wait before the thread that reads them does.
SA_EVENTS_PER_TURN = 16
SA_EVENTS_WAITING = 1024

#: How long the thread that reads thousands of SAs may keep packets waiting before it is their turn, in seconds.
SWITCH_S = 0.001

#: What the edges count since this daemon began.
_EDGE_COUNTERS = (
    *("control_request", "control_refused", "metrics_request", "metrics_refused"),
    *("queue_kernel_drop", "queue_socket_drop"),
)

#: The loop waits for a timer by the millisecond; what is later than that was kept waiting.
_LAG_BOUNDS_S = (1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 0.5, 1.0)

#: How often two of the kernel's counters are read in the hope that no packet comes between.
UNDECIDED_TRIES = 20

#: After the state file could not be written, the next try comes so much later, in seconds.
SAVE_RETRY_S = 5.0

#: How often fwd looks whether its rules are still there, in seconds.
GUARD_INTERVAL_S = 2.0
#: In every so many of these looks iptables' chains are included, where there are any: programs have to be run for it.
GUARD_CHAINS_TURNS = 5

#: How long the kernel may take at the start to tell of its interfaces, in seconds.
INTERFACES_S = 10.0

#: After a timer met a defect, the next one comes so much later, in seconds.
TIMER_RETRY_S = 1.0

#: Exit status of a daemon that left its rules and the kernel's fast path to a successor; the unit knows it.
HANDED_OVER = 10

#: How long a clean stop goes on handing back packets that wait in the queue, in seconds.
DRAIN_S = 1.0


class Daemon:
    """One running fwd: the core, its edges, and what connects them."""

    def __init__(self, config: Config, config_path: Path | None) -> None:
        self._config = config
        self._config_path = config_path
        self._loop = asyncio.get_running_loop()
        self._firewall = Firewall(config.settings(), time.monotonic())
        self._succession = Succession(self._firewall)
        plane = config.dataplane
        self._queue = PacketQueue(
            plane.queue,
            plane.queue_length,
            self._firewall.receive_packet,
            self._firewall.drop_unhandled,
        )
        wanted = None if plane.backend == "auto" else Backend(plane.backend)
        self._ruleset = Ruleset(plane.queue, plane.fail == "open", self._firewall.fast_path.capacity, wanted)
        self._kernel: KernelPath | None = None
        self._state = StateFile(Path(config.state.file), records.LAYOUT) if config.state.file else None
        self._state_in_words = "none by configuration"
        self._no_save_before = 0.0
        self._shown: tuple[Session, ...] = ()
        self._counted_before = dict.fromkeys(_EDGE_COUNTERS, 0)
        self._log = LogKeeper(config, self._firewall, self._in_loop, self._logged)
        self._interfaces = InterfaceWatcher(self._interface_event)
        self._sa_events: deque[SaEvent] = deque()
        self._is_sa_turn_due = False
        self._take_sa_events_soon = self._in_loop(self._take_sa_events)
        self._vici = ViciListener(config.vici.socket, self._sa_event_from_thread)
        self._api = Api(
            self._firewall,
            time.monotonic,
            config.vici.socket,
            self._host,
            self._take_edge_counts,
            self._refresh,
            self._reload_on_request,
            self._log.page,
        )
        self._control = ControlServer(
            Path(config.control.socket), self._control_request, self._api.rights, _access(config)
        )
        metrics = Metrics(self._firewall, time.monotonic, self._host_figures, self._count_edges)
        self._metrics: MetricsServer[Figures] = MetricsServer(metrics.take, expose, self._control.access)
        self._metrics_in_words = "off"
        self._lags = Histogram(_LAG_BOUNDS_S)
        self._exporter = ipfix.Exporter(self._firewall, self._save)
        self._timer: asyncio.TimerHandle | None = None
        self._timer_set_at = 0.0
        self._no_timer_before = 0.0
        self._stop = asyncio.Event()
        self._is_ready = False
        self._is_reload_due = False
        self._is_handing_over = False
        self._is_blind = False

    async def run(self) -> int:
        """Work until a signal ends it; gives the exit status.

        Raises QueueError, RulesetError, InterfaceError, ListenError or StateError.
        """
        self._take_signals()
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(self._queue.close)
            fd = self._queue.open()  # before all else: it fails if another fwd has the queue, whose rules must stay
            self._ruleset.refuse_anothers()
            stack.push_async_callback(self._control.stop)
            await self._control.open()
            watcher = asyncio.create_task(self._interfaces.run())
            stack.callback(watcher.cancel)
            await self._wait_for_interfaces()
            if self._stop.is_set():
                if not self._is_handing_over:
                    Ruleset.remove()  # a killed fwd's: after exit status 0 no rules are there
                return self._exit_status
            stack.callback(self._leave)
            self._log.start()
            log.info("rules installed: %s", self._ruleset.install())
            self._take_over()
            self._loop.add_reader(fd, self._packets)
            stack.callback(self._loop.remove_reader, fd)
            stack.callback(self._vici.stop)
            self._vici.start()
            stack.callback(asyncio.create_task(self._guard_rules()).cancel)
            self._run_timer()
            stack.callback(self._metrics.close)
            self._begin_metrics()
            self._exporter.start(_export_options(self._config))
            await self._control.start()  # late: who gets an answer may count on all the rest
            if (interval := systemd.watchdog_interval_s()) is not None:
                stack.callback(asyncio.create_task(self._feed_watchdog(interval)).cancel)
            # Sessions come and live by the thousand: to look for garbage every 700 objects costs a third of the time.
            gc.freeze()
            gc.set_threshold(*GARBAGE_THRESHOLDS)
            sys.setswitchinterval(SWITCH_S)
            log.info("fwd %s is ready: queue %d, %s", __version__, self._config.dataplane.queue, self._summary())
            systemd.notify("READY=1", f"STATUS={self._summary()}")
            self._is_ready = True
            if self._is_reload_due:
                self._reload()
            await self._stop.wait()
            systemd.notify("STOPPING=1")
            log.info("handing over" if self._is_handing_over else "stopping")
        return self._exit_status

    @property
    def _exit_status(self) -> int:
        return HANDED_OVER if self._is_handing_over else 0

    def _begin_metrics(self) -> None:
        try:
            self._metrics.listen(self._config.metrics.address)
            self._metrics_in_words = self._config.metrics.listen or "off"
        except ListenError as error:  # a firewall is worth more than its metrics
            log.error("no metrics: %s", error)
            self._metrics_in_words = f"none: {error}"

    async def _wait_for_interfaces(self) -> None:
        """Until they are known, or a signal says to stop. Raises InterfaceError."""
        waits = [asyncio.create_task(event.wait()) for event in (self._interfaces.ready, self._stop)]
        await asyncio.wait(waits, timeout=INTERFACES_S, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        if not self._interfaces.ready.is_set() and not self._stop.is_set():
            raise InterfaceError(
                f"the kernel did not tell of its interfaces within {INTERFACES_S:g} s: is rtnetlink (AF_NETLINK) denied"
                " to this process? the log says what it answered"
            )

    def _take_signals(self) -> None:
        """From now on no signal kills: one that comes during the start waits for its end."""
        self._loop.add_signal_handler(signal.SIGHUP, self._reload)
        self._loop.add_signal_handler(signal.SIGUSR1, self._hand_over_and_stop)
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._stop.set)

    # --- what the edges hand over -------------------------------------------------------------------

    def _take_over(self) -> None:
        """Go on where a former daemon stopped: with its state file, and its decisions if they are still in the kernel.

        Raises RulesetError or StateError.
        """
        rows: dict[bytes, bytes] = {}
        try:
            if self._state is not None:
                rows = self._state.open()
                self._state_in_words = self._config.state.file
        except StateError as error:  # to protect nobody is worse than to forget
            self._keep_nothing(error)
        found: list[Found] = []
        undecided = None
        if self._ruleset.backend is not None and self._ruleset.backend.has_maps:
            self._kernel = KernelPath(self._ruleset.backend)
            undecided = self._undecided_before()
            found = self._kernel.find_all() if self._ruleset.kept_maps else []
        self._firewall.changes.is_on = self._state is not None
        first_log_number = int(time.time() * 1e6)  # more than any that a former state numbered
        try:
            orphans = self._succession.restore(rows, found, undecided, time.monotonic(), first_log_number)
        except records.RecordError as error:
            self._begin_state_anew(f"it is damaged: {error}")
            rows = {}
            orphans = self._succession.restore(rows, found, undecided, time.monotonic(), first_log_number)
        except Exception:
            log.exception("what a former fwd left met a defect of this one")
            self._begin_state_anew("it met a defect of fwd")
            self._keep_nothing(StateError("they are half there"))  # or they would be written down like that
            raise StateError(
                "cannot go on where a former fwd stopped: start it again, and sessions begin anew"
            ) from None
        self._log.judge_left(are_alive=bool(rows))
        if self._kernel is not None:
            self._succession.note_orphans_removed(orphans, self._kernel.remove(orphan.key for orphan in orphans))
            self._firewall.use_fast_path(self._config.dataplane.fast_path == "auto")
        values = self._firewall.counters.values
        self._counted_before = {name: values[name] for name in _EDGE_COUNTERS}
        if rows or found:
            unseen = values["pkt_unseen"]
            sessions, taken = len(self._firewall.table), len(found) - len(orphans)
            log.info("took over %d sessions, %d SPIs in the kernel; %d packets unseen so far", sessions, taken, unseen)
        self._serve_kernel()
        self._save()

    def _undecided_before(self) -> int | None:
        """Packets that reached the queue's rule before this daemon had the queue; None if the kernel does not tell."""
        for _ in range(UNDECIDED_TRIES):  # both numbers at one moment, between two packets
            before, undecided = kernel_queue_stats(self._queue.number), self._ruleset.undecided()
            if undecided is None or before is None or before == kernel_queue_stats(self._queue.number):
                break
        return None if undecided is None or before is None else undecided - before.offered

    def _begin_state_anew(self, reason: str) -> None:
        try:
            if self._state is not None:
                self._state.set_aside(reason)
        except StateError as error:
            self._keep_nothing(error)

    def _keep_nothing(self, error: StateError) -> None:
        log.error("sessions will not outlive this fwd: %s", error)
        if self._state is not None:
            self._state.close()
        self._state = None
        self._state_in_words = f"none: {error}"
        self._firewall.changes.is_on = False

    def _serve_kernel(self, is_drained: bool = False) -> bool:
        """Let the kernel do what the core wants of it; whether it was anything. `is_drained`: no packet waits.

        What is known of an element's counts is saved before the kernel removes it, and its last counts right after.
        """
        now, is_served = time.monotonic(), False
        while self._kernel is not None and (work := self._firewall.take_work(now, is_drained)) is not None:
            is_served = True
            leaving = {element.flow.session: None for element in work.removals}
            if leaving:
                self._save(leaving)
            self._firewall.apply_outcome(work, self._kernel.carry_out(work), time.monotonic())
            if leaving:
                self._save(leaving)
        return is_served

    def _save(self, sessions: Collection[Session] | None = None) -> None:
        """Write what changed, or what changed of these sessions, to the state file."""
        now = time.monotonic()
        if self._state is None or now < self._no_save_before:
            return
        try:
            self._state.write(self._succession.take_changes(now, sessions))
        except StateError as error:
            log.error("not saved, tried again in %g s: %s", SAVE_RETRY_S, error)
            self._firewall.counters.add("state_not_saved")
            self._no_save_before = now + SAVE_RETRY_S
            self._succession.save_all(self._no_save_before)

    def _in_loop(self, work: Callable[..., None]) -> Callable[..., None]:
        """What another thread may call to have that done here."""

        def soon(*arguments: object) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed already
                self._loop.call_soon_threadsafe(work, *arguments)

        return soon

    def _logged(self, number: int) -> None:
        self._firewall.note_logged(number)
        self._after_turn()

    def _packets(self) -> None:
        try:
            if self._serve_kernel(is_drained=self._queue.turn(PACKETS_PER_TURN)):
                # What came while the kernel was told is being overtaken: it comes before all else.
                self._serve_kernel(is_drained=self._queue.turn(PACKETS_AFTER_INSTALL))
        finally:
            self._after_turn()

    def _sa_event_from_thread(self, event: SaEvent) -> None:
        """Take an event in; of a storm, the rest waits in charon."""
        while len(self._sa_events) >= SA_EVENTS_WAITING and not self._stop.is_set():
            time.sleep(0.01)
        self._sa_events.append(event)
        if not self._is_sa_turn_due:
            self._is_sa_turn_due = True
            self._take_sa_events_soon()

    def _take_sa_events(self) -> None:
        """Let the core learn the next events, one after the other and not too many: packets wait."""
        self._is_sa_turn_due = False  # before the look at what is there: what comes after it has a turn of its own
        budget = SA_EVENTS_PER_TURN
        while self._sa_events and budget and not self._firewall.is_learning:
            try:
                self._sa_event(self._sa_events.popleft())
            except Exception:
                log.exception("an event of SAs met a defect of fwd; all SAs are read again soon")
            budget -= 1
        if self._sa_events and not self._is_sa_turn_due:
            self._is_sa_turn_due = True
            self._loop.call_soon(self._take_sa_events)

    def _sa_event(self, event: SaEvent) -> None:
        if isinstance(event, SaSourceLost):
            log.warning("%s: %s; SAs known so far stay in use", self._config.vici.socket, event.reason)
        elif isinstance(event, SaSnapshot) and not self._firewall.directory.is_fresh:
            log.info("%s: connected, %d CHILD_SAs", self._config.vici.socket, len(event.sas))
        self._firewall.apply_sa(event, time.monotonic())
        self._after_turn()

    def _interface_event(self, event: InterfaceEvent) -> None:
        self._firewall.apply_interface(event)

    def _control_request(self, method: str, params: Mapping[str, object]) -> object:
        try:
            return self._api.dispatch(method, params)
        finally:
            self._after_turn()
            self._save(self._shown)  # what somebody was told is not to be forgotten
            self._shown = ()

    def _run_timer(self) -> None:
        if self._timer is not None:
            self._lags.note(max(0.0, time.monotonic() - max(self._timer.when(), self._timer_set_at)))
        self._timer = None
        try:
            if self._firewall.changes.is_due(time.monotonic()):
                self._save()  # in a turn of its own: packets have theirs before whatever else is due
            else:
                self._firewall.handle_timer(time.monotonic())
        except Exception:
            log.exception("a timer met a defect of fwd; the next one comes in %g s", TIMER_RETRY_S)
            self._firewall.counters.add("timer_internal_error")
            self._no_timer_before = time.monotonic() + TIMER_RETRY_S
        self._after_turn()

    def _after_turn(self) -> None:
        """Tell what happened, and be called again when the core wants it."""
        try:
            self._serve_kernel()
            while (event := self._firewall.next_event()) is not None:
                self._api.note_event(event)
                _log_event(event)
            self._log.hand_out()
        finally:
            deadline = max(self._firewall.next_deadline(), self._no_timer_before)
            if self._timer is None or deadline < self._timer.when():
                if self._timer is not None:
                    self._timer.cancel()
                self._timer = self._loop.call_at(deadline, self._run_timer)
                self._timer_set_at = time.monotonic()

    # --- what the service manager and the operator ask ------------------------------------------------

    async def _feed_watchdog(self, interval_s: float) -> None:
        while True:
            systemd.notify("WATCHDOG=1", f"STATUS={self._summary()}")
            await asyncio.sleep(interval_s)

    async def _guard_rules(self) -> None:
        """Put fwd's rules back should anybody flush them: `nft flush ruleset` is common in start scripts."""
        for turn in itertools.count(1):
            await asyncio.sleep(GUARD_INTERVAL_S)
            self._count_edges()
            try:
                is_in_place = self._ruleset.is_in_place()
                if is_in_place and self._ruleset.has_chains and turn % GUARD_CHAINS_TURNS == 0:
                    is_in_place = await asyncio.to_thread(self._ruleset.are_chains_in_place)
                if not is_in_place:
                    log.error("somebody removed the rules of fwd; installed again: %s", self._ruleset.install())
                    self._firewall.counters.add("rules_restored")
            except (RulesetError, OSError) as error:
                log.error("the rules of fwd cannot be seen to: %s", error)

    def _reload(self) -> None:
        """Read the configuration again, whole or not at all; during the start, as soon as that is done."""
        if not self._is_ready:  # asked here, because a handler that is changed meanwhile may still run as the old one
            self._is_reload_due = True
            return
        systemd.reloading()
        try:
            self._take_configuration(load(self._config_path))
        except (ConfigError, ListenError, RulesetError) as error:
            for line in str(error).splitlines():
                log.error("not reloaded: %s", line)
        finally:  # whatever else went wrong: systemd waits for this
            systemd.notify("READY=1", f"STATUS={self._summary()}")

    def _reload_on_request(self) -> dict[str, object]:
        """The same for a client, who is told what came of it. Raises RpcError."""
        try:
            self._take_configuration(load(self._config_path))
        except (ConfigError, ListenError, RulesetError) as error:
            raise RpcError(CONFIGURATION_REFUSED, f"nothing was changed: {error}") from None
        return {
            "configuration": _source(self._config_path),
            "rules": len(self._config.rules),
            "sessions": len(self._firewall.table),
        }

    def _take_configuration(self, config: Config) -> None:
        """Go on with another configuration.

        Raises ConfigError, ListenError or RulesetError, and then nothing has changed.
        """
        before, after = self._config.restart_keys(), config.restart_keys()
        fixed = [key for key, value in before.items() if after[key] != value]
        if fixed:
            raise ConfigError(f"{', '.join(fixed)}: only a restart changes this; nothing was changed")
        self._metrics.listen(config.metrics.address)
        try:
            if config.dataplane.fail != self._config.dataplane.fail:
                log.info("rules installed: %s", self._ruleset.change(config.dataplane.fail == "open"))
        except RulesetError:
            self._metrics.listen(self._config.metrics.address)
            raise
        self._metrics_in_words = config.metrics.listen or "off"
        self._config = config
        self._firewall.reconfigure(config.settings())
        if self._kernel is not None:
            self._firewall.use_fast_path(config.dataplane.fast_path == "auto")
        self._exporter.start(_export_options(config))
        self._control.access = self._metrics.access = _access(config)
        logging.getLogger().setLevel(config.log.level.upper())
        log.info("reloaded: %d rules", len(config.rules))

    def _hand_over_and_stop(self) -> None:
        self._is_handing_over = True
        self._stop.set()

    def _leave(self) -> None:
        """Take the rules out, or leave all in order for a successor; and hand back what waits in the queue."""
        if not self._is_handing_over:
            try:
                Ruleset.detach()
                if self._kernel is not None:
                    self._firewall.retire(self._kernel.find_all(), time.monotonic())
            except (OSError, RulesetError) as error:
                log.error("the last counts of the kernel are lost: %s", error)
                self._firewall.fast_path.is_on = False
            Ruleset.remove()
            self._close_kernel()
        else:
            self._firewall.look_no_more(time.monotonic())
            self._serve_kernel()
        deadline = time.monotonic() + DRAIN_S
        while not self._queue.turn(PACKETS_PER_TURN) and time.monotonic() < deadline:
            self._serve_kernel()
        if self._serve_kernel(is_drained=True):
            self._queue.turn(PACKETS_AFTER_INSTALL)
        self._after_turn()
        self._firewall.credit_all()
        if not self._is_handing_over:
            self._firewall.flow_export.finish()
        self._exporter.finish(time.monotonic() + DRAIN_S)
        self._save_all()
        self._log.leave(may_be_last=self._is_ready and not self._is_handing_over)
        self._save_all()
        self._close_kernel()
        if self._state is not None:
            self._state.close()

    def _save_all(self) -> None:
        while self._state is not None and self._firewall.changes and time.monotonic() >= self._no_save_before:
            self._save()

    def _close_kernel(self) -> None:
        if self._kernel is not None:
            self._kernel.close()
            self._kernel = None

    def _refresh(self, sessions: Iterable[Session]) -> None:
        """Bring what the kernel counted for these sessions, which are about to be shown."""
        self._shown = tuple(sessions)
        self._firewall.fast_path.read_sessions(self._shown)
        self._serve_kernel()

    def _take_edge_counts(self) -> None:
        """Bring what the edges and the kernel count to the global counters."""
        self._firewall.fast_path.read_oldest()
        self._serve_kernel()
        self._count_edges()

    def _count_edges(self) -> None:
        """What is counted outside of the core: requests, and packets that never came."""
        stats = kernel_queue_stats(self._queue.number)
        if stats is None and not self._is_blind and not is_readable():
            self._is_blind = True
            log.warning("what the kernel drops before fwd cannot be counted: %s", UNREADABLE)
        dropped = (stats.queue_dropped, stats.socket_dropped) if stats is not None else ()
        asked = (self._control.requests, self._control.refused, self._metrics.requests, self._metrics.refused)
        for name, value in zip(_EDGE_COUNTERS, (*asked, *dropped), strict=False):
            self._firewall.counters.values[name] = self._counted_before[name] + value

    def _summary(self) -> str:
        vici = "charon connected" if self._firewall.directory.is_fresh else "charon away"
        return f"{len(self._firewall.table)} sessions, {vici}"

    def _fast_path_in_words(self) -> str:
        path = self._firewall.fast_path
        if self._kernel is None:
            return "none: all packets pass through the daemon (see queue-rules)"
        if not path.is_on:
            return "off by configuration"
        return f"{path.in_kernel} SPIs in the kernel, room for {path.capacity}"

    def _host(self) -> Mapping[str, object]:
        directory, plane = self._firewall.directory, self._config.dataplane
        stats = kernel_queue_stats(plane.queue)
        return {
            "hostname": socket.gethostname(),
            "fwd-version": __version__,
            "kernel": platform.release(),
            "pid": os.getpid(),
            "uptime": _duration(time.monotonic() - self._firewall.started_at),
            "configuration": _source(self._config_path),
            "rules": len(self._config.rules),
            "default-rule": f"{self._config.default_rule.name} ({self._config.default_rule.action})",
            "queue": plane.queue,
            "queue-waiting": stats.waiting if stats else 0 if is_readable() else f"unknown: {UNREADABLE}",
            "queue-rules": self._ruleset.description,
            "fast-path": self._fast_path_in_words(),
            "state-file": self._state_in_words,
            "traffic-log": self._log.in_words(),
            "metrics": self._metrics_in_words,
            "flow-export": self._exporter.describe(),
            "without-fwd": "packets pass (fail-open)" if plane.fail == "open" else "packets are dropped (fail-closed)",
            "strongswan": "connected" if directory.is_fresh else f"away: {directory.lost_reason}",
            "tunnels": len(directory),
            "sessions": f"{len(self._firewall.table)} of {self._firewall.table.capacity}",
        }

    def _host_figures(self) -> HostFigures:
        stats = kernel_queue_stats(self._queue.number)
        waiting = stats.waiting if stats else 0 if is_readable() else None
        plane = self._config.dataplane
        return HostFigures(waiting, plane.queue_length, len(self._sa_events), self._queue.decisions, self._lags)


def _source(path: Path | None) -> str:
    """Where the configuration comes from, in words."""
    return str(path or (DEFAULT_PATH if os.access(DEFAULT_PATH, os.F_OK) else "built-in default"))


def _access(config: Config) -> Access:
    access = Access(config.control.read_groups, config.control.change_groups)
    if missing := access.missing_groups():
        log.warning("[control] names groups that do not exist here: %s", ", ".join(missing))
    return access


def _export_options(config: Config) -> ipfix.Options | None:
    """Where flow records go; None: nowhere."""
    endpoint = config.ipfix.endpoint
    if endpoint is None:
        return None
    return ipfix.Options(Endpoint(*endpoint), config.ipfix.template_refresh, config.ipfix.observation_domain)


def _duration(seconds: float) -> str:
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{days} days, {hour}:{minute:02}:{second:02}"


def _log_event(event: Event) -> None:
    if isinstance(event, ABOUT_NO_SESSION):
        return  # the one is logged where it comes from, the other is a number among many
    if isinstance(event, TunnelTrouble):
        _log_trouble(event)
        return
    session = event.session
    # Tunnels of this host are worth a line each; sessions in transit come and go by the thousand.
    sa = session.sa
    level = logging.INFO if sa else logging.DEBUG
    if not log.isEnabledFor(level):
        return
    what = type(event).__name__.removeprefix("Session").lower()
    tunnel = f" ({sa.ike_name}/{sa.child_name})" if sa else ""
    more = ""
    if isinstance(event, SessionCreated | SessionRekeyed) and sa:
        more = f": SPI in {sa.spi_in}, out {sa.spi_out}"
    elif isinstance(event, SessionEnded):
        more = f": {session.end_reason}, {session.packet_count} packets, {session.byte_count} bytes"
    log.log(level, "session %d%s %s%s", session.id, tunnel, what, more)


def _log_trouble(event: TunnelTrouble) -> None:
    session, sa = event.session, event.session.sa
    name = f"{sa.ike_name}/{sa.child_name}" if sa else "?"
    if event.is_over:
        log.info("tunnel %s (session %d): no more %s", name, session.id, event.finding.trouble)
    else:
        log.warning("tunnel %s (session %d): %s", name, session.id, event.finding.text)


class _JournalFormatter(logging.Formatter):
    """sd-daemon(3): a line's priority stands in front of it."""

    _PRIORITIES = ((logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6), (logging.DEBUG, 7))

    def format(self, record: logging.LogRecord) -> str:
        priority = next((number for level, number in self._PRIORITIES if record.levelno >= level), 7)
        return "\n".join(f"<{priority}>{line}" for line in super().format(record).splitlines())


def _set_up_logging(level: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    stderr = os.fstat(sys.stderr.fileno())
    if os.environ.get("JOURNAL_STREAM") == f"{stderr.st_dev}:{stderr.st_ino}":
        handler.setFormatter(_JournalFormatter("%(message)s"))
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler])


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path, dir_okay=False),
    help=f"TOML file to read; without it {DEFAULT_PATH} if it exists, else the built-in default: every interface"
    " in zone 'any', one rule 'any-any' that allows.",
)
@click.option("--check", is_flag=True, help="Only check the configuration: exit status 0, or 1 and why.")
@click.option(
    "--print-default-config",
    is_flag=True,
    help="Only print a configuration: every key, explained, with its default.",
)
@click.option("--remove-rules", is_flag=True, help="Only take out the netfilter rules that a killed fwd left behind.")
@click.version_option(__version__, prog_name="fwd")
def main(config_path: Path | None, check: bool, print_default_config: bool, remove_rules: bool) -> None:
    """The IPsec firewall daemon: decides on ESP, IKE and NAT-T packets and keeps their session table.

    It needs CAP_NET_ADMIN. It puts its own netfilter rules in place when it starts and takes them out when it is
    stopped (SIGTERM); those of a killed fwd stay, so that fail-closed means closed. SIGUSR1 stops it for a successor:
    rules stay, and what was decided goes on in the kernel (exit status 10). However it ends, the next fwd goes on with
    its sessions and counts, which are in the state file. SIGHUP (or fwctl reload) reads the configuration again, whole
    or not at all. Ask it with fwctl.

    \b
      fwd --print-default-config       what may be configured, to begin with
      fwd --check --config my.toml     is this file right?
      fwd --config my.toml             run in the foreground, log to stderr
      fwctl show session all           then, from another terminal
    """
    try:
        if print_default_config:
            click.echo(default_config(), nl=False)
            return
        if remove_rules:
            Ruleset.remove()
            return
        config = load(config_path)
        if check:
            rules = len(config.rules)
            click.echo(f"{_source(config_path)}: right, {rules} rule{'' if rules == 1 else 's'}")
            return
        _set_up_logging(config.log.level)
        sys.exit(asyncio.run(_run(config, config_path)))
    except ConfigError as error:
        raise click.ClickException(f"{error}\n(fwd --print-default-config explains every key)") from None
    except (InterfaceError, ListenError, QueueError, RulesetError, StateError) as error:
        raise click.ClickException(str(error)) from None


async def _run(config: Config, config_path: Path | None) -> int:
    return await Daemon(config, config_path).run()
