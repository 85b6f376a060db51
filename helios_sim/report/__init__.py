"""Reports of finished runs: records, metrics, comparisons, tables, figures, pages and output files."""

# Styles of figures: as PNG for a page, or as SVG and PDF besides, for a paper.
FOR_PAGE, FOR_PAPER = STYLES = "page", "paper"
