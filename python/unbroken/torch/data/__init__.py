"""The user's own `torch.utils.data.DataLoader`, resumed bit for bit in the middle of an epoch.

Touches: nothing on import. `Session` is the whole interface; the modules beside it are its parts.
"""

from unbroken.torch.data.session import Session

__all__ = ["Session"]
