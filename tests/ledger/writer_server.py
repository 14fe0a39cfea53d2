"""Forks writers of ledgers, kills them, and reports; one JSON request and one JSON reply a line.

It stands apart from the test process, which may have threads and should not be forked. A forked
writer starts in a millisecond, where a new interpreter would need a hundred.
"""

from __future__ import annotations

import fcntl
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from hf_dp.events import Gaussian, PoissonSampled, to_json
from hf_dp.ledger import Ledger, merge_ledgers

EVENT = PoissonSampled(0.25, Gaussian(1.5))
HEADER = {"plan": {"num_steps": 9}, "step_event": to_json(EVENT)}
system_write = os.write


def fork(work: Callable[[], object]) -> int:
    """Run `work` in a child; anything that it raises ends the child with status 1."""
    child = os.fork()
    if child:
        return child
    try:
        work()
    except BaseException as error:
        sys.stderr.write(f"writer: {error!r}\n")
        os._exit(1)
    os._exit(0)


def ask_child(work: Callable[[], object]) -> Any:
    """What `work` returns, or the name and message of the error that it raises, in a child."""
    reader, writer = os.pipe()

    def reply() -> None:
        try:
            answer = work()
        except Exception as error:
            answer = [type(error).__name__, str(error)]
        system_write(writer, json.dumps(answer).encode())

    child = fork(reply)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        answer = json.loads(pipe.read())
    os.waitpid(child, 0)
    return answer


def append_for_ever(path: str, acknowledge: int, slowly: bool) -> None:
    """Append, acknowledge and copy until killed; `slowly`: few bytes a call, so that lines tear."""

    def in_pieces(descriptor: int, data: Any) -> int:
        if not fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_APPEND:
            return system_write(descriptor, data)
        time.sleep(0.001)
        return system_write(descriptor, data[:10])

    if slowly:
        os.write = in_pieces
    ledger = Ledger.open(path) if os.path.exists(path) else Ledger.create(path, HEADER)
    for step in range(10**9):
        count = ledger.append(EVENT, step=step)
        system_write(acknowledge, b"%d\n" % count)
        if step % 4 == 3:
            ledger.copy_to(Path(path).parent / "checkpoint")


def kill_appending(path: str, after: float, slowly: bool) -> dict[str, Any]:
    """Kill a writer `after` seconds; `acknowledged` is the last count that an append returned."""
    reader, writer = os.pipe()
    child = fork(lambda: append_for_ever(path, writer, slowly))
    os.close(writer)
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    with os.fdopen(reader) as pipe:
        counts = [int(line) for line in pipe if line.endswith("\n")]
    return {"acknowledged": counts[-1] if counts else 0, "signal": os.WTERMSIG(status)}


def die_at(call: int) -> None:
    """Arm the system calls that change files: number `call` of them is never finished."""
    made = 0

    def armed(name: str) -> Callable[..., Any]:
        original = getattr(os, name)

        def wrapped(*arguments: Any, **keywords: Any) -> Any:
            nonlocal made
            made += 1
            if made == call:
                if name == "write":
                    original(arguments[0], arguments[1][: len(arguments[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **keywords)

        return wrapped

    for name in ("open", "write", "fsync", "link", "replace", "rename", "unlink", "mkdir"):
        setattr(os, name, armed(name))


def kill_in(scenario: str, path: str, other: str, call: int) -> dict[str, Any]:
    """Kill a writer in the middle of its system call number `call`; `finished` if it made fewer."""
    reader, writer = os.pipe()

    def acknowledge(count: int) -> None:
        system_write(writer, b"%d\n" % count)

    def work() -> None:
        die_at(call)
        if scenario == "create":
            with Ledger.create(path, HEADER) as ledger:
                acknowledge(ledger.append(EVENT, step=0))
        elif scenario == "continue":
            with Ledger.open(path) as ledger:
                acknowledge(ledger.append(EVENT, step=0))
                ledger.copy_to(other)
                acknowledge(ledger.append(EVENT, step=1))
        else:
            acknowledge(merge_ledgers(path, other).num_releases)

    child = fork(work)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    with os.fdopen(reader) as pipe:
        counts = [int(line) for line in pipe]
    return {"acknowledged": counts[-1] if counts else 0, "finished": status == 0}


holders: list[int] = []


def hold(path: str, with_worker: bool) -> dict[str, int]:
    """Leave a ledger open in a child; `with_worker`: which has a forked child of its own."""
    reader, writer = os.pipe()

    def work() -> None:
        ledger = Ledger.open(path)
        worker = fork(lambda: time.sleep(60)) if with_worker else 0
        system_write(writer, b"%d\n" % worker)
        time.sleep(60)
        ledger.close()

    holders.append(fork(work))
    os.close(writer)
    with os.fdopen(reader) as pipe:
        return {"holder": holders[-1], "worker": int(pipe.readline())}


def kill_holder() -> str:
    holder = holders.pop()
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    return "killed"


def kill_worker(worker: int) -> str:
    os.kill(worker, signal.SIGKILL)
    return "killed"


def open_in_child(path: str) -> Any:
    def work() -> int:
        with Ledger.open(path) as ledger:
            return ledger.num_releases

    return ask_child(work)


def use_inherited(path: str) -> dict[str, Any]:
    """What a forked child meets that uses its parent's open ledger, and that the parent is unharmed."""
    with Ledger.open(path) as ledger:

        def close_and_open() -> int:
            ledger.close()
            return Ledger.open(path).num_releases

        return {
            "append": ask_child(lambda: ledger.append(EVENT, step=0)),
            "copy_to": ask_child(lambda: str(ledger.copy_to(Path(path).parent / "copy"))),
            "close_and_open": ask_child(close_and_open),
            "other_process": open_in_child(path),
            "parent": ledger.append(EVENT, step=0),
        }


def create_at_once(path: str, num_writers: int) -> list[Any]:
    """Outcomes of writers that all create the same ledger as soon as a pipe closes."""
    gate, opener = os.pipe()
    results, sink = os.pipe()

    def work() -> None:
        os.close(opener)
        os.read(gate, 1)
        try:
            with Ledger.create(path, HEADER) as ledger:
                outcome = ledger.run_id
        except Exception as error:
            outcome = type(error).__name__
        system_write(sink, f"{outcome}\n".encode())

    children = [fork(work) for _ in range(num_writers)]
    for descriptor in (opener, gate, sink):
        os.close(descriptor)
    for child in children:
        os.waitpid(child, 0)
    with os.fdopen(results) as pipe:
        return pipe.read().split()


def run_out_of_space(path: str, room: int) -> Any:
    """Two appends where the system takes only `room` more bytes: a real short write, then an error."""

    def work() -> list[str]:
        ledger = Ledger.open(path)
        limit = os.path.getsize(path) + room
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        messages = []
        for _ in range(2):
            try:
                ledger.append(EVENT, step=0)
            except Exception as error:
                messages.append(f"{type(error).__name__}: {error}")
        return messages

    return ask_child(work)


COMMANDS: dict[str, Callable[..., Any]] = {
    command.__name__: command
    for command in (
        kill_appending,
        kill_in,
        hold,
        kill_holder,
        kill_worker,
        open_in_child,
        use_inherited,
        create_at_once,
        run_out_of_space,
    )
}


def main() -> NoReturn:
    for line in sys.stdin:
        request = json.loads(line)
        reply = COMMANDS[request.pop("command")](**request)
        print(json.dumps(reply), flush=True)
    sys.exit(0)


if __name__ == "__main__":
    main()
