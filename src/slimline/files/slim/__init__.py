"""The archive of a compressed model, ``.slim``: a model file whose arrays are entropy-coded, byte for byte."""
