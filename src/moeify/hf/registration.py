"""Tells transformers about ``quant_method: "moeify"``.

The registration calls live in ``transformers.quantizers.auto``, which costs seconds to import (it pulls every auto class), and which any
``from_pretrained`` imports by itself. So it is not imported here: if it is loaded already we register at once, else an import hook of one
use waits for it. Nothing in transformers is replaced or patched.
"""

import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType

QUANT_METHOD = "moeify"
AUTO = "transformers.quantizers.auto"
"""Module of transformers that holds the tables."""
_QUANTIZER = f"{__package__}.quantizer"


def register() -> None:
    """Make ``from_pretrained`` rebuild converted checkpoints; idempotent.

    Cost: nothing until transformers' model code is imported.
    """
    if AUTO in sys.modules and not is_loading(AUTO):
        _register_now()
    elif not any(isinstance(finder, _RegisterAfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisterAfterImport())


class _RegisterAfterImport(MetaPathFinder):
    """Import hook that finds one module, lets its own loader run it, and then registers."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The module's ordinary spec with our step behind its execution; None for every other module."""
        if fullname != AUTO:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            if not is_loading(_QUANTIZER):  # else it has started this import, and registers when it is complete
                _register_now()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _register_now() -> None:
    # From the submodules, not from the package: the package may be in the middle of its own import.
    from transformers.activations import ACT2FN
    from transformers.quantizers.auto import (
        AUTO_QUANTIZATION_CONFIG_MAPPING,
        AUTO_QUANTIZER_MAPPING,
        register_quantization_config,
        register_quantizer,
    )

    from ..sparsity.activation import UNRESTORED, UnrestoredActivation
    from .quantizer import MoeifyConfig, MoeifyQuantizer

    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(MoeifyConfig)
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(QUANT_METHOD)(MoeifyQuantizer)
    ACT2FN.setdefault(UNRESTORED, UnrestoredActivation)


def is_loading(name: str) -> bool:
    """Whether the import of a module has begun and not ended."""
    return name in sys.modules and bool(getattr(sys.modules[name].__spec__, "_initializing", False))
