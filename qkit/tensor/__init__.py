"""Numbers and how they are stored: formats, codes, packing, sparse and low-rank parts."""
