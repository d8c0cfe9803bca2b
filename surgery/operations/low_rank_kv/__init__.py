"""Keys and values of low rank: one vector for each token in the cache, from which those of all heads are made.

`operation.py` has the plan, and `operations/vector.py` the settings that any vector has. A loaded model is converted
layer by layer (calibration/closed_form/layerwise_fit.py). `layer.py` converts one layer
(calibration/closed_form/vector_layer.py): the vector of low rank comes from
`calibration/closed_form/joint_rank.py`, and queries, keys and the output projection are refitted. `weights.py` has the
new layer's weights. The model runs by `runtime/surgery_low_rank.py`.

Unlike latent attention (`mla`), every head keeps keys of its own, which RoPE turns in full: the base's norms, biases
and frequencies stay. So it loses less at the same cache, no stock class holds it, and a step makes the keys of the
past anew.

Related: Chang et al. 2024, "Palu", arXiv 2407.21118; Yuan et al. 2023, "ASVD", arXiv 2312.05821.
"""
