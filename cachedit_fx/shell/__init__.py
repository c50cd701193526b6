"""The command `cachedit-fx`: explain, report and tune a model, list the options, and check an installation."""
