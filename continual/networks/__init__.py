"""Networks of many members at once: classifiers by name (`classifier`), and what single methods were published with."""
