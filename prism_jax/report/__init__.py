"""The report on a chain of stages as an HTML file: numbers from its folder, plots, a page."""
