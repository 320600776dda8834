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
from collections.abc import Iterable, Mapping
from pathlib import Path

import click

from . import __version__
from .api import Api
from .config import DEFAULT_PATH, Config, ConfigError, load
from .core.events import (
    CounterRose,
    Event,
    SessionCreated,
    SessionEnded,
    SessionRekeyed,
    TunnelsStale,
    TunnelTrouble,
)
from .core.firewall import Firewall
from .core.interfaces import InterfaceEvent
from .core.sa import SaEvent, SaSnapshot, SaSourceLost
from .core.session import Session
from .edge import systemd
from .edge.control import Access, ControlError, ControlServer
from .edge.interfaces import InterfaceError, InterfaceWatcher
from .edge.kernel_path import KernelPath
from .edge.nfqueue import PacketQueue, QueueError
from .edge.queue_stats import UNREADABLE, is_readable, kernel_queue_stats
from .edge.ruleset import Backend, Ruleset, RulesetError
from .edge.vici import ViciListener

log = logging.getLogger("fwd")

#: Packets handled before the loop serves everything else: some 2 ms' worth, 10 if each is the first of a session.
PACKETS_PER_TURN = 256

#: Garbage is looked for after so many new objects, some 8,000 sessions' worth: that takes about 5 ms.
GARBAGE_THRESHOLDS = (50_000, 50, 100)

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
        self._firewall = Firewall(config.settings(), time.monotonic())
        plane = config.dataplane
        self._queue = PacketQueue(
            plane.queue,
            plane.queue_length,
            self._firewall.receive_packet,
            self._firewall.drop_unhandled,
            self._firewall.fast_path.pending,
            self._serve_kernel,
        )
        wanted = None if plane.backend == "auto" else Backend(plane.backend)
        self._ruleset = Ruleset(plane.queue, plane.fail == "open", self._firewall.fast_path.capacity, wanted)
        self._kernel: KernelPath | None = None
        self._interfaces = InterfaceWatcher(self._interface_event)
        self._vici = ViciListener(config.vici.socket, self._sa_event_from_thread)
        self._api = Api(
            self._firewall, time.monotonic, config.vici.socket, self._host, self._take_edge_counts, self._refresh
        )
        self._control = ControlServer(
            Path(config.control.socket), self._control_request, self._api.rights, _access(config)
        )
        self._timer: asyncio.TimerHandle | None = None
        self._no_timer_before = 0.0
        self._stop = asyncio.Event()
        self._is_ready = False
        self._is_reload_due = False
        self._is_handing_over = False
        self._is_blind = False
        self._loop = asyncio.get_running_loop()

    async def run(self) -> int:
        """Work until a signal ends it; gives the exit status.

        Raises QueueError, RulesetError, InterfaceError or ControlError.
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
                return 0
            stack.callback(self._leave)
            log.info("rules installed: %s", self._ruleset.install())
            self._start_fast_path()
            self._loop.add_reader(fd, self._packets)
            stack.callback(self._loop.remove_reader, fd)
            stack.callback(self._vici.stop)
            self._vici.start()
            stack.callback(asyncio.create_task(self._guard_rules()).cancel)
            self._run_timer()
            await self._control.start()  # late: who gets an answer may count on all the rest
            if (interval := systemd.watchdog_interval_s()) is not None:
                stack.callback(asyncio.create_task(self._feed_watchdog(interval)).cancel)
            # Sessions come and live by the thousand: to look for garbage every 700 objects costs a third of the time.
            gc.freeze()
            gc.set_threshold(*GARBAGE_THRESHOLDS)
            log.info("fwd %s is ready: queue %d, %s", __version__, self._config.dataplane.queue, self._summary())
            systemd.notify("READY=1", f"STATUS={self._summary()}")
            self._is_ready = True
            if self._is_reload_due:
                self._reload()
            await self._stop.wait()
            systemd.notify("STOPPING=1")
            log.info("handing over" if self._is_handing_over else "stopping")
        return HANDED_OVER if self._is_handing_over else 0

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

    def _start_fast_path(self) -> None:
        """Go on where a former daemon stopped, if its decisions are still in the kernel."""
        if self._ruleset.backend is None or not self._ruleset.backend.has_maps:
            return
        self._kernel = KernelPath(self._ruleset.backend)
        found = self._kernel.find_all() if self._ruleset.kept_maps else []
        self._kernel.remove(self._firewall.adopt(found, time.monotonic()))
        if found:
            sessions = len(self._firewall.table)
            log.info("took over %d sessions, %d SPIs, from a former fwd", sessions, len(found))
        self._firewall.use_fast_path(self._config.dataplane.fast_path == "auto")
        self._serve_kernel()

    def _serve_kernel(self) -> None:
        """Let the kernel do what the core wants of it."""
        while self._kernel is not None and (work := self._firewall.take_work()) is not None:
            self._firewall.apply_outcome(work, self._kernel.carry_out(work), time.monotonic())

    def _packets(self) -> None:
        self._queue.turn(PACKETS_PER_TURN)
        self._after_turn()

    def _sa_event_from_thread(self, event: SaEvent) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed already
            self._loop.call_soon_threadsafe(self._sa_event, event)

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

    def _run_timer(self) -> None:
        self._timer = None
        try:
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
        finally:
            deadline = max(self._firewall.next_deadline(), self._no_timer_before)
            if self._timer is None or deadline < self._timer.when():
                if self._timer is not None:
                    self._timer.cancel()
                self._timer = self._loop.call_at(deadline, self._run_timer)

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
        except (ConfigError, RulesetError) as error:
            for line in str(error).splitlines():
                log.error("not reloaded: %s", line)
        finally:  # whatever else went wrong: systemd waits for this
            systemd.notify("READY=1", f"STATUS={self._summary()}")

    def _take_configuration(self, config: Config) -> None:
        """Go on with another configuration. Raises ConfigError or RulesetError, and then nothing has changed."""
        before, after = self._config.restart_keys(), config.restart_keys()
        fixed = [key for key, value in before.items() if after[key] != value]
        if fixed:
            raise ConfigError(f"{', '.join(fixed)}: only a restart changes this; nothing was changed")
        if config.dataplane.fail != self._config.dataplane.fail:
            log.info("rules installed: %s", self._ruleset.change(config.dataplane.fail == "open"))
        self._config = config
        self._firewall.reconfigure(config.settings())
        if self._kernel is not None:
            self._firewall.use_fast_path(config.dataplane.fast_path == "auto")
        self._control.access = _access(config)
        logging.getLogger().setLevel(config.log.level.upper())
        log.info("reloaded: %d rules", len(config.rules))

    def _hand_over_and_stop(self) -> None:
        self._is_handing_over = True
        self._stop.set()

    def _leave(self) -> None:
        """Take the rules out, or leave all in order for a successor; and hand back what waits in the queue."""
        if not self._is_handing_over:
            self._firewall.fast_path.is_on = False
            Ruleset.remove()
            self._close_kernel()
        deadline = time.monotonic() + DRAIN_S
        is_done = False
        while not is_done and time.monotonic() < deadline:
            is_done = not self._queue.turn(PACKETS_PER_TURN)
            self._serve_kernel()
            if self._is_handing_over and (carriers := self._firewall.hand_over()):
                is_done = False
                self._serve_kernel()
                self._firewall.finish_hand_over(carriers, time.monotonic())
                self._serve_kernel()
        self._close_kernel()

    def _close_kernel(self) -> None:
        if self._kernel is not None:
            self._kernel.close()
            self._kernel = None

    def _refresh(self, sessions: Iterable[Session]) -> None:
        """Bring what the kernel counted for these sessions."""
        self._firewall.fast_path.read_sessions(sessions)
        self._serve_kernel()

    def _take_edge_counts(self) -> None:
        """Bring what the edges and the kernel count to the global counters."""
        self._firewall.fast_path.read_oldest()
        self._serve_kernel()
        self._count_edges()

    def _count_edges(self) -> None:
        """What is counted outside of the core: requests, and packets that never came."""
        values = self._firewall.counters.values
        values["control_request"], values["control_refused"] = self._control.requests, self._control.refused
        stats = kernel_queue_stats(self._queue.number)
        if stats is None and not self._is_blind and not is_readable():
            self._is_blind = True
            log.warning("what the kernel drops before fwd cannot be counted: %s", UNREADABLE)
        if stats is not None:
            values["queue_kernel_drop"], values["queue_socket_drop"] = stats.queue_dropped, stats.socket_dropped

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
            "without-fwd": "packets pass (fail-open)" if plane.fail == "open" else "packets are dropped (fail-closed)",
            "strongswan": "connected" if directory.is_fresh else f"away: {directory.lost_reason}",
            "tunnels": sum(1 for _ in directory),
            "sessions": f"{len(self._firewall.table)} of {self._firewall.table.capacity}",
        }


def _source(path: Path | None) -> str:
    """Where the configuration comes from, in words."""
    return str(path or (DEFAULT_PATH if os.access(DEFAULT_PATH, os.F_OK) else "built-in default"))


def _access(config: Config) -> Access:
    access = Access(config.control.read_groups, config.control.change_groups)
    if missing := access.missing_groups():
        log.warning("[control] names groups that do not exist here: %s", ", ".join(missing))
    return access


def _duration(seconds: float) -> str:
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{days} days, {hour}:{minute:02}:{second:02}"


#: The one is logged where it comes from, the other is a number among many.
_LOGGED_ELSEWHERE = (TunnelsStale, CounterRose)


def _log_event(event: Event) -> None:
    if isinstance(event, _LOGGED_ELSEWHERE):
        return
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
@click.option("--remove-rules", is_flag=True, help="Only take out the netfilter rules that a killed fwd left behind.")
@click.version_option(__version__, prog_name="fwd")
def main(config_path: Path | None, check: bool, remove_rules: bool) -> None:
    """The IPsec firewall daemon: decides on ESP, IKE and NAT-T packets and keeps their session table.

    It needs CAP_NET_ADMIN. It puts its own netfilter rules in place when it starts and takes them out when it is
    stopped (SIGTERM); those of a killed fwd stay, so that fail-closed means closed. SIGUSR1 stops it for a successor:
    rules stay, what was decided goes on in the kernel, and the next fwd takes over sessions and counts (exit status
    10). SIGHUP reads the configuration again, whole or not at all. Ask it with fwctl.

    \b
      fwd --check --config my.toml     is this file right?
      fwd --config my.toml             run in the foreground, log to stderr
      fwctl show session all           then, from another terminal
    """
    try:
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
    except (ConfigError, ControlError, InterfaceError, QueueError, RulesetError) as error:
        raise click.ClickException(str(error)) from None


async def _run(config: Config, config_path: Path | None) -> int:
    return await Daemon(config, config_path).run()
