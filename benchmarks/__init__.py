"""Step time, peak memory and evaluation of adapted networks beside full fine-tuning, the lower bound and the peers.

`cases` (networks and sizes) · `variants` (what is measured on them) · `subject` (a step, an evaluation) · `memory` and
`timing` (how each is measured) · `machine` (where) · `store` (the JSON) · `ratios` (what it says) · `run` (the command)
· `targets` and `report` (docs/performance.md).
"""
