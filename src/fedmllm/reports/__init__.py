"""Reports, comparisons and tables, all derived from records."""
