"""Pictures and tables of what `evaluate` measured; nothing is computed here."""

from .plots import plot_curve as plot_curve
from .text import cost_markdown as cost_markdown
from .text import curve_markdown as curve_markdown
from .text import layers_markdown as layers_markdown
