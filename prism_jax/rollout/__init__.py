"""On-policy sampling."""
