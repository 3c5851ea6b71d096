"""A session on another device than the CPU, with its tensors kept there between copies (ONNX Runtime's I/O binding)."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .providers import onnxruntime_api

Array = npt.NDArray[Any]


class BoundSession:
    """Runs like the session it wraps: the input is copied into a buffer that stays, each wanted output is read once.

    Args:
        session: of a graph with one input.
        device: ONNX Runtime's name of the memory, `cuda` or `cpu`.
    """

    def __init__(self, session: Any, device: str = "cuda") -> None:
        self._session, self._device = session, device
        self._name = session.get_inputs()[0].name
        self._input: Any = None
        self._bindings: dict[tuple[str, ...], Any] = {}
        self._lock = threading.Lock()  # one buffer, so one run at a time

    def run(self, names: Sequence[str], inputs: Mapping[str, Array], options: Any = None) -> list[Array]:
        """Outputs by name; raises what the session's own `run` raises."""
        value = np.ascontiguousarray(inputs[self._name])
        with self._lock:
            if self._input is None or self._input.shape() != list(value.shape):
                make = (
                    onnxruntime_api().OrtValue.ortvalue_from_shape_and_type
                )  # from_numpy may share the caller's memory
                self._input = make(list(value.shape), value.dtype, self._device, 0)
                self._bindings.clear()
            self._input.update_inplace(value)
            binding = self._bindings.get(tuple(names))
            if binding is None:
                binding = self._bindings[tuple(names)] = self._bind(names)
            self._session.run_with_iobinding(binding, options)
            return [np.asarray(output) for output in binding.copy_outputs_to_cpu()]

    def _bind(self, names: Sequence[str]) -> Any:
        binding = self._session.io_binding()
        binding.bind_ortvalue_input(self._name, self._input)
        for name in names:
            binding.bind_output(name, self._device, 0)
        return binding

    def get_providers(self) -> list[str]:
        """Providers of the session."""
        return list(self._session.get_providers())

    def get_provider_graph_assignment_info(self) -> Any:
        """Which provider took which node."""
        return self._session.get_provider_graph_assignment_info()
