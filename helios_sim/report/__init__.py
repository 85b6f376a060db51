"""What a run says about itself: metrics, comparisons, tables, figures and files. Knows results, runs nothing."""
