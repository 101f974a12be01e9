"""Changes that last as long as a `with` block, and are undone whatever ends it.

That is: errors, Ctrl-C at any moment (entering and leaving included), a first attempt to undo that fails, and blocks
that are left in another order than they were entered. Everything that changes a pipeline for a while is a `Block`.
"""

from __future__ import annotations

import _thread
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from types import CodeType, FrameType
from typing import Any, TypeAlias, TypeVar

from .errors import ConeslabError

Function = TypeVar("Function", bound=Callable[..., Any])

# --- Ctrl-C waits while a change is made or undone ------------------------------------------------------

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_AGAIN = 0.005  # seconds
_protected: set[CodeType] = set()
_handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}  # what was there before ours, by signal
_waiting: set[int] = set()  # signals that came while protected code ran


def protected(function: Function) -> Function:
    """Let signals wait while the function runs, or anything it calls, as long as a block is open in the main thread.

    Python checks for signals at the start of every function, so `__exit__` could be interrupted before its first line.
    """
    _protected.add(function.__code__)
    return function


def _wait_or_pass_on(number: int, frame: FrameType | None) -> None:
    """Our handler: let the signal wait while protected code runs, else do what was done before."""
    above = frame
    while above is not None:
        if above.f_code in _protected:
            _waiting.add(number)
            again = threading.Timer(_AGAIN, _send_again, [number])  # unless `_deliver` comes first
            again.daemon = True
            again.start()
            return
        above = above.f_back
    _waiting.discard(number)
    _handlers[number](number, frame)


def _send_again(number: int) -> None:
    if number in _waiting:
        _thread.interrupt_main(signal.Signals(number))


def _deliver() -> None:
    """Do now what signals that waited would have done, usually raise KeyboardInterrupt."""
    if threading.current_thread() is threading.main_thread():
        for number in tuple(_waiting):
            _waiting.discard(number)
            _handlers[number](number, None)


def _hold_signals() -> None:
    """Set our handler; a signal that is ignored, or ends the process at once, stays as it is."""
    if threading.current_thread() is not threading.main_thread():
        return
    for number in _SIGNALS:
        before = signal.getsignal(number)
        if callable(before) and before is not _wait_or_pass_on:
            _handlers[number] = before
            signal.signal(number, _wait_or_pass_on)


def _release_signals() -> None:
    """Put the handlers back once no block is open in the main thread."""
    main = threading.main_thread()
    if threading.current_thread() is not main or any(made.thread == main.ident for made in tuple(_ACTIVE)):
        return
    for number in _SIGNALS:
        if signal.getsignal(number) is _wait_or_pass_on:
            signal.signal(number, _handlers[number])


# --- blocks ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where a value sits that a block changes; owner and name tell places apart."""

    owner: object
    name: str
    get: Callable[[], Any]
    set: Callable[[Any], object]

    @property
    def key(self) -> tuple[int, str]:
        return id(self.owner), self.name


def attribute(owner: Any, name: str) -> Place:
    """An attribute; one that the object itself does not have is deleted again."""

    def put(value: Any) -> None:
        if value is _NOTHING:
            owner.__dict__.pop(name, None)
        else:
            setattr(owner, name, value)

    return Place(owner, name, lambda: owner.__dict__.get(name, _NOTHING), put)


_NOTHING = object()
Changes: TypeAlias = Iterable[tuple[Place, Any]]


class Block:
    """Give places other values inside a `with` block, and put the old ones back afterwards.

    changes: pairs of a place and its new value, or a function that returns them. The function is called on entry, so
    that it sees everything as it is then; if it raises, nothing has changed. pipe: the pipeline that is changed, if
    any; while a block is open on it, other threads cannot open one. value: what `with ... as` gives, by default pipe.
    Blocks nest, and may be left in another order than they were entered: then the later one keeps its values until it
    is left, and puts back what was there before both. A block that is dropped without being left is left then. An
    attempt to put something back that fails is repeated; if it fails for good, its error is raised, and `__exit__` can
    be called again.
    Raises ConeslabError if the block is open already, or another thread's is on the same pipeline.
    """

    def __init__(self, changes: Changes | Callable[[], Changes] = (), value: Any = None, *, pipe: Any = None) -> None:
        self._changes, self._value, self._pipe = changes, pipe if value is None else value, pipe
        self._made = Made(pipe)
        self._guard: Generator[None, None, None] | None = None

    def open(self, made: Made) -> Any:
        """Make the changes, each after `made.undo` of it; returns what `with ... as` gives."""
        made.change(list(self._changes() if callable(self._changes) else self._changes))
        return self._value

    @property
    def is_open(self) -> bool:
        return self._made in _ACTIVE

    @protected
    def __enter__(self) -> Any:
        if self.is_open:
            raise ConeslabError("this block is already open: call applied(...) again for a second one")
        try:
            _hold_signals()
            self._made = Made(self._pipe)
            self._guard = _left_if_dropped(self._made)
            next(self._guard)
            self._made.register()
            value = self.open(self._made)
            _deliver()
            return value
        except BaseException:
            self._leave()
            raise

    @protected
    def __exit__(self, *exception: object) -> None:
        self.close()

    @protected
    def close(self) -> None:
        """Put everything back; does nothing if the block is not open."""
        self._leave()
        _deliver()

    @protected
    def _leave(self) -> None:
        try:
            self._made.close()
        finally:
            if self._guard is not None:
                next(self._guard, None)  # to its end: code that ran when it is dropped would swallow a Ctrl-C


@protected
def _left_if_dropped(made: Made) -> Generator[None, None, None]:
    """Closes what a block made when the block is dropped, as when an interrupt comes before `__exit__` has begun.

    A generator, because it ends without running any code once it is done, where `__del__` would swallow a Ctrl-C.
    """
    try:
        yield
    finally:
        made.close()


class Made:
    """What a block has changed since it was entered: the values from before, by place, and steps that undo the rest."""

    ATTEMPTS = 5

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self._steps: list[Callable[[], object]] = []
        self.thread = threading.get_ident()
        self.saved: dict[tuple[int, str], tuple[Place, Any]] = {}

    def register(self) -> None:
        """Count as open from now on; refuse if another thread has a block on the same pipeline."""
        _ACTIVE.append(self)
        mine = self._networks()
        if any(other.thread != self.thread and mine & other._networks() for other in tuple(_ACTIVE)):
            raise ConeslabError(
                "this pipeline is in use in another thread: a pipeline has only one state, so give each thread a copy "
                "of its own (copy.deepcopy), or let them take turns"
            )

    def _networks(self) -> set[int]:
        """Ids of the networks that decide what the pipeline draws."""
        return set() if self._pipe is None else {id(self._pipe.unet), id(self._pipe.text_encoder)}

    def undo(self, step: Callable[[], object]) -> None:
        """Add a step that is safe to repeat. Neither it nor the changes may hold the block: it could not be dropped."""
        self._steps.append(step)

    def enter(self, block: Block) -> None:
        """Enter another block, which is left with this one."""
        self.undo(block.close)  # in advance: it does nothing for one that is not open
        block.__enter__()

    def hook(self, module: Any, kind: str, function: Callable[..., Any]) -> None:
        """Register a hook on a torch module, such as its "forward_pre_hook", with keyword arguments.

        function: a bound method, or another function that is equal to itself alone.
        """
        self.undo(partial(_unhook, module, kind, function))
        getattr(module, f"register_{kind}")(function, with_kwargs=True)

    def change(self, changes: Sequence[tuple[Place, Any]]) -> None:
        saved = {place.key: (place, place.get()) for place, _ in changes}
        for key in saved:
            self.undo(partial(self._restore, key))
        self.saved = saved
        for place, new in changes:
            place.set(new)

    def _restore(self, key: tuple[int, str]) -> None:
        """Put back one place's value, or leave it to a block that was opened later and is still open."""
        if key not in self.saved:
            return
        place, old = self.saved[key]
        opened = list(_ACTIVE)
        for later in opened[opened.index(self) + 1 :]:
            if key in later.saved:
                later.saved[key] = place, old
                break
        else:
            place.set(old)
        self.saved.pop(key)

    @protected
    def close(self) -> None:
        """Undo everything; does nothing the second time."""
        try:
            self._close()
        finally:
            self._close()  # what is left to do after an exception between two steps; usually nothing

    def _close(self) -> None:
        raised: BaseException | None = None
        for _ in range(self.ATTEMPTS):
            for step in reversed(tuple(self._steps)):
                try:
                    step()
                    self._steps.remove(step)  # only now: an interruption before this line repeats the step
                except BaseException as error:
                    raised = raised or error
            if not self._steps:
                break
        if not self._steps:
            if self in _ACTIVE:
                _ACTIVE.remove(self)
            _release_signals()
        if raised is not None:
            raise raised


def _unhook(module: Any, kind: str, function: Callable[..., Any]) -> None:
    """Remove a function from a module's hooks, whether or not it is there."""
    hooks, with_arguments = getattr(module, f"_{kind}s"), getattr(module, f"_{kind}s_with_kwargs")
    for key, hook in list(hooks.items()):
        if hook == function:
            with_arguments.pop(key, None)
            hooks.pop(key, None)


_ACTIVE: list[Made] = []  # what the blocks now open have changed, outermost first


def before_blocks(place: Place) -> Any:
    """What was in a place before any open block changed it."""
    for made in tuple(_ACTIVE):
        if place.key in made.saved:
            return made.saved[place.key][1]
    return place.get()


class Nested(Block):
    """Several context managers, entered one after the other and left together, the latest first.

    managers: returns them, each called for when those before it have been entered.
    """

    def __init__(self, managers: Callable[[], Iterable[AbstractContextManager]], value: Any = None) -> None:
        super().__init__(value=value)
        self._managers = managers

    def open(self, made: Made) -> Any:
        for manager in self._managers():
            if isinstance(manager, Block):
                made.enter(manager)
            else:
                manager.__enter__()
                made.undo(partial(manager.__exit__, None, None, None))
        return self._value
