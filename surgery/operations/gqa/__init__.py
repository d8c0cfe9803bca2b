"""KV heads shared between query heads (GQA, MQA): `operation.py` is the recipe's entry.

From the weights alone: `grouping.py` chooses who shares, `merge.py` averages (`method: mean | first | random`).
In closed form (`method: closed_form`), on a calibration text:

1. `closed_form.py` orders the KV heads and picks the layers that keep theirs (`choose_layers.py`);
2. `streams.py` sends the text through base and converted model, layer by layer; each layer is,
3. in `layer.py`, merged by low rank (`low_rank.py`); then queries and keys (`fit_scores.py`), values (`fit_values.py`)
   and the output projection are fitted to what the base's attention gave (`layer_inputs.py`);
4. `fit_mlp.py` refits the MLP's output projection to the base's hidden states behind the layer.

`conjugate_gradient.py` solves the least squares of 3; `cost.py` estimates time and memory for a plan.
"""
