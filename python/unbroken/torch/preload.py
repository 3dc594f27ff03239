"""What nearly every training imports, imported ahead of it.

Touches: nothing but the table of modules. No operator runs, no thread starts, no generator is drawn from, no device is
opened: a process that has done this and nothing else can be forked into fresh ones (`unbroken.forks`).
"""

from __future__ import annotations


def everything() -> None:
    """Import torch with what its users and `unbroken.run` need of it."""
    import numpy.random  # noqa: F401
    import torch._dynamo
    import torch.optim.lr_scheduler
    import torch.utils.data  # noqa: F401

    import unbroken.run  # noqa: F401
