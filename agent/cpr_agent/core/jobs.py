# SPDX-License-Identifier: GPL-2.0-or-later
"""Long acts on the whole host, as objects that a caller can watch. They go on without their caller."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator

import msgspec

from cpr_agent.core.listener import Listener
from cpr_agent.errors import CprError, HostFailed, NothingToDo, WrongState

log = logging.getLogger(__name__)


class JobState(enum.StrEnum):
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Step(enum.StrEnum):
    """Of one guest of a job."""

    WAITING = "waiting"
    PREPARING = "preparing"
    SAVING = "saving"
    SAVED = "saved"
    SHUTTING_DOWN = "shutting-down"
    SHUT_DOWN = "shut-down"
    RESUMING = "resuming"
    RESUMED = "resumed"
    LOADING = "loading"
    LOADED = "loaded"
    STARTING = "starting"
    STARTED = "started"
    REFRESHING = "refreshing"
    REFRESHED = "refreshed"
    REFUSED = "refused"
    FAILED = "failed"


_UNDER_WAY = frozenset(
    {
        Step.WAITING,
        Step.PREPARING,
        Step.SAVING,
        Step.SHUTTING_DOWN,
        Step.RESUMING,
        Step.LOADING,
        Step.STARTING,
        Step.REFRESHING,
    }
)


class GuestStep(msgspec.Struct, frozen=True):
    """``since`` is epoch seconds; ``error`` is why it was refused or has failed."""

    step: Step
    since: float
    error: str = ""


class Job(msgspec.Struct):
    """``result`` is empty until the end, then "done", "nothing to do", or the text of ``error``. Times are epoch seconds;
    ``ended_at`` is 0 until the end.

    ``parked`` is set while the job only waits for the host to go down, and at its end: the agent need not wait for the job
    then before it ends.
    """

    id: int
    kind: str
    state: JobState = JobState.RUNNING
    step: str = ""
    guests: dict[str, GuestStep] = msgspec.field(default_factory=dict)
    """By VM, those that the job has to do with."""
    started_at: float = msgspec.field(default_factory=time.time)
    ended_at: float = 0.0
    result: str = ""
    error: CprError | None = None
    cancellable: bool = True
    cancelled: bool = False
    """A caller wants it taken back; else a cancellation is the agent's own end."""
    parked: asyncio.Event = msgspec.field(default_factory=asyncio.Event)
    listener: Listener = msgspec.field(default_factory=Listener)

    async def over(self) -> None:
        """Wait for its end, or until it only waits for the host's. Raises CprError if it failed or was cancelled."""
        await self.parked.wait()
        if self.state is JobState.FAILED:
            raise self.error or CprError(self.result)
        if self.state is JobState.CANCELLED:
            raise CprError(f"job {self.id} ({self.kind}) was cancelled", left="the part that was done by then stays done")

    @property
    def progress(self) -> float:
        """0 to 1: the guests that are done, of all."""
        if self.state is JobState.DONE:
            return 1.0
        done = sum(guest.step not in _UNDER_WAY for guest in self.guests.values())
        return done / len(self.guests) if self.guests else 0.0

    def enter(self, step: str) -> None:
        self.step = step
        self.listener.job_changed(self)

    def expect(self, vms: Iterable[str]) -> None:
        """These guests' turn is to come."""
        now = time.time()
        self.guests |= {vm: GuestStep(Step.WAITING, now) for vm in vms}
        self.listener.job_changed(self)

    def note(self, vm: str, step: Step, error: str = "") -> None:
        self.guests[vm] = GuestStep(step, time.time(), error)
        self.listener.job_changed(self)

    def forget(self, vm: str) -> None:
        """It is left to another job."""
        self.guests.pop(vm, None)
        self.listener.job_changed(self)

    @contextlib.contextmanager
    def guest(self, vm: str, doing: Step, done: Step) -> Iterator[None]:
        """While a guest's part of the job lasts."""
        self.note(vm, doing)
        try:
            yield
        except BaseException as error:
            self.note(vm, Step.FAILED, error.text if isinstance(error, CprError) else str(error) or "it was given up")
            raise
        self.note(vm, done)


class Jobs:
    """Runs jobs, and tells ``listener`` of each."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self.current: dict[int, Job] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._last = 0

    def start(self, kind: str, work: Callable[[Job], Awaitable[None]]) -> Job:
        return self._start(Job(self._next_id(), kind, listener=self._listener), work)

    def watch(self, kind: str, work: Callable[[Job], Awaitable[None]]) -> Job:
        """A job that only waits for the host to go down: it is parked from the beginning, and can't be cancelled."""
        job = Job(self._next_id(), kind, cancellable=False, listener=self._listener)
        job.parked.set()
        return self._start(job, work)

    def _next_id(self) -> int:
        self._last += 1
        return self._last

    def _start(self, job: Job, work: Callable[[Job], Awaitable[None]]) -> Job:
        self.current[job.id] = job
        self._tasks[job.id] = asyncio.get_running_loop().create_task(self._run(job, work))
        self._listener.job_added(job)
        return job

    def cancel(self, job_id: int) -> None:
        """Raises WrongState when it is too late."""
        job = self.current.get(job_id)
        if job is None:
            raise WrongState(f"job {job_id} is over", left="nothing was done")
        if not job.cancellable:
            raise WrongState(f"job {job.id} ({job.kind}) can't be cancelled any more: {job.step}", left="it goes on")
        job.cancelled = True
        self._tasks[job_id].cancel()

    async def drain(self, timeout_s: float) -> None:
        """Wait for jobs under way, so that a stop of the agent does not interrupt them."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                for job in list(self.current.values()):
                    await job.parked.wait()

    async def _run(self, job: Job, work: Callable[[Job], Awaitable[None]]) -> None:
        over = True
        try:
            await work(job)
            job.state, job.result = JobState.DONE, "done"
        except NothingToDo as nothing:
            job.state, job.result, job.error = JobState.DONE, "nothing to do", nothing
        except CprError as error:
            job.state, job.result, job.error = JobState.FAILED, error.text, error
            log.error("job %d (%s) failed: %s", job.id, job.kind, error)
        except asyncio.CancelledError:
            over = not job.parked.is_set()  # else the agent goes down with the host, which is no end of the job
            job.state, job.result = JobState.CANCELLED, "cancelled"
        except OSError as error:
            job.error = HostFailed.of(error)
            job.state, job.result = JobState.FAILED, job.error.text
            log.exception("job %d (%s)", job.id, job.kind)
        except Exception as error:
            job.state, job.result = JobState.FAILED, f"internal error: {error}"
            log.exception("job %d (%s)", job.id, job.kind)
        finally:
            if over:
                job.ended_at = time.time()
                del self.current[job.id]
                del self._tasks[job.id]
                job.parked.set()
                self._listener.job_changed(job)
                self._listener.job_removed(job)
