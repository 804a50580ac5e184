"""One source that is being attended to: its session, in a thread of its own, from Join to the end."""

from __future__ import annotations

import contextlib
import enum
import threading
from collections.abc import Callable

from vllm_ascend.model_loader.netloader.client.candidates import Candidate
from vllm_ascend.model_loader.netloader.client.fetched import Fetched
from vllm_ascend.model_loader.netloader.client.session.session import ClientSession
from vllm_ascend.model_loader.netloader.errors import TransportError
from vllm_ascend.model_loader.netloader.wire.messages import Wait


class Stage(enum.Enum):
    """How far a session is."""

    ASKING = enum.auto()
    WAITING = enum.auto()
    """It has a place in the queue of a busy source."""
    TAKING = enum.auto()
    OVER = enum.auto()


class Attendance:
    """Runs `session` in a thread. What becomes of it is read when `stage` is OVER."""

    def __init__(
        self,
        session: ClientSession,
        *,
        may_wait: Callable[[ClientSession, Wait], bool],
        may_take: Callable[[ClientSession], bool],
        told: Callable[[ClientSession, Wait], None],
        changed: Callable[[], None],
    ) -> None:
        """`may_wait` says whether the client keeps its place where it has to wait, and `told` hears what it is told
        then. `may_take` says whether a turn is to be used. `changed` is called at each change of the stage. All of them
        are called by the session's thread.
        """
        self.session = session
        self.stage = Stage.ASKING
        self.fetched: Fetched | None = None
        self._failure: BaseException | None = None
        self.gave_up_its_place = False
        """Whether it is over because it would have had to wait, or because its turn was not used."""
        self._may_wait = may_wait
        self._may_take = may_take
        self._told = told
        self._changed = changed
        self._thread: threading.Thread | None = None

    @property
    def candidate(self) -> Candidate:
        """Whom it attends to."""
        return self.session.candidate

    @property
    def is_busy(self) -> bool:
        """Whether something is to be expected of it by itself, other than a turn."""
        return self.stage in (Stage.ASKING, Stage.TAKING)

    def take_failure(self) -> BaseException | None:
        """What ended the session, None where nothing has; once, because its traceback keeps the session alive."""
        failure, self._failure = self._failure, None
        return failure

    def start(self) -> None:
        """Begins. Raises RuntimeError where no thread can be had."""
        thread = threading.Thread(target=self._run, name="netloader-source", daemon=True)
        thread.start()
        self._thread = thread

    def run_here(self, error: RuntimeError) -> None:
        """Does everything in the calling thread, because of `error` there is no other. So it cannot wait for a turn."""

        def cannot_wait(_: ClientSession, __: Wait) -> bool:
            raise TransportError(f"this process cannot start threads: {error}") from error

        self._may_wait = cannot_wait
        self._run()

    def end(self) -> None:
        """Ends the session wherever it is. Does not block."""
        self.session.break_off()
        self.session.shut_down()

    def join(self, timeout: float | None = None) -> bool:
        """Waits for the thread. Whether it has ended."""
        if self._thread is None:
            return True
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        session = self.session
        try:
            with contextlib.closing(session):
                wait = session.ask()
                if wait is not None:
                    if not self._may_wait(session, wait):
                        self.gave_up_its_place = True
                        return
                    self._enter(Stage.WAITING)
                    session.await_turn(lambda wait: self._told(session, wait))
                if not self._may_take(session):
                    self.gave_up_its_place = True
                    return
                self._enter(Stage.TAKING)
                self.fetched = session.take()
        except BaseException as error:  # whoever collects the outcome raises what is no failure of the source
            self._failure = error
        finally:
            self._enter(Stage.OVER)

    def _enter(self, stage: Stage) -> None:
        self.stage = stage
        self._changed()
