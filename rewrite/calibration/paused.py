"""Forwards that stop before a layer, so that it can be changed before they go on."""

from __future__ import annotations

__all__ = ["PausedForwards"]

import contextlib
import functools
import threading
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pocketize.errors import RewriteError
from pocketize.graph.inputs import Inputs


class PausedForwards:
    """One forward for each image, all at the same layer; one thread each, of which one runs.

    A context manager: what has not run to its end by then is abandoned.

    Args:
        model: the network.
        images: its inputs.
        paths: the layers to stop before.
    """

    def __init__(self, model: nn.Module, images: Sequence[Inputs], paths: Collection[str]) -> None:
        self._model, self._paths = model, paths
        self._runs = [_PausedForward(inputs) for inputs in images]
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> PausedForwards:
        for path in self._paths:
            hook = functools.partial(self._stop, path)
            module = self._model.get_submodule(path)
            self._stack.callback(module.register_forward_pre_hook(hook).remove)
        return self

    def __exit__(self, *_: object) -> None:
        for run in self._runs:
            run.abandon()
        self._stack.close()

    def inputs_of(self, path: str) -> list[Tensor]:
        """Let every forward go on to a layer, the next in their order; return its inputs.

        Raises:
            RewriteError: one of them calls another layer first.
        """
        found: list[Tensor] = []
        for number, run in enumerate(self._runs):
            run.go_on(self._model)
            if run.at != path:
                raise RewriteError(
                    f"calibrate: image {number} is at {run.at or 'the end'} where the first one "
                    f"calls {path}; give images for which the forward calls the same layers"
                )
            assert run.input is not None
            found.append(run.input)
        return found

    def _stop(self, path: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        me = threading.current_thread()
        run = next((run for run in self._runs if run.thread is me), None)
        if run is not None:  # else somebody calls the layer by itself
            run.stop(path, args[0])


class _PausedForward:
    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.thread: threading.Thread | None = None
        self.at = ""
        self.input: Tensor | None = None
        self.error: BaseException | None = None
        self.abandoned = False
        self._turn, self._stopped = threading.Semaphore(0), threading.Semaphore(0)

    def go_on(self, model: nn.Module) -> None:
        """Run to the next stop, or to the end."""
        self.at, self.input = "", None
        if self.thread is None:
            self.thread = threading.Thread(target=self._call, args=(model,), daemon=True)
            self.thread.start()
        elif self.thread.is_alive():
            self._turn.release()
        else:
            return
        self._stopped.acquire()
        if self.error is not None:
            raise self.error

    def stop(self, path: str, given: Any) -> None:
        """Wait before a layer; in the thread of the forward."""
        self.at, self.input = path, given
        self._stopped.release()
        self._turn.acquire()
        if self.abandoned:
            raise _Abandoned

    def abandon(self) -> None:
        """End the thread."""
        self.abandoned = True
        self._turn.release()
        if self.thread is not None:
            self.thread.join()

    def _call(self, model: nn.Module) -> None:
        kind = self.inputs.tensors()[0].device.type
        try:  # both are settings of a thread
            with torch.no_grad(), torch.autocast(kind, enabled=False):
                self.inputs.call(model)
        except _Abandoned:
            pass
        except BaseException as error:
            self.error = error
        finally:
            self._stopped.release()


class _Abandoned(BaseException):
    """Ends a forward that is no longer needed."""
