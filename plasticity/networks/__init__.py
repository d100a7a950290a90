"""Networks as those who intervene see them: stacked populations, their structure, what rewrites and redraws them."""
