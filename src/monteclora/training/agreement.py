"""What the main process alone does, and all processes of a run must know the end of."""

from __future__ import annotations

from collections.abc import Callable

from accelerate.utils import broadcast_object_list

from monteclora.errors import MonteCLoRAError
from monteclora.system.devices import is_main_process, process_count

__all__ = ["by_main_process"]


def by_main_process(action: Callable[[], None]) -> None:
    """Let the main process do something, and raise on all processes what it raised; none goes on before it is done.

    Where it alone ended with an error, the others would wait for it in their next common operation.

    Args:
        action: of the main process; the others do not call it, but must come here too, once an accelerator is made.

    Raises:
        MonteCLoRAError: of the kind that the action raised, or what else it raised in words on the other processes.
    """
    if process_count() == 1:
        action()
        return
    found: list[Exception | None] = [None]
    if is_main_process():
        try:
            action()
        except Exception as error:
            known = isinstance(error, MonteCLoRAError)
            broadcast_object_list([error if known else _in_words(error)])
            raise
    broadcast_object_list(found)
    if found[0] is not None:
        raise found[0]


def _in_words(error: Exception) -> MonteCLoRAError:
    """An error that may hold what cannot be sent."""
    return MonteCLoRAError(f"the main process failed ({type(error).__name__}: {error})", "See what it says.")
