"""The report: figures, sections in words, and the page that holds them. Reads finished tables, runs no study."""
