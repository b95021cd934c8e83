"""What a Prolog's worker does as the job's user: find, pack where need be, stage, describe.

It runs in a process of its own that became the user before anything else, and tells the worker,
which is root and believes nothing, what came out: one JSON object for each message.

::

    {"timeout": seconds}                                as soon as the directive is read
    {"original": activation}                            how the job runs where staging fails
    {"trees": [[[staged, original, ready], ...], ...]}  PBS: for each environment its layers;
                                                        answered with a byte when links lead there
    {"beforehand": activation}                          PBS: by these links, before it is staged
    {"shared": {"name", "digest", "pinned", "repository"}}
                                                        stage this into the site's store; answered
                                                        with {"layers": {id: how}} or an error
    {"room": [bytes, inodes]}                           evict others' unclaimed trees until so much
                                                        is free; answered with {"evicted": number}
                                                        or an error
    {"may": "mount"}                                    answered with one byte, ``y`` or ``n``
    {"staged": activation, "how": ..., ...}             the end, or
    {"error": reason, ...}                              the end, see StagerError.as_data, or
    {"nothing": true}                                   the comment has no directive after all
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any, Callable, NamedTuple

from stager import activate, fsutil, privilege, schedulers, together
from stager import config as configuration
from stager.config import Config
from stager.errors import (
    JOB,
    SITE,
    NoSpaceError,
    NotFoundError,
    StagerError,
    UsageError,
    from_data,
    known,
)
from stager.hooks import jobactivation, jobnotes
from stager.jobstate import MAX_MESSAGE, Job
from stager.manifest import Layer
from stager.ref import KEYS, Directive, Ref
from stager.repository import Published
from stager.staging import allocation, fitness, sitestore, store, trees
from stager.staging.stage import HIT, Staged, slowest
from stager.staging.store import MOUNTED, Store

VISIBLE, PROLOG, NEVER = "visible", "prolog", "never"
_OPTIONS = ("strict", "verbose", *KEYS)


class Order(NamedTuple):
    """What the worker wants to be done.

    Attributes:
        job: the job.
        trusted: the site's configuration, for the store and the hooks' own keys.
        mounts: :data:`VISIBLE`, :data:`PROLOG` or :data:`NEVER`: when a mount made now is seen by
            the job.
        holder: who claims what is staged.
        directory: the job's own, where root makes links under PBS.
        broken: why there is no store; then only the original is told.
    """

    job: Job
    trusted: Config
    mounts: str
    holder: str
    directory: str
    broken: StagerError | None = None


def run(order: Order, talk: socket.socket) -> None:
    """Do it all; everything that goes wrong is a message.

    Args:
        order: what is to be done.
        talk: a connection to the worker that keeps messages apart.
    """
    try:
        privilege.become(order.job.uid, order.job.gid)
        _send(talk, _work(order, talk))
    except StagerError as error:
        _send(talk, error.as_data())
    except BaseException as error:
        where = ""
        trace = error.__traceback__
        while trace is not None:
            code = trace.tb_frame.f_code
            where = f" ({os.path.basename(code.co_filename)}:{trace.tb_lineno})"
            trace = trace.tb_next
        told = known(error, "tell your administrator")
        _send(talk, {**told.as_data(), "error": told.message + where})


def _send(talk: socket.socket, message: Mapping[str, Any]) -> None:
    data = json.dumps(message).encode()
    if len(data) > MAX_MESSAGE:
        raise StagerError("the environment's activation is too long for a job")
    with contextlib.suppress(OSError):  # the worker was ended; so will we be
        talk.send(data)


def _work(order: Order, talk: socket.socket) -> dict[str, Any]:
    job, trusted, broken = order.job, order.trusted, order.broken
    directive = job.directive()
    if directive is None:
        return {"nothing": True}
    timeout = _timeout(directive)
    _send(talk, {"timeout": timeout})
    until = time.monotonic() + min(timeout, trusted["hook.deadline"])
    _send_original(talk, directive, job)
    config = configuration.load(overrides=_overrides(directive, trusted))
    config.values["stage.timeout"] = min(config["stage.timeout"], timeout)
    config.values["hook.pack"] = config["hook.pack"] and trusted["hook.pack"]
    node = None
    try:
        if broken is None:
            node = Store(config["store"])
    except StagerError as error:
        broken = error
    if broken is not None:
        config.values["hook.pack"] = False

    def meanwhile(published: Published) -> None:
        if job.scheduler == schedulers.PBS or node is None:
            return  # PBS wants to know the trees first
        if len(directive.refs) == 1:  # should the worker be killed now
            _send(talk, {"original": jobactivation.of_original(published.manifest)})
        if sitestore.of(published, trusted) is None:
            _fetch_ahead(published, node, config)

    try:
        looked = [_published(wish, config, job, until, meanwhile) for wish in directive.refs]
    except StagerError as error:
        if broken is not None and job.first:  # nor does this node pack what others wait for
            jobnotes.leave(jobnotes.path(config, job), broken)
        raise broken or error from error
    found = [published for published, _ in looked]
    together.require([published.manifest for published in found])
    places = [sitestore.of(published, trusted) or node for published in found]
    described = None
    if job.scheduler == schedulers.PBS:
        described = _beforehand(order, directive, found, places, config, talk)
    elif len(found) == 1:
        _send(talk, {"original": jobactivation.of_original(found[0].manifest)})
    if node is None:
        assert broken is not None
        raise broken
    results = []
    for wish, published, place in zip(directive.refs, found, places):
        if place is not node:
            results.append(_shared(wish, published, talk))
            continue
        stage = functools.partial(_staged, published, node, config, talk, order, until)
        results.append(_with_room(stage, talk))
    parts = list(map(activate.Part.staged, results))
    described = described or jobactivation.of_staged(directive, parts, config)
    warnings = (described.warning, *(changed() for _, changed in looked))
    return {
        **_outcome(described.value, directive, found, results),
        "warning": "; ".join(filter(None, warnings)),
    }


def _beforehand(
    order: Order,
    directive: Directive,
    found: list[Published],
    places: Sequence[Store | None],
    config: Config,
    talk: socket.socket,
) -> jobactivation.Described:
    """Tell PBS by which links the job will find what is to be staged."""
    below = [
        os.path.join(config["store"] if place is None else place.root, "envs") for place in places
    ]
    _send_trees(talk, found, below, places)
    parts = [
        jobactivation.linked(published.manifest, order.directory, part)
        for part, published in enumerate(found)
    ]
    described = jobactivation.of_staged(directive, parts, config, bound=tuple(sorted({*below})))
    _send(talk, {"beforehand": described.value})
    return described


def _timeout(directive: Directive) -> float:
    """Check a directive's options; how long it lets staging take."""
    for key in directive.options:
        if key not in _OPTIONS:
            raise UsageError(
                f"`{key}` is not an option of the pyenv directive",
                hint="options are " + ", ".join(_OPTIONS),
            )
    try:
        return configuration.parse_duration(directive.options.get("timeout") or "1d")
    except ValueError as error:
        raise UsageError(f"the directive's timeout: {error}") from error


def _overrides(directive: Directive, trusted: Config) -> dict[str, object]:
    # A store of the user's own choosing would be where the site does not want it.
    overrides: dict[str, object] = {"store": trusted["store"]}
    for option, key in KEYS.items():
        if option != "timeout" and directive.options.get(option):  # its limit is the site's as well
            overrides[key] = directive.options[option]
    return overrides


def _send_original(talk: socket.socket, directive: Directive, job: Job) -> None:
    """Before anything that may hang: a path is its own original."""
    path = directive.refs[0].path
    if not path:
        return
    if job.scheduler == schedulers.PBS:
        _send(talk, {"trees": [[("", path, False)]]})
        talk.recv(1)
        return
    _send(talk, {"original": jobactivation.of_path(path)})


def _published(
    wish: Ref, config: Config, job: Job, until: float, meanwhile: Callable[[Published], None]
) -> tuple[Published, Callable[[], str]]:
    """Find an environment, and see to it that it is up to date, by the policy ``stage.on_stale``.

    Packing is for the first node of the job; the others wait for what it publishes.

    Args:
        wish: which.
        config: the job's.
        job: the job.
        until: when there is no more time.
        meanwhile: called with what was found, while shared storage answers whether it changed.

    Returns:
        The environment, and what tells in words what changed where it is used all the same. (Who
        looks at the original before that has answered may ask some of it twice.)
    """
    from stager import lookup

    pause = 0.25
    while True:
        wish, found = _found(wish, config, job)
        if isinstance(found, Published):
            changed, is_used = _looked_at(found, wish, config, job)
            if not is_used:
                meanwhile(found)
            if is_used or not changed():
                return found, changed
            if config["stage.on_stale"] == "fallback":
                raise StagerError(changed(), hint="pack it again", blame=JOB)
            missing = NotFoundError(changed(), hint="pack it again")
        else:
            missing = found
        if not config["hook.pack"]:
            raise missing
        note = jobnotes.path(config, job)
        if job.first:
            try:
                limit = max(0.0, until - time.monotonic())
                return lookup.fresh(wish, config, timeout=limit)[0], str
            except Exception as error:
                jobnotes.leave(note, error)
                raise
        failed = jobnotes.read(note)
        if failed is not None:
            raise failed
        if time.monotonic() + pause > until:
            raise StagerError(
                f"`{wish}` was not packed in time by the first node of the job",
                hint="pack it before you submit: stager pack",
            )
        time.sleep(pause)
        pause = min(2.0, pause * 1.5)


def _found(wish: Ref, config: Config, job: Job) -> tuple[Ref, Published | NotFoundError]:
    """Find what is published; or else what is to be packed, and what to say where it cannot be.

    Returns:
        The path instead of a name that only a tool knows, and what was found.
    """
    from stager import lookup

    while True:
        try:
            return wish, lookup.find(wish, config)
        except NotFoundError as error:
            path = lookup.located(wish, os.environ, cwd=job.work_dir)
            if path == wish:
                may_be_packed = wish.path and config["stage.on_stale"] == "repack"
                if not (may_be_packed and os.path.isdir(wish.path)):
                    raise
                return wish, error
            wish = path


def _looked_at(
    published: Published, wish: Ref, config: Config, job: Job
) -> tuple[Callable[[], str], bool]:
    """Begin to look whether the original changed, and tell whether the pack is used all the same.

    Where it is used in any case, the job's first node looks, for a warning, and no other does.

    Returns:
        What waits for the answers and tells in words what changed, and whether it is used.
    """
    policy = config["stage.on_stale"]
    own = published.repository.root == config["repository"]
    is_used = policy == "warn" or (policy == "repack" and not own)
    if wish.digest or policy == "ignore" or (is_used and not job.first):
        return str, True
    from stager import freshness, lookup

    answers = lookup.ask_ahead(published)

    @functools.cache
    def changed() -> str:
        changes = freshness.changed(published.manifest, answers())
        return f"`{wish}` changed since it was packed ({changes[0]})" if changes else ""

    return changed, is_used


def _how(
    published: Published,
    node: Store,
    config: Config,
    talk: socket.socket,
    mounts: str,
    until: float,
) -> str:
    """Decide between mounting and extracting, by whether the job would see a mount.

    The job's mount namespace may be made when the Prolog returns. So the slow part, copying, is
    done first; then the Prolog is asked whether it still waits, and if so to stay for a moment.
    """
    wanted: str = config["stage.how"]
    cold = [layer for layer in published.manifest.layers if node.ready(layer.id) is None]
    if not cold or mounts == VISIBLE:
        return wanted
    if mounts == NEVER:
        return "extract"
    for layer in cold:
        _fetch(published, layer, node, config, until)
    _send(talk, {"may": "mount"})
    return wanted if talk.recv(1) == b"y" else "extract"


def _staged(
    published: Published,
    node: Store,
    config: Config,
    talk: socket.socket,
    order: Order,
    until: float,
) -> Staged:
    """Stage an environment into the user's store, not on a mount that ends with another's step."""
    if config["stage.how"] != "extract":
        config.values["stage.how"] = _how(published, node, config, talk, order.mounts, until)
    return allocation.stage_here(published, config, holder=order.holder)


def _with_room(stage: Callable[[], Staged], talk: socket.socket) -> Staged:
    """Stage; where space is short, have root evict what others have left, and try again."""
    while True:
        try:
            return stage()
        except NoSpaceError as error:
            if error.needed is None:
                raise
            _send(talk, {"room": error.needed})
            if not json.loads(talk.recv(MAX_MESSAGE) or b"{}").get("evicted"):
                raise


def _shared(wish: Ref, published: Published, talk: socket.socket) -> Staged:
    """Have root stage an environment into the site's store."""
    wanted = {
        "name": published.manifest.name,
        "digest": published.digest,
        "pinned": not wish.name or bool(wish.digest),
        "repository": published.repository.root,
    }
    _send(talk, {"shared": wanted})
    answer = json.loads(talk.recv(MAX_MESSAGE))
    if "error" in answer:
        raise from_data({**answer, "blame": SITE})
    return sitestore.described(published.manifest, answer["layers"])


def _fetch_ahead(published: Published, node: Store, config: Config) -> None:
    """Fetch the images of what will nearly always be staged; who stages tells what goes wrong."""
    for layer in published.manifest.layers:
        if node.stamp(layer.id) is None:
            with contextlib.suppress(StagerError):
                _fetch(published, layer, node, config, until=time.monotonic())


def _fetch(published: Published, layer: Layer, node: Store, config: Config, until: float) -> None:
    """See to it that an image to mount is in the store, verified, where staging will find it."""
    if layer.image.format != "squashfs" or layer.destination != node.tree(layer.id):
        return
    fitness.require(published.manifest)
    with (
        store.blame_node("copy an image into the store"),
        node.lock(layer.id, timeout=max(0.0, until - time.monotonic())),
    ):
        if node.ready(layer.id) is not None:
            return
        here = trees.is_present(layer, node)
        trees.make_room(layer, MOUNTED, node, config, present=layer.image.size if here else 0)
        workspace = node.workspace(layer.id)
        try:
            if not here:
                trees.fetch(published, layer, node, workspace)
        finally:
            fsutil.remove_tree(workspace)
        # Or staging would read it once more, to be sure.
        node.set_received(layer.id, layer.filename, layer.image.size)


def _send_trees(
    talk: socket.socket,
    found: list[Published],
    below: list[str],
    places: Sequence[Store | None],
) -> None:
    """Have root make links that lead to the originals, and to what is staged already."""
    message = []
    for published, directory, place in zip(found, below, places):
        layers = published.manifest.layers
        originals = activate.Part.original(published.manifest).trees
        message.append(
            [
                (
                    os.path.join(directory, layer.id),
                    original if os.path.isdir(original) else "",
                    place is not None and place.ready(layer.id) is not None,
                )
                for layer, original in zip(layers, originals)
            ]
        )
    _send(talk, {"trees": message})
    talk.recv(1)


def _outcome(
    staged: dict[str, Any], directive: Directive, found: list[Published], results: list[Staged]
) -> dict[str, Any]:
    copied = sum(
        layer.image.size
        for published, result in zip(found, results)
        for layer in published.manifest.layers
        if result.layers[layer.id] != HIT
    )
    return {
        "staged": staged,
        "how": slowest(result.how for result in results),
        "ref": "+".join(published.ref for published in found),
        "bytes": copied,
        "verbose": "verbose" in directive.options,
    }
