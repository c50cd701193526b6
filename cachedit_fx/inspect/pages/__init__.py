"""HTML pages and plots of explanations and of runs. jinja2 and matplotlib are imported when they are needed."""

from cachedit_fx.inspect.pages.explained import explanation_fragment, explanation_page
from cachedit_fx.inspect.pages.plots import plot_chain, plot_run
from cachedit_fx.inspect.pages.ran import run_fragment, run_page

__all__ = ["explanation_fragment", "explanation_page", "plot_chain", "plot_run", "run_fragment", "run_page"]
