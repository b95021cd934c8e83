"""Reaching a node by ssh, as the user's own ssh would: configuration, keys, agent, known hosts.

The keys of hosts are always checked. What OpenSSH can do and paramiko cannot (host-based login,
certificates of hosts) is told in the user guide.
"""

from __future__ import annotations

import contextlib
import getpass
import glob
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stager.errors import NODE, SITE, BusyError, DeniedError, StagerError, UsageError
from stager.push import knownhosts
from stager.push.nodes import missing
from stager.push.protocol import Reader, Settings

_SYSTEM_CONFIG = "/etc/ssh/ssh_config"
_KNOWN_HOSTS = "~/.ssh/known_hosts ~/.ssh/known_hosts2"
_SYSTEM_KNOWN_HOSTS = "/etc/ssh/ssh_known_hosts /etc/ssh/ssh_known_hosts2"
_MAX_INCLUDES = 16  # as in ssh(1)
_MAX_HOPS = 8
_LARGEST = 1 << 20  # characters of a file
_MAX_SAID = 1 << 16
_FAREWELL = 5.0  # seconds from the end of a command's output to its exit status


def _paramiko() -> Any:
    try:
        import paramiko
    except ImportError as error:
        raise missing(error) from error
    # What it logs, tracebacks too, comes back to us as an exception.
    logging.getLogger("paramiko").setLevel(logging.CRITICAL + 1)
    return paramiko


class Network:
    """Connections to nodes, all of which can be closed at once.

    Args:
        settings: ``ssh_config``, the time limits and ``forward_agent`` are used.

    Raises:
        IncompatibleError: paramiko is not installed.
        UsageError: the configuration of the ssh client is malformed.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._paramiko = _paramiko()
        self._config = self._read_config(settings.ssh_config)
        self._lock = threading.Lock()
        self._known: dict[str, tuple[list[tuple[str, Any]], set[bytes]]] = {}
        self._open: set[Connection] = set()
        self._watched = False
        self.closed = False

    def _read_config(self, path: str) -> Any:
        text = ""
        for one in [path] if path else ["~/.ssh/config", _SYSTEM_CONFIG]:
            name = os.path.expanduser(one)
            if path and not os.path.exists(name):
                raise UsageError(f"there is no file {name}")
            # Where each begins, what comes before must not be part of its last `Host` block.
            text += "Host *\n" + with_includes(name)
        try:
            return self._paramiko.SSHConfig.from_text(text)
        except Exception as error:
            raise UsageError(
                f"cannot read the configuration of ssh: {error}",
                hint="name another file with --ssh-config",
            ) from error

    def connect(self, node: str) -> Connection:
        """Log in to a node.

        Raises:
            BusyError: it does not answer in time.
            DeniedError: its key is not the known one, or it does not let us in.
            StagerError: it cannot be reached.
        """
        made = self._connect(node, None, 0)
        with self._lock:
            if self.closed:
                made.close()
                raise StagerError("interrupted")
            if not self._watched:
                self._watched = True
                threading.Thread(target=self._watch, daemon=True).start()
            self._open.add(made)
        return made

    def _watch(self) -> None:
        """Close connections that take nothing any more.

        paramiko has a limit for a window that stays closed, and none for a socket that takes no
        bytes: a node that lost its network would be waited for until TCP gives up.
        """
        limit = self._settings.idle_timeout
        while not self.closed:
            time.sleep(min(1.0, limit / 4))
            with self._lock:
                stuck = [one for one in self._open if one.is_stuck(limit)]
            for one in stuck:
                one.give_up()

    def forget(self, connection: Connection) -> None:
        """Close one connection."""
        with self._lock:
            self._open.discard(connection)
        connection.close()

    def close(self) -> None:
        """Close all of them, also under those who are using them."""
        with self._lock:
            self.closed = True
            those = [*self._open]
        for one in those:
            one.close()

    # -- one connection ----------------------------------------------------------------------

    def _connect(self, node: str, via: list[str] | None, depth: int) -> Connection:
        user, host, port = _destination(node)
        with self._lock:  # it may run programs (`Match exec`), and keeps what they said
            wanted = dict(self._config.lookup(host))
        user = user or str(wanted.get("user") or getpass.getuser())
        port = port or int(wanted.get("port", 22))
        hops = [] if depth >= _MAX_HOPS else via
        if hops is None:
            jump = str(wanted.get("proxyjump") or "none")
            hops = [] if jump.lower() == "none" else [one.strip() for one in jump.split(",")]
        before = None
        if hops:
            before = self._connect(hops[-1], hops[:-1] or None, depth + 1)
        client = self._paramiko.SSHClient()
        try:
            channel = self._socket(wanted, port, before)
            try:
                self._log_in(client, channel, wanted, user, port)
            except BaseException:
                with contextlib.suppress(Exception):
                    channel.close()
                raise
        except BaseException:
            client.close()
            if before is not None:
                before.close()
            raise
        return Connection(self._paramiko, client, before, self._settings)

    def _socket(self, wanted: Mapping[str, Any], port: int, before: Connection | None) -> Any:
        """What the ssh protocol is spoken through."""
        host, limit = str(wanted["hostname"]), self._settings.connect_timeout
        command = wanted.get("proxycommand")
        try:
            if before is not None:
                return before.tunnel(host, port)
            if command:
                return self._paramiko.ProxyCommand(str(command))
            return socket.create_connection((host, port), timeout=limit)
        except self._paramiko.SSHException as error:
            raise StagerError(
                f"cannot be reached through the ProxyJump host: {error}", blame=NODE
            ) from error
        except socket.timeout as error:
            raise BusyError(
                f"no answer on port {port} within {limit:g} s",
                hint="the node may be down; --connect-timeout raises the limit",
                blame=NODE,
            ) from error
        except (socket.gaierror, UnicodeError) as error:  # that of a name that cannot be one
            raise StagerError(
                "its name is not known", hint="check the name, or HostName in ~/.ssh/config"
            ) from error
        except OSError as error:
            raise StagerError(
                f"cannot connect to port {port}: {error.strerror or error}",
                hint="the node may be down, or have no ssh server",
                blame=NODE,
            ) from error

    def _log_in(
        self, client: Any, channel: Any, wanted: Mapping[str, Any], user: str, port: int
    ) -> None:
        paramiko = self._paramiko
        host, revoked = self._expect(client, wanted, port)
        files = [os.path.expanduser(one) for one in wanted.get("identityfile", ())]
        limit = self._settings.connect_timeout
        try:
            client.connect(
                host,
                22,  # it is part of the name where it counts
                user,
                sock=channel,
                key_filename=[one for one in files if os.path.isfile(one)],
                allow_agent=str(wanted.get("identitiesonly", "no")).lower() != "yes",
                look_for_keys=not files,
                timeout=limit,
                banner_timeout=limit,
                auth_timeout=limit,
                transport_factory=self._transport,
            )
        except paramiko.BadHostKeyException as error:
            if error.key.asbytes() in revoked:
                raise _is_revoked() from error
            raise DeniedError(
                "its host key is not the one in known_hosts",
                hint="the node was reinstalled, or somebody intercepts the connection; if"
                " you know that it was reinstalled: ssh-keygen -R NODE, then ssh NODE"
                " once",
                blame=SITE,
            ) from error
        except (paramiko.AuthenticationException, paramiko.PasswordRequiredException) as error:
            raise _refused(user, str(error)) from error
        except paramiko.SSHException as error:
            text = str(error)
            if "not found in known_hosts" in text:
                raise DeniedError(
                    "its host key is not known",
                    hint="ssh NODE once, or put it into known_hosts with ssh-keyscan(1)",
                    blame=SITE,
                ) from error
            if not keys_were_exchanged(client):
                raise BusyError(
                    f"no ssh server answered on port {port}: {text or 'timed out'}", blame=NODE
                ) from error
            raise _refused(user, text) from error
        except (OSError, EOFError) as error:
            raise BusyError(
                f"the connection broke while logging in: {error}", blame=NODE
            ) from error

    def _expect(self, client: Any, wanted: Mapping[str, Any], port: int) -> tuple[str, set[bytes]]:
        """Tell a client which keys to expect; its host's name among them, and the revoked ones."""
        host = str(wanted.get("hostkeyalias") or wanted["hostname"])
        if port != 22 and "hostkeyalias" not in wanted:
            host = f"[{host}]:{port}"
        known, revoked = self._known_keys(wanted, host)
        keys = client.get_host_keys()
        for kind, key in known.items():
            keys.add(host, kind, key)
        lenient = str(wanted.get("stricthostkeychecking", "yes")) in ("no", "off", "accept-new")
        otherwise = self._paramiko.AutoAddPolicy if lenient else self._paramiko.RejectPolicy
        client.set_missing_host_key_policy(_NotRevoked(revoked, otherwise()))
        return host, revoked

    def _known_keys(
        self, wanted: Mapping[str, Any], host: str
    ) -> tuple[dict[str, Any], set[bytes]]:
        """The known keys of a host by their kind, and those that no host may have any more."""
        names = str(wanted.get("userknownhostsfile", _KNOWN_HOSTS)).split()
        names += str(wanted.get("globalknownhostsfile", _SYSTEM_KNOWN_HOSTS)).split()
        files = []
        with self._lock:
            for name in map(os.path.expanduser, names):
                if name not in self._known:
                    self._known[name] = knownhosts.read(self._paramiko, name)
                files.append(self._known[name])
        revoked = {key for _, some in files for key in some}
        hashed = self._paramiko.HostKeys.hash_host
        found: dict[str, Any] = {}
        for keys, _ in files:
            for name, key in keys:
                known = name == host or (name.startswith("|1|") and hashed(host, name) == name)
                if known and key.asbytes() not in revoked:
                    found.setdefault(key.get_name(), key)
        return found, revoked

    def _transport(self, sock: Any, **options: Any) -> Any:
        transport = self._paramiko.Transport(sock, **options)
        offered = transport.get_security_options()
        # One pass over the bytes instead of two (cipher, then checksum): measured twice as fast.
        quick = [name for name in offered.ciphers if "gcm" in name]
        offered.ciphers = [*quick, *(name for name in offered.ciphers if name not in quick)]
        return transport


class _NotRevoked:
    """What paramiko asks about a host without a known key: not a revoked one, whatever else.

    Args:
        revoked: the keys.
        otherwise: whom to ask about another key.
    """

    def __init__(self, revoked: set[bytes], otherwise: Any) -> None:
        self._revoked = revoked
        self._otherwise = otherwise

    def missing_host_key(self, client: Any, hostname: str, key: Any) -> None:
        """Refuse a key, by an exception."""
        if key.asbytes() in self._revoked:
            raise _is_revoked()
        self._otherwise.missing_host_key(client, hostname, key)


def _is_revoked() -> DeniedError:
    return DeniedError(
        "its host key is revoked in known_hosts",
        hint="the host needs a new key; ask whoever marked this one as revoked",
        blame=SITE,
    )


def keys_were_exchanged(client: Any) -> bool:
    """Whether a connection came as far as the login."""
    transport = client.get_transport()
    return transport is not None and transport.initial_kex_done


def _refused(user: str, reason: str) -> DeniedError:
    return DeniedError(
        f"the login as {user} was refused: {reason.rstrip('.')}",
        hint="does `ssh -o BatchMode=yes NODE true` work? A key with a passphrase has to be in an"
        " agent (ssh-add)",
        blame=SITE,
    )


def _destination(text: str) -> tuple[str, str, int]:
    """``[user@]host[:port]``, as in ProxyJump, with or without ``ssh://``."""
    user, _, rest = text.removeprefix("ssh://").rpartition("@")
    match = re.fullmatch(r"\[?([^\[\]]+?)\]?(?::(\d+))?", rest)
    if match is None:
        return user, rest, 0
    return user, match[1], int(match[2] or 0)


def with_includes(path: str, depth: int = 0) -> str:
    """A configuration file of ssh(1), with what it includes in its place; empty without one.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            content = file.read(_LARGEST)  # a device may have no end
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", blame=SITE) from error
    if "\0" in content:
        raise UsageError(f"{path} is no configuration of ssh: it is not text")
    here = "/etc/ssh" if path.startswith("/etc/ssh") else os.path.expanduser("~/.ssh")
    text = ""
    for line in content.splitlines():
        match = re.match(r"\s*include[\s=]+(.*)", line, re.IGNORECASE)
        if match is None or depth >= _MAX_INCLUDES:
            text += f"{line}\n"
            continue
        for pattern in match[1].split():
            absolute = os.path.join(here, os.path.expanduser(pattern.strip('"')))
            for name in sorted(glob.glob(absolute)):
                text += with_includes(name, depth + 1)
    return text


@dataclass(eq=False)
class Connection:
    """A login on a node."""

    _paramiko: Any
    _client: Any
    _before: Connection | None
    _settings: Settings
    _session: Session | None = None

    def tunnel(self, host: str, port: int) -> Any:
        """A channel from there to another host."""
        limit = self._settings.connect_timeout
        transport = self._client.get_transport()
        return transport.open_channel("direct-tcpip", (host, port), ("", 0), timeout=limit)

    def start(self, command: str) -> Session:
        """Start a command in the user's shell there.

        Raises:
            StagerError: the node does not start it.
        """
        try:
            channel = self._client.get_transport().open_session(
                timeout=self._settings.connect_timeout
            )
            if self._settings.forward_agent:
                self._paramiko.agent.AgentRequestHandler(channel)
            channel.settimeout(self._settings.idle_timeout)
            channel.exec_command(command)
        except (self._paramiko.SSHException, OSError, EOFError) as error:
            raise StagerError(
                f"no command can be started there: {error or 'the connection broke'}", blame=NODE
            ) from error
        self._session = Session(channel, self._settings.idle_timeout)
        return self._session

    def is_stuck(self, limit: float) -> bool:
        """Whether what we send has not been taken for so many seconds."""
        since = self._session.sending_since if self._session is not None else None
        return since is not None and time.monotonic() - since > limit

    def give_up(self) -> None:
        """End it because it is stuck: whoever waits for it is told so, not that it broke."""
        if self._session is not None:
            self._session.given_up = True
        self.close()

    def close(self) -> None:
        """End it, and what was started there."""
        with contextlib.suppress(Exception):
            self._client.close()
        if self._before is not None:
            self._before.close()


class Session:
    """A command that runs on a node.

    Args:
        channel: its channel.
        idle: seconds for which it may be silent.
    """

    def __init__(self, channel: Any, idle: float) -> None:
        self._channel = channel
        self._idle = idle
        self.sending_since: float | None = None
        self.given_up = False
        self.reader = Reader(self._receive)

    def send(self, data: bytes | memoryview) -> None:
        """Send bytes to it.

        Raises:
            BusyError: it takes none.
            BrokenPipeError: it has ended, or the connection broke.
        """
        self.sending_since = time.monotonic()
        try:
            self._channel.sendall(data)
        except socket.timeout as error:
            raise self._silent() from error
        except (OSError, EOFError) as error:
            if self.given_up:
                raise self._silent() from error
            raise BrokenPipeError from error
        finally:
            self.sending_since = None

    def _receive(self, count: int) -> bytes:
        try:
            data = bytes(self._channel.recv(count))
        except socket.timeout as error:
            raise self._silent() from error
        if not data and self.given_up:
            raise self._silent()
        return data

    def _silent(self) -> BusyError:
        return BusyError(
            f"the node sent nothing for {self._idle:g} s",
            hint="--idle-timeout raises the limit; what has arrived there is kept",
            blame=NODE,
        )

    def finish(self) -> None:
        """Tell it that nothing more comes."""
        with contextlib.suppress(OSError, EOFError):
            self._channel.shutdown_write()

    def status(self) -> tuple[int, str]:
        """Of one that has said its last: its exit status, -1 for none, and its standard error."""
        self._channel.settimeout(_FAREWELL)
        said = b""
        with contextlib.suppress(socket.timeout, OSError):
            while len(said) < _MAX_SAID:
                more = self._channel.recv_stderr(1 << 16)
                if not more:
                    break
                said += more
        known = self._channel.status_event.wait(_FAREWELL)
        status = self._channel.recv_exit_status() if known else -1
        return status, said.decode(errors="replace")
