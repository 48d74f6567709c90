"""Measurements that are kept: beside other engines (`side_by_side`), and of the recipe's parts (`ablation`)."""
