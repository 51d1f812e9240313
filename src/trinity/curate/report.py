def write_page(out): return out
