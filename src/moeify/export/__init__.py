"""Converted models in formats that know nothing of moeify: ONNX, and the layouts of native mixtures of experts.

onnx, and transformers' model code, are imported where they are used.
"""

from .native_moe import FixedRouting as FixedRouting
from .native_moe import NativeMoEConfig as NativeMoEConfig
from .native_moe import check_exportable as check_exportable
from .native_moe import fit_routing as fit_routing
from .native_moe import routed_as as routed_as
from .native_moe import to_native_moe as to_native_moe
from .onnx import OnnxConfig as OnnxConfig
from .onnx import OnnxReport as OnnxReport
from .onnx import to_onnx as to_onnx
