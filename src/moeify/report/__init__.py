"""Pictures and tables of what `evaluate` measured; nothing is computed here."""

from .plots import plot_curve as plot_curve
from .plots import plot_nonzeros as plot_nonzeros
from .plots import plot_qualities as plot_qualities
from .text import cost_markdown as cost_markdown
from .text import curve_markdown as curve_markdown
from .text import layers_markdown as layers_markdown
from .text import recipe_markdown as recipe_markdown
