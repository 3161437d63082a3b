"""The benchmark: specs of experiments, their records, and the papers' tables made of them."""
