"""Data curation: documents are cleaned, freed of duplicates, rewritten by a model, judged and labelled, on Ray Data.

`run.curate` is the whole of it; `words` has the numbers behind all comparisons of texts; every other file is one stage
or one tool of a stage.
"""
