"""Lets transformers load moeify's checkpoints in programs that do not import moeify.

torch calls `activate` when it is imported. That puts an import hook of one use in place and imports nothing: when transformers' table of
quantisation methods is imported, by the first ``from_pretrained`` or before it, moeify is imported first and adds itself to the table.

Nothing here may raise: torch would make it a failing ``import torch``. Off with ``MOEIFY_AUTOLOAD=0``, and, like all that torch calls this
way, with ``TORCH_DEVICE_BACKEND_AUTOLOAD=0``.
"""

import os
import sys

_TABLE = "transformers.quantizers.auto"
_AFTER_TABLE = "transformers.modeling_utils"
"""Imported after the table by whatever loads a model: for a process whose first import is the table itself, which then imports torch."""


def activate() -> None:
    """Install the hook; the entry point of the group ``torch.backends``."""
    if os.environ.get("MOEIFY_AUTOLOAD", "1") == "0" or "moeify" in sys.modules:
        return
    if not any(isinstance(finder, _ImportMoeifyFirst) for finder in sys.meta_path):
        sys.meta_path.insert(0, _ImportMoeifyFirst(_AFTER_TABLE if _TABLE in sys.modules else _TABLE))


class _ImportMoeifyFirst:
    """Import hook that waits for one module, imports moeify before it, and leaves."""

    def __init__(self, awaited):  # type: ignore[no-untyped-def]
        self.awaited = awaited

    def find_spec(self, fullname, path=None, target=None):  # type: ignore[no-untyped-def]
        """None for every other module."""
        if fullname != self.awaited:
            return None
        import importlib.util
        import logging

        sys.meta_path.remove(self)
        try:
            import moeify  # noqa: F401 - its import waits for the same module with a hook of its own
        except Exception as error:  # noqa: BLE001 - whatever is wrong with it, transformers works without
            logging.getLogger(__name__).warning(
                "moeify cannot be imported (%s: %s): its checkpoints load as dense models, or not at all; reinstall it, or set "
                "MOEIFY_AUTOLOAD=0.",
                type(error).__name__,
                error,
            )
        return importlib.util.find_spec(fullname)
