"""The mini profile: what lets the whole program run on a laptop without a download.

Scenes are drawn from a seeded generator, rendered to H.264 clips, described by sentences and asked about; two small
checkpoints of the real architectures are trained on them and travel with the package, as do the clips, the rows in the
schema of the real data sets, and an offline judge. Scores on them say how a recipe treats these two small models. They
are not the paper's numbers.
"""
