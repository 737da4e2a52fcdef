"""One HTML file that shows what a chain of stages did: numbers from its folder, plots, a page."""
