"""The code our losses are measured against."""
