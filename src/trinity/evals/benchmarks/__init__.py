"""The benchmarks that the models' report names, over local files."""
