"""Quality, cost and speed of a converted model."""

from .._latency import Latency as Latency
from .._latency import measure_ms as measure_ms
from .quality import METRICS as METRICS
from .quality import Agreement as Agreement
from .quality import DenseReference as DenseReference
from .quality import Quality as Quality
from .quality import accuracy as accuracy
from .quality import agreement as agreement
from .quality import default_metric as default_metric
from .quality import measure_quality as measure_quality
from .quality import perplexity as perplexity
from .sweep import Curve as Curve
from .sweep import CurvePoint as CurvePoint
from .sweep import DenseQuality as DenseQuality
from .sweep import LayerRules as LayerRules
from .sweep import model_cost as model_cost
from .sweep import model_weights as model_weights
from .sweep import on_line as on_line
from .sweep import quality_at as quality_at
from .sweep import sweep as sweep
