"""Reports of finished runs: records, metrics, comparisons, tables, figures, pages and output files."""
