"""Forks runs of a tiny DPTrainer, kills them, and reports; one JSON request and one JSON reply a line.

Replies go to the descriptor given as argument, since libraries print to standard output when imported.

Imports take seconds and a fork takes a millisecond, so many kills are affordable. It stands apart from
the test process, which may have threads and should not be forked.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from tiny_runs import trainer_for
from tqdm import tqdm
from transformers import Trainer, TrainerState

from hf_dp.ledger import Ledger
from hf_dp.noise import GaussianNoise
from hf_dp.training import mixin
from hf_dp.training.spending import Spending

MAX_STEPS = 30
HOST = {"max_steps": MAX_STEPS, "save_strategy": "steps", "save_steps": 2, "logging_steps": 10}
POINTS: dict[str, tuple[Any, str]] = {
    "noise": (GaussianNoise, "release"),
    "ledger": (Ledger, "append"),
    "ledger copy": (Ledger, "copy_to"),
    "gradients": (mixin, "set_gradients"),
    "weights": (Trainer, "_save"),
    "optimizer state": (Trainer, "_save_optimizer_and_scheduler"),
    "trainer state": (TrainerState, "save_to_json"),
}


def after_each(owner: Any, name: str, then: Callable[[], None]) -> None:
    """Call `then` whenever ``owner.name`` has returned."""
    original = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        then()
        return result

    setattr(owner, name, wrapped)


def write_the_ledger_after_the_noise() -> None:
    """The planted fault: each event waits until its noisy sum is handed on."""
    record, set_gradients = Spending.record, mixin.set_gradients
    waiting: list[Callable[[], None]] = []

    def later(self: Spending, event: Any, *, step: int) -> None:
        waiting.append(lambda: record(self, event, step=step))

    def handed_on(*args: Any) -> None:
        waiting.pop()()
        set_gradients(*args)

    Spending.record = later  # type: ignore[method-assign]
    mixin.set_gradients = handed_on  # type: ignore[assignment]


def train(
    path: str,
    report: Callable[[str], None],
    *,
    ledger: str = "new",
    resume: bool = False,
    point: str = "",
    count: int = 0,
    fault: bool = False,
) -> None:
    """One run; `report` hears of each release that was made and of each step that was taken.

    With `point` the run kills itself right after that part of it was done `count` times.
    """
    if fault:
        write_the_ledger_after_the_noise()
    after_each(GaussianNoise, "release", lambda: report("release"))
    if point:
        left = [count]

        def die() -> None:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        after_each(*POINTS[point], die)
    trainer = trainer_for(Path(path), host=HOST, dp={"ledger": ledger})
    trainer.create_optimizer()
    trainer.optimizer.register_step_post_hook(lambda *_: report("step"))
    trainer.train(resume_from_checkpoint=resume)
    report(f"finished {trainer.state.global_step}")


def fork_run(path: str, after: float | None = None, **options: Any) -> dict[str, Any]:
    """Run in a child, killed `after` seconds if it lives that long."""
    reader, writer = os.pipe()
    began = time.monotonic()
    child = os.fork()
    if not child:
        os.close(reader)
        signal.alarm(120)  # rather a dead run than a test that waits for ever
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        try:
            train(path, lambda what: report_to(writer, what), **options)
        except BaseException as error:
            report_to(writer, f"error {error!r}")
        os._exit(0)
    os.close(writer)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    with os.fdopen(reader) as pipe:
        lines = [line.rstrip("\n") for line in pipe if line.endswith("\n")]
    _, status = os.waitpid(child, 0)
    last = lines[-1] if lines else ""
    return {
        "killed": os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL,
        "releases": lines.count("release"),
        "steps": lines.count("step"),
        "finished": int(last.split()[1]) if last.startswith("finished") else None,
        "error": last if last.startswith("error") else None,
        "seconds": time.monotonic() - began,
    }


def report_to(descriptor: int, what: str) -> None:
    os.write(descriptor, f"{what}\n".encode())


def main() -> NoReturn:
    torch.set_num_threads(1)
    # The default lock is a semaphore of all forks, which a killed one would hold for ever.
    tqdm.set_lock(threading.RLock())
    replies = int(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:  # imports what is imported late
        trainer_for(Path(folder), host={**HOST, "max_steps": 2}).train()
    gc.collect()
    gc.freeze()  # the Trainer collects garbage, and need not look through all imports each time
    for line in sys.stdin:
        reply = fork_run(**json.loads(line))
        os.write(replies, json.dumps(reply).encode() + b"\n")
    sys.exit(0)


if __name__ == "__main__":
    main()
