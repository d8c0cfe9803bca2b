"""Latent attention (MLA): one vector for each token, from which the keys and values of all heads are made.

`operation.py` has the plan, and `operations/vector.py` the settings that any vector has. A loaded model is converted
layer by layer (calibration/closed_form/layerwise_fit.py), and architecture/latent.py turns it into the stock model.
`layer.py` converts one layer (calibration/closed_form/vector_layer.py): the keys share one rotated key (complex PCA),
the rest of the keys and the values share a vector of low rank (calibration/closed_form/joint_rank.py), and queries,
keys and the output projection are refitted. `weights.py` has the new layer's weights.

DeepSeek-AI 2024, "DeepSeek-V2", arXiv 2405.04434. Conversions by others: Meng et al. 2025, "TransMLA", arXiv
2502.07864; Ji et al. 2025, "Towards Economical Inference" (MHA2MLA), arXiv 2502.14837.
"""
