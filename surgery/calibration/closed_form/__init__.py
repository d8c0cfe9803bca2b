"""Fits of attention to the base in closed form, layer after layer, on a calibration text.

`gqa` and `mla` use them. The pieces, from the bottom: sums of squares and their solver (`fit_scores`, `fit_values`,
`conjugate_gradient`), low ranks and ridges (`low_rank`), one layer (`layer`), the MLP behind it (`fit_mlp`), and the
whole model (`layerwise_fit`).
"""
