"""Whether operations run now, and as they are written."""

from __future__ import annotations

import torch


def is_eager() -> bool:
    """Not compiled, traced, transformed by ``torch.func``, or differentiated in forward mode."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch.autograd.forward_ad._current_level < 0
    )
