"""Pages and plots of what `explain` found out and of what a run did. jinja2 and matplotlib wait until then."""

from cachedit_fx.inspect.pages.explained import explanation_fragment, explanation_page
from cachedit_fx.inspect.pages.plots import plot_chain, plot_run
from cachedit_fx.inspect.pages.ran import run_fragment, run_page

__all__ = ["explanation_fragment", "explanation_page", "plot_chain", "plot_run", "run_fragment", "run_page"]
