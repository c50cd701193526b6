"""What shows what happened: `explain`, `summary`, `report`, pages, dumps. No other room imports it, but `testing`."""
