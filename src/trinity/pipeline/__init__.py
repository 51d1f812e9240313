"""The stages of one run, end to end. The demonstration is this pipeline on a corpus that needs no download."""
