"""Pictures and tables of what `evaluate` measured; nothing is computed here."""

from .html import token_costs_html as token_costs_html
from .page import Report as Report
from .page import report_html as report_html
from .plots import check_plots as check_plots
from .plots import has_plots as has_plots
from .plots import plot_active_by_layer as plot_active_by_layer
from .plots import plot_curve as plot_curve
from .plots import plot_executed_experts as plot_executed_experts
from .plots import plot_nonzero_distribution as plot_nonzero_distribution
from .plots import plot_nonzeros as plot_nonzeros
from .plots import plot_patch_costs as plot_patch_costs
from .plots import plot_qualities as plot_qualities
from .text import ablation_markdown as ablation_markdown
from .text import cost_markdown as cost_markdown
from .text import costliest_markdown as costliest_markdown
from .text import curve_lines as curve_lines
from .text import curve_markdown as curve_markdown
from .text import experts_markdown as experts_markdown
from .text import layers_markdown as layers_markdown
from .text import nonzeros_markdown as nonzeros_markdown
from .text import plain_markdown as plain_markdown
from .text import recipe_markdown as recipe_markdown
