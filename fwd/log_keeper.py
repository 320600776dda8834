"""The traffic log and what sends it on, as the configuration has them: the wiring of their threads with the core."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable
from pathlib import Path

from .api import no_log
from .config import Config
from .core.firewall import Firewall
from .edge.endpoint import Endpoint
from .edge.log_export import Journal, LogExport, Receiver, SyslogServer
from .edge.traffic_log import LogError, LogReader, TrafficLog
from .log_entry import Entry
from .log_filter import LogQuestion
from .rpc import NO_TRAFFIC_LOG, RpcError

log = logging.getLogger(__name__)

#: How long a stop waits for the disk, and for the syslog server, to take what there is, in seconds.
STOP_S = 2.0
#: How much longer it waits for each session that lives, which all are kept then.
LEFT_S = 60e-6

_DAY_S = 86400.0


class LogKeeper:
    """Writes what the core has to log. `in_loop` makes of a function one that other threads may call.

    `written(number)` is called in the loop when all records up to one are written for good.
    """

    def __init__(
        self,
        config: Config,
        firewall: Firewall,
        in_loop: Callable[[Callable[..., None]], Callable[..., None]],
        written: Callable[[int], None],
    ) -> None:
        self._config = config
        self._firewall = firewall
        self._in_loop = in_loop
        self._log: TrafficLog | None = None
        self._exports: list[LogExport] = []
        self._reader = LogReader(Path(config.traffic_log.file))
        if not config.traffic_log.file:
            return
        path, receivers = Path(config.traffic_log.file), self._receivers()
        count = in_loop(firewall.counters.add)

        def rotated(gone: int, unsent: int) -> None:
            count("log_rotated", gone)
            count("log_not_sent", unsent)

        self._log = TrafficLog(
            path,
            config.traffic_log.max_size << 20,
            config.traffic_log.max_age * _DAY_S,
            [*receivers],
            in_loop(written),
            lambda: count("log_write_failed"),
            rotated,
        )
        for name, receiver in receivers.items():
            self._exports.append(
                LogExport(
                    name,
                    self._log,
                    path,
                    receiver,
                    lambda number: count("log_sent", number),
                    lambda: count("log_send_failed"),
                )
            )

    def _receivers(self) -> dict[str, Receiver]:
        receivers: dict[str, Receiver] = {}
        syslog = self._config.syslog
        if syslog.endpoint is not None:
            receivers["syslog"] = SyslogServer(
                Endpoint(*syslog.endpoint),
                socket.gethostname(),
                syslog.facility,
                is_ietf=syslog.format == "ietf",
                tls=syslog.tls_context,
                tls_name=syslog.tls_name,
            )
        if self._config.traffic_log.journal:
            receivers["journal"] = Journal()
        return receivers

    def start(self) -> None:
        """Begin to write and to send; from now on the core makes records."""
        if self._log is not None:
            self._firewall.keeps_log = True
            self._log.start()
            for export in self._exports:
                export.start()

    def hand_out(self) -> None:
        """Let be written what the core has saved."""
        while self._log is not None and (records := self._firewall.take_log()):
            self._log.write(records, time.time() - time.monotonic())

    def page(self, question: LogQuestion) -> tuple[list[Entry], int | None]:
        """Entries of the log, and what to go on after. Raises RpcError."""
        if self._log is None:
            return no_log(question)
        try:
            return self._reader.page(question)
        except LogError as error:
            raise RpcError(NO_TRAFFIC_LOG, str(error)) from None

    def judge_left(self, *, are_alive: bool) -> None:
        """Sessions that a former fwd left when it was stopped go on with this one, or have ended then."""
        if self._log is not None:
            self._log.judge_left(are_alive=are_alive)

    def leave(self, *, may_be_last: bool) -> None:
        """Let the last records be written, if the disk takes them; a successor finds the others in the state file.

        `may_be_last`: perhaps nobody goes on with the sessions that live, because the machine goes down.
        """
        if self._log is None:
            return
        self.hand_out()
        left = self._firewall.left_to_log(time.monotonic()) if may_be_last else []
        self._log.leave(left, time.time() - time.monotonic())
        if not self._log.stop(STOP_S + LEFT_S * len(left)):
            log.warning("the traffic log does not take all at once: the rest is in the state file until a reboot")
        self._firewall.note_logged(self._log.written_number)
        for export in self._exports:
            export.stop(STOP_S)
        self._reader.close()

    def in_words(self) -> str:
        """Where the log is, and how it and what sends it on are."""
        if self._log is None:
            return "none by configuration"
        words = f"{self._config.traffic_log.file}, {self._firewall.traffic_log.waiting} records wait"
        if self._log.trouble:
            words += f", cannot be written: {self._log.trouble}"
        for export in self._exports:
            words += f"; {export.name} " + (f"cannot be reached: {export.trouble}" if export.trouble else "gets it")
        return words
