"""The embedded corpus: pictures of digits and charts, with questions."""
